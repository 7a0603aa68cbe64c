"""The neural memory layer (Titans LMM), and what MAC, MAG and MAL share with it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import l2_norm, neural_memory, neural_memory_read, neural_memory_state, short_conv
from ...kernels.neural_memory.spec import MemorySpec
from ..config import ModelConfig
from ..layers import Linear, RMSNorm, full_precision
from ..mixer_config import MemoryConfig, MemoryRule
from .mixer import LayerState, Mixer


class MemoryGates(nn.Module):
    """Step θ, retention a and momentum η of every token and head, from one projection z = x W + b, in float32.

        log a = −softplus(z_a) · r,  r learnt per head     the form of Mamba-2 and Gated DeltaNet
        log η = logsigmoid(z_η)
        θ     = step_max · sigmoid(z_θ) · (1 − η) / (C n)   C the chunk's length, n the number of matrices

    All gradients of a chunk are taken at the weights it began with, so what one chunk may move the memory is
    Σ θ / (1 − η) over its C tokens; written as above, n of these are at most ``step_max`` at every C and η, and 1 at
    the start. With W_0 drawn as in :class:`MemoryLayer` the inner loss has a curvature of order 1 for each of the n
    matrices; gradient descent is stable up to 2 over the curvature, hence the default ``step_max`` of 2.

    r starts between 1e-4 and 1e-3, so that memories halve in 700 to 7,000 tokens, and η at 0.9. The decays that linear
    memories start with, up to 0.1, ruin a deep one. Without a LayerNorm its matrices all shrink together, and zero is
    a place that no gradient leads out of. With one, the output keeps its size while the weights shrink, so that the
    gradient grows as their inverse, without bound along a sequence of several 1 / r.
    """

    def __init__(self, model: ModelConfig, memory: MemoryRule, heads: int, project: bool = True) -> None:
        super().__init__()
        self.memory, self.heads = memory, heads
        self.scale = memory.step_max / (memory.chunk_size * memory.spec.layers)
        self.decays, self.moves = memory.retention == "l2", memory.rule == "momentum"
        self.proj = Linear(model.dim, self.outputs, model.init_std) if project else None  # else somebody gives z
        self.step_bias = nn.Parameter(torch.empty(heads))
        if self.decays:
            self.retain_bias = nn.Parameter(torch.empty(heads))
            self.retain_log = nn.Parameter(torch.empty(heads))
        if self.moves:
            self.momentum_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @property
    def outputs(self) -> int:
        """Channels of z."""
        return self.heads * (1 + self.decays + self.moves)

    def reset_parameters(self) -> None:
        """n Σ θ / (1 − η) = min(1, step_max / 2) over a chunk; softplus(b_a) = 1; r log-uniform; η = 0.9."""
        start = min(1 / self.memory.step_max, 0.5)
        nn.init.constant_(self.step_bias, math.log(start / (1 - start)))
        if self.decays:
            nn.init.constant_(self.retain_bias, math.log(math.e - 1))
            nn.init.uniform_(self.retain_log, math.log(1e-4), math.log(1e-3))
        if self.moves:
            nn.init.constant_(self.momentum_bias, math.log(9.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, T, dim] → θ, log a, log η, each [B, T, H] in float32 (float64 for float64 x); None where unused."""
        assert self.proj is not None
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        with full_precision(x.device):
            return self.activate(F.linear(x.to(kind), self.proj.weight.to(kind)))

    def activate(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same from z [B, T, ``outputs``], b not yet added."""
        kind = torch.float64 if z.dtype == torch.float64 else torch.float32
        parts = list(z.to(kind).split(self.heads, dim=-1))
        step = torch.sigmoid(parts.pop(0) + self.step_bias.to(kind)) * self.scale
        log_retain = log_momentum = None
        if self.decays:
            log_retain = F.softplus(parts.pop(0) + self.retain_bias.to(kind)) * -self.retain_log.to(kind).exp()
        if self.moves:
            moved = parts.pop(0) + self.momentum_bias.to(kind)
            log_momentum = F.logsigmoid(moved)
            step = step * torch.sigmoid(-moved)
        return step, log_retain, log_momentum

    def named(self, z: Tensor) -> dict[str, Tensor]:
        """θ as ``step``, a as ``retention`` and η as ``momentum``, of z [..., outputs]: [..., H] each, where used."""
        step, log_retain, log_momentum = self.activate(z)
        decays = {"retention": log_retain, "momentum": log_momentum}
        return {"step": step} | {name: y.exp() for name, y in decays.items() if y is not None}


def draw_start(weights: Sequence[Tensor], norm: Tensor | None, spec: MemorySpec) -> None:
    """Draw W_0 ([..., in, out] of each layer) in place, and set the memory's norm to 1.

    Entries are N(0, 1) where the memory ends in a LayerNorm, which makes their size the inverse of the inner learning
    rate (the loss is then of curvature 1 per matrix for unit keys); without one N(0, 4 / width of the hidden layer),
    and N(0, 1 / D) for a linear memory.
    """
    width, hidden = weights[0].shape[-2:]
    std = 1.0 if norm is not None else (width if spec.layers == 1 else hidden / 4) ** -0.5
    for weight in weights:
        nn.init.normal_(weight, std=std)
    if norm is not None:
        nn.init.ones_(norm)


class MemoryLayer(Mixer):
    """A neural memory per head and the layer around it (Titans, section 4.4).

        q, k, v = silu(conv(x W_q, x W_k, x W_v)),  q and k divided by their ℓ2 norm
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
        shapes = self.spec.weight_shapes(self.heads, self.width, self.width)
        self.weight_names = [f"weights.{i}" for i in range(len(shapes))]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(*shape)) for shape in shapes)
        self.norm = nn.Parameter(torch.empty(self.heads, self.width)) if self.spec.norm else None
        self.out_norm = RMSNorm(self.width, model.norm_eps)
        self.out = Linear(self.dim, self.dim, model.residual_std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolution (uniform in ±1/√width, as torch's own) and W_0."""
        if self.conv is not None:
            nn.init.uniform_(self.conv, -(self.conv.shape[1] ** -0.5), self.conv.shape[1] ** -0.5)
        draw_start(self.start(), self.norm, self.spec)

    def start(self) -> list[Tensor]:
        """W_0, each [H, in, out]."""
        return list(self.weights)

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
        return l2_norm(q.unflatten(-1, (self.heads, self.width))), gate, state

    def read(self, q: Tensor, gate: Tensor, weights: list[Tensor]) -> Tensor:
        """What the memory with ``weights`` ([H, in, out], or one per row) answers to :meth:`query`, writing nothing."""
        return self._finish(neural_memory_read(q, weights=weights, spec=self.spec, norm=self.norm), gate)

    def _write_inputs(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, LayerState | None]:
        gate, qkv = self.proj(x).split([self.gate_width, 3 * self.dim], dim=-1)
        qkv, state = self._convolve(qkv, state, cu_seqlens, return_state)
        qk, v = qkv.unflatten(-1, (3 * self.heads, self.width)).split([2 * self.heads, self.heads], dim=2)
        q, k = l2_norm(qk).split(self.heads, dim=2)
        return q, k, v, gate, state

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
        o, memory = neural_memory(
            q,
            k,
            v,
            *self.gates(x),
            weights=self.start(),
            spec=self.spec,
            norm=self.norm,
            state=held.get("memory"),
            cu_seqlens=cu_seqlens,
            return_state=return_state,
        )
        y = self._finish(o, gate)
        if not return_state:
            return y, None
        return y, {"memory": memory} | ({"conv": conv} if conv else {})

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
        step, log_retain, log_momentum = self.gates(x)
        found = {}
        effective = step
        if log_retain is not None:
            found["retention"] = log_retain.exp()
        if log_momentum is not None:
            found["momentum"] = log_momentum.exp()
            effective = step / -torch.expm1(log_momentum)
        found["step"] = effective * self.spec.chunk_size
        for name, after in (("loss_before", False), ("loss_after", True)):
            o, state = neural_memory(
                k,
                k,
                v,
                step,
                log_retain,
                log_momentum,
                weights=self.start(),
                spec=replace(self.spec, read_after_write=after),
                norm=self.norm,
                return_state=True,
            )
            o, target = o.to(step.dtype), v.to(step.dtype)
            loss = 0.5 * (o - target).square() if self.spec.bias == "l2" else -o * target
            found[name] = loss.sum(-1)
        assert state is not None
        return found, state

    @torch.no_grad()
    def recall(self, x: Tensor, marks: Sequence[int]) -> Tensor:
        """See :class:`Mixer`: cos(M(k_t; W_n), v_t)."""
        _, k, v, _, _ = self._write_inputs(x, None, None, False)
        written: tuple[Any, ...] = (k, k, v, *self.gates(x))
        weights: list[Tensor] | LayerState = self.start()
        state, done, found = None, 0, []
        for mark in marks:
            if mark > done:
                part: list[Any] = [None if y is None else y[:, done:mark] for y in written]
                options = {"weights": self.start(), "spec": self.spec, "norm": self.norm, "state": state}
                _, state = neural_memory(*part, **options, return_state=True)  # type: ignore[arg-type]
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
