"""The neural memory layer (Titans LMM), and what MAC, MAG and MAL share with it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import l2_norm, neural_memory, neural_memory_read, neural_memory_state, short_conv
from ...kernels.neural_memory.reference import inner_loss
from ...kernels.neural_memory.spec import MemorySpec
from ..config import ModelConfig
from ..features import FeatureMap
from ..layers import Linear, RMSNorm
from ..mixer_config import MemoryConfig
from .gates import MemoryGates, start_std
from .mixer import LayerState, Mixer


def draw_start(weights: Sequence[Tensor], norm: Tensor | None, spec: MemorySpec) -> None:
    """Draw W_0 ([..., in, out] of each matrix) in place, and set the memory's norm to 1.

    Entries are N(0, 1) where the memory ends in a LayerNorm, which makes their size the inverse of the inner learning
    rate (the loss is then of curvature 1 per matrix for unit keys); without one N(0, 4 / width of the hidden layer),
    and N(0, 1 / D) for a linear memory. What is drawn for the retention kl is log W, N(0, 1) always; for lq what gives
    W = D.
    """
    width, hidden = weights[0].shape[-2:]
    std = 1.0 if norm is not None else (width if spec.layers == 1 else hidden / 4) ** -0.5
    if spec.retention == "kl":
        std = 1.0
    for weight in weights:
        nn.init.normal_(weight, std=start_std(spec, width * hidden) if spec.retention == "lq" else std)
    if norm is not None:
        nn.init.ones_(norm)


def _loss(o: Tensor, v: Tensor, delta: Tensor | None, spec: MemorySpec) -> Tensor:
    """ℓ(o, v) [..., D] → [...]; lp without its smoothing."""
    if spec.bias == "lp":
        return (o - v).abs().pow(spec.lp_power).sum(-1) / spec.lp_power
    return inner_loss(o, v, delta, spec)


def _by_head(gate: Tensor) -> Tensor:
    """A gate [B, T, H], or its mean over channels [B, T, H, D]."""
    return gate if gate.dim() == 3 else gate.mean(-1)


class MemoryLayer(Mixer):
    """A neural memory per head and the layer around it (Titans, section 4.4).

        q, k, v = silu(conv(x W_q, x W_k, x W_v)),  q and k through the feature map, divided by their ℓ2 norm
        o_t     = M(q_t; W_t),  W_t written by one gradient step per token (:func:`palimpsest.kernels.neural_memory`)
        y       = (RMSNorm(o) ⊙ silu(x W_g)) W_o,  the norm per head

    W_0 is learnt, one per head; see :func:`draw_start`.

    State: ``memory``, of the operation; ``conv``, the convolution's last inputs, where there is one.
    """

    def __init__(self, model: ModelConfig, memory: MemoryConfig) -> None:
        super().__init__()
        self.memory, self.spec = memory, memory.spec
        self.dim, self.heads, self.width = model.dim, memory.heads, model.dim // memory.heads
        gated = memory.output_gate == "silu"
        self.gate_width = self.dim if gated else 0
        self.proj = Linear(self.dim, self.gate_width + 3 * self.dim, model.init_std)  # gate, q, k, v in this order
        self.conv = nn.Parameter(torch.empty(3 * self.dim, memory.conv)) if memory.conv else None
        self.gates = MemoryGates(model, memory, memory.heads)
        self.features = FeatureMap(memory.features, self.heads, self.width) if memory.features else None
        keys = self.features.width if self.features else self.width
        shapes = self.spec.weight_shapes(self.heads, keys, self.width)
        self.weight_names = [f"weights.{i}" for i in range(len(shapes))]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(*shape)) for shape in shapes)
        self.norm = nn.Parameter(torch.empty(self.heads, self.width)) if self.spec.norm else None
        self.out_norm = RMSNorm(self.width, model.norm_eps)
        self.out = Linear(self.dim, self.dim, model.residual_std)
        MemoryLayer.reset_parameters(self)  # of this class alone: what a subclass adds is not there yet

    def reset_parameters(self) -> None:
        """Draw the convolution (uniform in ±1/√width, as torch's own) and W_0."""
        if self.conv is not None:
            nn.init.uniform_(self.conv, -(self.conv.shape[1] ** -0.5), self.conv.shape[1] ** -0.5)
        draw_start(self.start(), self.norm, self.spec)

    @property
    def inner_chunk(self) -> int | None:
        """See :class:`Mixer`."""
        return self.spec.chunk_size

    def rechunk(self, size: int) -> None:
        """See :class:`Mixer`."""
        self.spec = replace(self.spec, chunk_size=size)

    def start(self) -> list[Tensor]:
        """W_0, each [H, in, out], or for the retentions lq and kl what it follows from."""
        return list(self.weights)

    def start_weights(self) -> dict[str, Tensor]:
        """W_0 as it is read, by name, each [1, H, in, out]."""
        state = neural_memory_state(self.start(), 1, self.spec)
        return {name: state[name] for name in self.weight_names}

    def _keys(self, x: Tensor) -> Tensor:
        """φ(x) over its ℓ2 norm, x [..., H, D]; heads of queries and keys may stand beside each other."""
        return l2_norm(x if self.features is None else self.features(x))

    def _convolve(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, LayerState | None]:
        """silu(conv(x)) for the first channels of q, k, v; without a convolution silu(x)."""
        if self.conv is None:
            return F.silu(x), None
        weight = self.conv[: x.shape[-1]]
        return short_conv(x, weight, activation="silu", state=state, cu_seqlens=cu_seqlens, return_state=return_state)

    def _finish(self, o: Tensor, gate: Tensor) -> Tensor:
        """Norm per head, gate, output projection: o [B, T, H, D] → [B, T, dim]."""
        return self.out(self.out_norm(o, gate.view(o.shape) if self.gate_width else None).flatten(2))

    def query(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor, LayerState | None]:
        """q [B, T, H, D] and the gate of x alone, for :meth:`read`; the state is a convolution's of q's channels."""
        joint = F.linear(x, self.proj.weight[: self.gate_width + self.dim])
        gate, q = joint.split([self.gate_width, self.dim], dim=-1)
        q, state = self._convolve(q, state, cu_seqlens, return_state)
        return self._keys(q.unflatten(-1, (self.heads, self.width))), gate, state

    def read(self, q: Tensor, gate: Tensor, weights: list[Tensor]) -> Tensor:
        """What the memory with ``weights`` ([H, in, out], or one per row) answers to :meth:`query`, writing nothing."""
        return self._finish(neural_memory_read(q, weights=weights, spec=self.spec, norm=self.norm), gate)

    def _write_inputs(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, LayerState | None]:
        gate, qkv = self.proj(x).split([self.gate_width, 3 * self.dim], dim=-1)
        q, k, v, state = self._heads_of(qkv, state, cu_seqlens, return_state)
        return q, k, v, gate, state

    def _heads_of(
        self, qkv: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor, Tensor, LayerState | None]:
        """q, k, v [B, T, H, D] from what was projected, [B, T, 3 dim]."""
        qkv, state = self._convolve(qkv, state, cu_seqlens, return_state)
        qk, v = qkv.unflatten(-1, (3 * self.heads, self.width)).split([2 * self.heads, self.heads], dim=2)
        q, k = self._keys(qk).split(self.heads, dim=2)
        return q, k, v, state

    def _remember(
        self,
        x: Tensor,
        tokens: tuple[Tensor, Tensor, Tensor],
        state: LayerState | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, LayerState | None]:
        """Write and read q, k, v [B, T, H, D] with the gates of x, from the operation's state."""
        return neural_memory(
            *tokens,
            **self.gates(x),
            weights=self.start(),
            spec=self.spec,
            norm=self.norm,
            state=state,
            cu_seqlens=cu_seqlens,
            return_state=return_state,
        )

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`Mixer`: write every token and read at every token."""
        held = state or {}
        q, k, v, gate, conv = self._write_inputs(x, held.get("conv"), cu_seqlens, return_state)
        o, memory = self._remember(x, (q, k, v), held.get("memory"), cu_seqlens, return_state)
        o, more = self._beside(o, x, (q, k, v), held, cu_seqlens, return_state)
        y = self._finish(o, gate)
        if not return_state:
            return y, None
        return y, {"memory": memory, **more} | ({"conv": conv} if conv else {})

    def _beside(
        self,
        o: Tensor,
        x: Tensor,
        tokens: tuple[Tensor, Tensor, Tensor],
        held: LayerState,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, LayerState]:
        """What was read, with what a subclass has beside this memory, and its part of the state; here nothing."""
        return o, {}

    def conv_state(self, channels: int, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState | None:
        """The convolution's state before the first token; None without a convolution."""
        if self.conv is None:
            return None
        return {"x": torch.zeros(batch, self.conv.shape[1] - 1, channels, device=device, dtype=dtype)}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """W = W_0, no momentum, nothing seen."""
        memory = neural_memory_state(self.start(), batch, self.spec)
        conv = self.conv_state(3 * self.dim, batch, device, dtype)
        return {"memory": memory} | ({"conv": conv} if conv else {})

    @torch.no_grad()
    def _probe(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Numbers of every token and head [B, T, H], and the memory's state after them."""
        _, k, v, _, _ = self._write_inputs(x, None, None, False)
        gates = self.gates(x)
        found, effective = {}, gates["step"]
        if "log_retain" in gates:
            found["retention"] = _by_head(gates["log_retain"].exp())
        if "log_momentum" in gates:
            found["momentum"] = _by_head(gates["log_momentum"].exp())
            effective = effective / -torch.expm1(gates["log_momentum"])
        effective = _by_head(effective)
        if "gamma" in gates:
            effective = effective * gates["gamma"] * self.spec.window
        found["step"] = effective * self.spec.chunk_size
        for name, after in (("loss_before", False), ("loss_after", True)):
            spec = replace(self.spec, read_after_write=after)
            options = {"weights": self.start(), "spec": spec, "norm": self.norm}
            o, state = neural_memory(k, k, v, **gates, **options, return_state=True)  # type: ignore[arg-type]
            found[name] = _loss(o.to(effective.dtype), v.to(effective.dtype), gates.get("delta"), spec)
        assert state is not None
        return found, state

    @torch.no_grad()
    def recall(self, x: Tensor, marks: Sequence[int]) -> Tensor:
        """See :class:`Mixer`: cos(M(k_t; W_n), v_t)."""
        _, k, v, _, _ = self._write_inputs(x, None, None, False)
        written = {"q": k, "k": k, "v": v} | self.gates(x)
        weights = list(self.start_weights().values())
        state, done, found = None, 0, []
        for mark in marks:
            if mark > done:
                part = {name: y[:, done:mark] for name, y in written.items()}
                options = {"weights": self.start(), "spec": self.spec, "norm": self.norm, "state": state}
                _, state = neural_memory(**part, **options, return_state=True)  # type: ignore[arg-type]
                assert state is not None
                weights, done = [state[name] for name in self.weight_names], mark
            o = neural_memory_read(k, weights=weights, spec=self.spec, norm=self.norm)
            found.append(F.cosine_similarity(o.float(), v.float(), dim=-1).mean(-1)[0])
        return torch.stack(found)

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, Tensor]:
        """See :class:`Mixer`: what :meth:`diagnose` averages, a mean over heads; ``loss_before`` is the surprise."""
        return {name: value.mean(-1) for name, value in self._probe(x)[0].items()}

    @torch.no_grad()
    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """Means over x [B, T, dim]: ``retention``, ``momentum``, ``step`` (Σ θ / (1 − η) of a chunk), ``loss_before``
        and ``loss_after`` (the inner loss of each token at W_{t−1} and at W_t), ``state_norm`` (Frobenius norm of a
        head's weights at the end)."""
        found, state = self._probe(x)
        squares = sum(state[f"weights.{i}"].square().sum((-2, -1)) for i in range(self.spec.layers))
        return {name: value.mean() for name, value in found.items()} | {
            "state_norm": torch.as_tensor(squares).sqrt().mean()
        }
