"""Mixture of memories: a router writes each token to a few of several memories, and reads from those."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import delta_rule, l2_norm, linear_attention, neural_memory, neural_memory_read, short_conv
from ...kernels.grouped_linear import grouped_linear
from ...kernels.neural_memory.state import fresh_state, halo_shapes
from ...kernels.routing import Routing, balance_loss, combine, dispatch, route, router_z_loss
from ..config import ModelConfig
from ..layers import Linear, RMSNorm, full_precision
from ..losses import add_loss
from ..mixer_config import Mixture
from .gates import MemoryGates
from .mixer import LayerState, Mixer
from .neural_memory import draw_start


class DecayGates(nn.Module):
    """β and log a of the linear memories from z, in float32.

        β = σ(z_β)          log a = −softplus(z_a + b) · r,  r learnt per head (Gated DeltaNet, Mamba-2)

    r starts between 1e-3 and 1e-1, softplus(b) at 1: memories halve in 7 to 700 of their own tokens.
    """

    def __init__(self, rule: str, heads: int) -> None:
        super().__init__()
        self.heads, self.writes, self.decays = heads, rule != "linear_attention", rule != "delta"
        if self.decays:
            self.retain_bias = nn.Parameter(torch.empty(heads))
            self.retain_log = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @property
    def outputs(self) -> int:
        """Channels of z."""
        return self.heads * (self.writes + self.decays)

    def reset_parameters(self) -> None:
        """See the class."""
        if self.decays:
            nn.init.constant_(self.retain_bias, math.log(math.e - 1))
            nn.init.uniform_(self.retain_log, math.log(1e-3), math.log(1e-1))

    def activate(self, z: Tensor) -> dict[str, Tensor]:
        """z [..., outputs] → β as ``beta`` and log a as ``log_decay`` [..., H], those of them that the rule has."""
        kind = torch.float64 if z.dtype == torch.float64 else torch.float32
        parts = list(z.to(kind).split(self.heads, dim=-1))
        gates = {"beta": torch.sigmoid(parts.pop(0))} if self.writes else {}
        if self.decays:
            rate = self.retain_log.to(kind).exp()
            gates["log_decay"] = F.softplus(parts.pop(0) + self.retain_bias.to(kind)) * -rate
        return gates

    def named(self, z: Tensor) -> dict[str, Tensor]:
        """β as ``write`` and a as ``retention``, of z [..., outputs]: [..., H] each, those that the rule has."""
        gates = self.activate(z)
        found = {"write": gates["beta"]} if self.writes else {}
        return found | ({"retention": gates["log_decay"].exp()} if self.decays else {})


@dataclass(frozen=True)
class _Sequences:
    """How the slots of a call meet the rows of the state, [N, M, ...].

    Each (row, memory) is a sequence of slots with borders in ``cu_seqlens``; or, where every row brings one token,
    each slot is a sequence of its own, of the state's row ``places[s]``, and the other memories are not touched.
    """

    rows: int
    memories: int
    cu_seqlens: Tensor | None
    places: Tensor | None

    @staticmethod
    def of(r: Routing, rows: int, one: bool) -> "_Sequences":
        """``one``: every row brings a single token, and has a state."""
        if not one:
            return _Sequences(rows, r.memories, r.cu_seqlens, None)
        row = torch.arange(rows, device=r.memory.device)[:, None]
        places = torch.empty_like(r.token).scatter(0, r.slot.flatten(), (row * r.memories + r.memory[:, 0]).flatten())
        return _Sequences(rows, r.memories, None, places)

    def lay(self, x: Tensor) -> Tensor:
        """Slots [1, S, ...] as the operations take them, and back."""
        return x if self.places is None else x.transpose(0, 1)

    def take(self, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """An operation's state."""
        if state is None:
            return None
        flat = {name: x.flatten(0, 1) for name, x in state.items()}
        return flat if self.places is None else {name: x[self.places] for name, x in flat.items()}

    def put(self, old: dict[str, Tensor] | None, new: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """The state of all memories after the call."""
        if new is None:
            return None
        if self.places is not None and old is not None:
            new = {name: x.flatten(0, 1).index_copy(0, self.places, new[name].to(x.dtype)) for name, x in old.items()}
        return {name: x.unflatten(0, (self.rows, self.memories)) for name, x in new.items()}


class MixtureOfMemories(Mixer):
    """M memories per head, of which each token writes and reads its k best, and one that all tokens do (MoM, Du et al.,
    2025).

        p = softmax(x W_r),  w = the k largest of p, divided by their sum (for k = 1, p itself)
        y = (RMSNorm(Σ_m w_m q W^m [+ q W^shared]) ⊙ silu(x W_g)) W_o

    Each memory sees its own tokens alone, in order, as one sequence: its short convolution, too, runs along them. q is
    projected once; k, v and the gates per memory (``projections: per_memory``, one grouped product) or once for all.
    The rule of a memory is gated_delta, delta, linear_attention (with decay) or neural, a Titans memory: then W_0 is
    learnt for each memory, and the norm inside of it shared.

    Losses: ``balance``, M Σ f_m p̄_m over the layer's tokens, and ``router_z``, the mean of logsumexp(logits)².
    State: ``memory`` and ``conv``, ``conv_kv``: those of the operations, with a dimension [M] after the rows.
    """

    def __init__(self, model: ModelConfig, mixer: Mixture) -> None:
        super().__init__()
        self.mixer, self.spec = mixer, None if mixer.memory is None else mixer.memory.spec
        self.dim, self.heads, self.width = model.dim, mixer.heads, model.dim // mixer.heads
        self.memories = mixer.memories + mixer.shared
        self.gates = (
            DecayGates(mixer.rule, mixer.heads)
            if mixer.memory is None
            else MemoryGates(model, mixer.memory, mixer.heads, project=False)
        )
        self.router = Linear(self.dim, mixer.memories, model.init_std)
        written = 2 * self.dim + self.gates.outputs
        alone = mixer.projections == "per_memory"
        self.gate_width = self.dim if mixer.output_gate == "silu" else 0
        self.proj = Linear(self.dim, self.gate_width + self.dim + (0 if alone else written), model.init_std)
        self.write_std = model.init_std
        self.write = nn.Parameter(torch.empty(self.memories, self.dim, written)) if alone else None
        self.conv = nn.Parameter(torch.empty(3 * self.dim, mixer.conv)) if mixer.conv else None
        self.norm, self.weights = None, nn.ParameterList()
        if self.spec is not None:
            shapes = self.spec.weight_shapes(self.heads, self.width, self.width)
            self.weights.extend(nn.Parameter(torch.empty(self.memories, *shape)) for shape in shapes)
            self.norm = nn.Parameter(torch.empty(self.heads, self.width)) if self.spec.norm else None
        self.out_norm = RMSNorm(self.width, model.norm_eps)
        self.out = Linear(self.dim, self.dim, model.residual_std)
        self.reset_parameters()

    @property
    def inner_chunk(self) -> int | None:
        """See :class:`Mixer`; None for linear memories, whose result no chunk changes."""
        return None if self.spec is None else self.spec.chunk_size

    def rechunk(self, size: int) -> None:
        """See :class:`Mixer`."""
        if self.spec is None:
            super().rechunk(size)
        else:
            self.spec = replace(self.spec, chunk_size=size)

    def reset_parameters(self) -> None:
        """Draw what is not drawn by a part: the memories' projections, W_0 and the convolution."""
        if self.write is not None:
            nn.init.normal_(self.write, std=self.write_std)
        if self.conv is not None:
            nn.init.uniform_(self.conv, -(self.conv.shape[1] ** -0.5), self.conv.shape[1] ** -0.5)
        if self.spec is not None:
            draw_start(list(self.weights), self.norm, self.spec)

    def route(self, x: Tensor, cu_seqlens: Tensor | None) -> Routing:
        """Which memories each token of x [B, T, dim] goes to; the router works in float32."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        with full_precision(x.device):
            logits = F.linear(x.to(kind), self.router.weight.to(kind))
            r = route(logits, self.mixer.top_k, shared=self.mixer.shared, cu_seqlens=cu_seqlens)
            if self.mixer.top_k == 1:  # divided by itself a lone weight is 1 and teaches the router nothing
                kept = r.probability.gather(-1, r.memory[..., :1])
                r = replace(r, weight=torch.cat([kept, r.weight[..., 1:]], -1))
            if self.training and self.mixer.balance_weight:
                add_loss("balance", balance_loss(r) * self.mixer.balance_weight)
            if self.training and self.mixer.router_z_weight:
                add_loss("router_z", router_z_loss(logits) * self.mixer.router_z_weight)
        return r

    def _convolve(
        self, x: Tensor, channels: slice, gather: bool, r: Routing, s: _Sequences, state: Any, return_state: bool
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """silu(conv(x)) in slots [1, S, ...] along each memory's own tokens; ``gather``: x is still in tokens."""
        if self.conv is None:
            return F.silu(dispatch(x, r) if gather else x), None
        options: dict[str, Any] = {"cu_seqlens": s.cu_seqlens, "return_state": return_state}
        if gather and s.places is None:
            options |= {"index": r.token, "inverse": r.slot}
        elif gather:
            x = dispatch(x, r)
        y, after = short_conv(s.lay(x), self.conv[channels], activation="silu", state=s.take(state), **options)
        return s.lay(y), s.put(state, after)

    def _inputs(
        self, x: Tensor, r: Routing, s: _Sequences, held: LayerState, return_state: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, LayerState]:
        """q, k, v [1, S, H, D] and the gates' z [1, S, ·] in slots, the output gate in tokens, and the new states."""
        gate, q, rest = self.proj(x).split(
            [self.gate_width, self.dim, self.proj.out_features - self.gate_width - self.dim], -1
        )
        states: LayerState = {}
        every, parts = slice(None), [2 * self.dim, self.gates.outputs]
        if self.write is None:
            kv, z = rest.split(parts, -1)
            z = dispatch(z, r)
            qkv, states["conv"] = self._convolve(
                torch.cat([q, kv], -1), every, True, r, s, held.get("conv"), return_state
            )
            q, kv = qkv.split([self.dim, 2 * self.dim], -1)
        else:
            kv, z = grouped_linear(x.to(q.dtype), self.write.to(q.dtype), r).split(parts, -1)
            mine, theirs = slice(0, self.dim), slice(self.dim, None)
            q, states["conv"] = self._convolve(q, mine, True, r, s, held.get("conv"), return_state)
            kv, states["conv_kv"] = self._convolve(kv, theirs, False, r, s, held.get("conv_kv"), return_state)
        k, v = kv.chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, self.width)) for y in (q, k, v))
        return l2_norm(q), l2_norm(k), v, z, gate, {name: y for name, y in states.items() if y is not None}

    def _rule(
        self, q: Tensor, k: Tensor, v: Tensor, z: Tensor, s: _Sequences, state: Any, return_state: bool
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """o [1, S, H, D] and the memories' new state."""
        run: Callable[..., tuple[Tensor, dict[str, Tensor] | None]]
        if self.spec is not None:
            run = partial(neural_memory, weights=[w[0] for w in self.weights], spec=self.spec, norm=self.norm)
        else:
            linear = linear_attention if self.mixer.rule == "linear_attention" else delta_rule
            run = partial(linear, chunk_size=self.mixer.chunk_size)
        inputs = (s.lay(y) for y in (q, k, v))
        gates = self.gates.activate(s.lay(z))
        o, after = run(*inputs, **gates, state=s.take(state), cu_seqlens=s.cu_seqlens, return_state=return_state)
        return s.lay(o), s.put(state, after)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`Mixer`."""
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        r = self.route(x, cu_seqlens)
        s = _Sequences.of(r, rows, state is not None and cu_seqlens is None and x.shape[1] == 1)
        held = state or {}
        q, k, v, z, gate, after = self._inputs(x, r, s, held, return_state)
        memory = held.get("memory")
        if memory is None and self.spec is not None:
            memory = self._fresh(rows)
        o, memory = self._rule(q, k, v, z, s, memory, return_state)
        o = combine(o, r)
        y = self.out(self.out_norm(o, gate.view(o.shape) if self.gate_width else None).flatten(2))
        return y, {"memory": memory, **after} if return_state else None

    def _fresh(self, rows: int) -> dict[str, Tensor]:
        """The state of neural memories before their first token: every memory at its own W_0."""
        assert self.spec is not None
        kind = torch.float64 if self.weights[0].dtype == torch.float64 else torch.float32
        state = fresh_state([w.to(kind) for w in self.weights], rows, self.spec)
        for name, shape in halo_shapes([w[0] for w in self.weights], self.spec).items():
            state[f"halo.{name}"] = self.weights[0].new_zeros(rows, self.memories, *shape, dtype=kind)
        return state | {"position": state["position"][:, None].repeat(1, self.memories)}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Nothing seen by any memory."""

        def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, self.memories, *shape, device=device, dtype=kind)

        if self.spec is not None:
            memory = self._fresh(batch)
        else:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            memory = {"memory": zeros(self.heads, self.width, self.width, kind=wide)}
        if self.conv is None:
            return {"memory": memory}
        past = self.conv.shape[1] - 1
        parts = {"conv": 3 * self.dim} if self.write is None else {"conv": self.dim, "conv_kv": 2 * self.dim}
        return {"memory": memory, **{name: {"x": zeros(past, width)} for name, width in parts.items()}}

    def idle_parameters(self) -> int:
        """See :class:`Mixer`."""
        own = list(self.weights) if self.write is None else [self.write, *self.weights]
        return sum(p.numel() for p in own) * (self.mixer.memories - self.mixer.top_k) // self.memories

    @torch.no_grad()
    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """Of the router on x [B, T, dim]: ``load.m``, the share of choices that memory m got; ``dead``, how many got
        less than a tenth of an equal share; ``entropy`` of a token's probabilities, in nats; ``balance``, the loss."""
        r = self.route(x, None)
        count = self.mixer.memories
        chosen = r.memory[..., : self.mixer.top_k].flatten()
        load = torch.zeros(count, device=x.device).scatter_add(0, chosen, torch.ones_like(chosen, dtype=torch.float32))
        load /= chosen.numel()
        entropy = torch.special.entr(r.probability).sum(-1).mean()
        numbers = {"entropy": entropy, "balance": balance_loss(r), "dead": (load < 0.1 / count).sum().float()}
        return numbers | {f"load.{m}": load[m] for m in range(count)}

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, Tensor]:
        """See :class:`Mixer`: ``memories`` [B, T, M], the weight with which a token goes to each, 0 where it does not;
        ``entropy`` of its probabilities, in nats; and the gates of the memories it goes to, a mean by weight."""
        r = self.route(x, None)
        chosen, weight = r.memory[..., : self.mixer.top_k], r.weight[..., : self.mixer.top_k]
        shares = torch.zeros_like(r.probability).scatter(-1, chosen, weight.to(r.probability.dtype))
        found = {"memories": shares, "entropy": torch.special.entr(r.probability).sum(-1)}
        z = self._inputs(x, r, _Sequences.of(r, x.shape[0], False), {}, False)[3]
        gates = {name: value.mean(-1)[0] for name, value in self.gates.named(z).items()}
        return found | {name: _in_tokens(value, r) for name, value in gates.items()}

    @torch.no_grad()
    def recall(self, x: Tensor, marks: Sequence[int]) -> Tensor:
        """See :class:`Mixer`: of each memory that a token is written to, weighted as the token reads them."""
        r = self.route(x, None)
        _, k, v, _, _, _ = self._inputs(x, r, _Sequences.of(r, x.shape[0], False), {}, False)
        memory = torch.empty_like(r.token).scatter(0, r.slot.flatten(), r.memory.flatten())
        found = []
        for mark in marks:
            state = self.forward(x[:, :mark])[1] if mark else self.init_state(1, x.device, x.dtype)
            assert state is not None
            o = torch.empty_like(v, dtype=torch.float32)
            for m in range(self.memories):
                mine = {name: y[0, m] for name, y in state["memory"].items()}
                o[:, memory == m] = self._answer(k[:, memory == m], mine).float()
            found.append(_in_tokens(F.cosine_similarity(o, v.float(), dim=-1).mean(-1)[0], r)[0])
        return torch.stack(found)

    def _answer(self, k: Tensor, state: dict[str, Tensor]) -> Tensor:
        """What one memory in a state [H, ...] returns for keys [1, S, H, D]."""
        if self.spec is None:
            return torch.einsum("bshd,hde->bshe", k.to(state["memory"].dtype), state["memory"])
        weights = [state[f"weights.{i}"] for i in range(self.spec.layers)]
        return neural_memory_read(k, weights=weights, spec=self.spec, norm=self.norm)


def _in_tokens(value: Tensor, r: Routing) -> Tensor:
    """Of numbers of slots [S], each token's [B, T]: a mean over its choices by weight."""
    return (value[r.slot] * r.weight).sum(-1) / r.weight.sum(-1)
