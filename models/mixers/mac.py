"""Titans MAC: what the memory knows is context for attention."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import window_attention
from ...kernels.check import compute_dtype
from ..config import ModelConfig
from ..layers import RMSNorm, rotary, rotary_angles
from ..mixer_config import TitansMAC
from ..state import take_rows
from .attention import AttentionCore, cache_as
from .gate import MemoryGate
from .mixer import LayerState, Mixer
from .neural_memory import MemoryLayer


class MemoryAsContext(Mixer):
    """Segments of C_s tokens x; W_s the memory's weights where the segment begins (Titans, eqs. 21-25):

        h_t = norm(M(q(x_t); W_s))                                  read only
        y_t = attention of x_t over [P ‖ h_1 … h_t ‖ x_1 … x_t]      P the persistent tokens
        m_t = M(q(y_t); W_t)                                        W_t: W_s after the writes of y_1 … y_t
        o_t = (norm(y_t) ⊙ σ(norm(m_t))) W_o

    Two departures, both so that no token sees a later one. In the paper every token of a segment attends to all of h,
    which is made of queries of later tokens too: here only to h_1 … h_t. And its m reads the memory after the whole
    segment is written: here after token t (with ``read_after_write``, else before it). What is written is the
    segment's own y, which the paper leaves open; so are the norms of h and of the y that the memory takes.

    Positions for the rotation: h_t at t, x_t at C_s + t. The attention runs over the interleaved sequence
    h_1, x_1, h_2, x_2, …, whose plain causal mask is exactly the set above.

    Segments follow one another, so a forward is a loop over them, each over all rows. Rows that stand at different
    places in their segment (after a reset), and packed documents, are run in groups of equal place and length; both
    are read on the host.

    State: ``memory``, the memory layer's on the stream y; ``query``, the convolution's on the stream x, where there is
    one; ``segment``, W_s; ``cache``, keys and values of the segment so far; ``position`` int32 [N], tokens already in
    the segment.
    """

    def __init__(self, model: ModelConfig, mixer: TitansMAC) -> None:
        super().__init__()
        self.segment = mixer.segment
        self.attention = AttentionCore(model, mixer, None, mixer.persistent)
        self.memory = MemoryLayer(model, mixer.memory)
        self.norm_read = RMSNorm(model.dim, model.norm_eps)
        self.gate = MemoryGate(model, mixer.gate)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`Mixer`."""
        batch, length, dim = x.shape
        if cu_seqlens is None:
            starts, lengths = [row * length for row in range(batch)], [length] * batch
        else:
            borders = cu_seqlens.tolist()
            starts, lengths = borders[:-1], [end - start for start, end in pairwise(borders)]
        places = [0] * len(starts) if state is None else state["position"].tolist()
        if cu_seqlens is None and len(set(places)) <= 1:
            return self._run(x, places[0] if places else 0, state, return_state)
        groups: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(places, lengths, strict=True)):
            groups.setdefault(key, []).append(row)
        flat = x.reshape(batch * length, dim)
        where, pieces, parts = [], [], []
        for (place, size), rows in groups.items():
            first = torch.tensor([starts[row] for row in rows], device=x.device)
            index = (first[:, None] + torch.arange(size, device=x.device)).flatten()
            own = None if state is None else take_rows([state], rows)
            piece, after = self._run(flat[index].view(len(rows), size, dim), place, own, return_state)
            where.append(index)
            pieces.append(piece.reshape(-1, dim))
            parts.append(after)
        y = torch.cat(pieces)[torch.cat(where).argsort()].view(batch, length, dim)
        if not return_state:
            return y, None
        order = [row for rows in groups.values() for row in rows]
        return y, take_rows([part for part in parts if part], [order.index(row) for row in range(len(order))])

    def _run(
        self, x: Tensor, place: int, state: LayerState | None, return_state: bool
    ) -> tuple[Tensor, LayerState | None]:
        """All rows of x [B, T, dim] stand ``place`` tokens into their segment."""
        batch, length, _ = x.shape
        if not length:
            return torch.zeros_like(x), state or self.init_state(batch, x.device, x.dtype)
        held = state or {"memory": None, "segment": self.memory.start_weights(), "cache": None}
        streams, query = self._streams(x, place, held.get("query"), return_state)
        prefix = self.attention.prefix()
        outputs = []
        borders = [0, *range(self.segment - place, length, self.segment), length]
        for begin, end in pairwise(borders):
            part = [stream[:, begin:end] for stream in streams]
            o, held = self._piece(part, prefix, (place + begin) % self.segment, held, return_state or end < length)
            outputs.append(o)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if not return_state:
            return y, None
        segment = {name: w.expand(batch, *w.shape[1:]) for name, w in held["segment"].items()}
        after = torch.full((batch,), (place + length) % self.segment, dtype=torch.int32, device=x.device)
        return y, held | {"segment": segment, "position": after} | ({"query": query} if query else {})

    def _streams(
        self, x: Tensor, place: int, state: LayerState | None, return_state: bool
    ) -> tuple[list[Tensor], LayerState | None]:
        """All that depends on x alone, time second: the memory's query and its gate; q, k, v of the attention, rotated;
        and with rotary embedding cos and sin for h."""
        batch, length, _ = x.shape
        core = self.attention
        query, gate, state = self.memory.query(x, state, None, return_state)
        qkv = core.qkv(x).view(batch, length, -1, core.width)
        qk, v = qkv.split([core.heads + core.kv_heads, core.kv_heads], dim=2)
        table: tuple[Tensor, ...] = ()
        if core.rope:
            number = (torch.arange(length, device=x.device) + place)[None] % self.segment
            table = rotary_angles(number, core.width, core.base, compute_dtype(x))
            qk = rotary(qk, rotary_angles(number + self.segment, core.width, core.base, compute_dtype(x)))
        q, k = qk.split([core.heads, core.kv_heads], dim=2)
        return [query, gate, q, k, v, *table], state

    def _piece(
        self, part: list[Tensor], prefix: tuple[Tensor, Tensor] | None, place: int, held: LayerState, keep: bool
    ) -> tuple[Tensor, LayerState]:
        """One segment, or the part of one that a call holds, from ``place`` on."""
        query, gate, q, k, v, *table = part
        h = self.norm_read(self.memory.read(query, gate, [held["segment"][name] for name in self.memory.weight_names]))
        complete = place + q.shape[1] == self.segment
        read_k, read_v = self._keys_of_reads(h, table)
        # No one asks for what the tokens h themselves attend to: their place in q is filled with the same queries.
        pairs = [torch.stack(pair, 2).flatten(1, 2) for pair in ((q, q), (read_k, k), (read_v, v))]
        past = cache_as(held["cache"], k.dtype) if place else None
        y, cache = window_attention(*pairs, prefix=prefix, state=past, return_state=keep and not complete)
        y = self.gate.norm_y(y[:, 1::2].flatten(2))
        m, memory = self.memory(y, held["memory"], None, keep)
        o = self.gate(y, m)
        if memory is None:
            return o, {}
        if complete:
            running = {name: memory["memory"][name] for name in self.memory.weight_names}
            return o, {"memory": memory, "segment": running, "cache": self._empty_cache(k)}
        return o, {"memory": memory, "segment": held["segment"], "cache": cache}

    def _keys_of_reads(self, h: Tensor, table: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, n, Hkv, D] of h [B, n, dim], by the attention's own projections."""
        core = self.attention
        kv = F.linear(h, core.qkv.weight[core.heads * core.width :]).unflatten(-1, (2 * core.kv_heads, core.width))
        k, v = kv.split(core.kv_heads, dim=2)
        return (rotary(k, (table[0], table[1])) if table else k), v

    def _empty_cache(self, like: Tensor) -> LayerState:
        """No keys and values yet, for the rows of ``like`` [B, ...]."""
        cache: LayerState = self.attention.init_state(like.shape[0], like.device, like.dtype)["cache"]
        return cache

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """W = W_s = W_0, an empty segment."""
        memory = self.memory.init_state(batch, device, dtype)
        query = self.memory.conv_state(self.memory.dim, batch, device, dtype)
        state = {
            "memory": memory,
            "segment": {name: memory["memory"][name] for name in self.memory.weight_names},
            "cache": self.attention.init_state(batch, device, dtype)["cache"],
            "position": torch.zeros(batch, dtype=torch.int32, device=device),
        }
        return state | ({"query": query} if query else {})

    @torch.no_grad()
    def _written(self, x: Tensor) -> Tensor:
        """y, the stream that the memory is written with."""
        seen: list[Tensor] = []
        handle = self.gate.norm_y.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            self.forward(x, None, None, False)
        finally:
            handle.remove()
        return torch.cat(seen, 1)

    @torch.no_grad()
    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """The memory's on y, the stream it is written with; see :meth:`MemoryLayer.diagnose`."""
        return self.memory.diagnose(self._written(x))

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, Tensor]:
        """The memory's on y; see :meth:`MemoryLayer.observe`."""
        return self.memory.observe(self._written(x))

    @torch.no_grad()
    def recall(self, x: Tensor, marks: Sequence[int]) -> Tensor:
        """The memory's on y; see :meth:`MemoryLayer.recall`."""
        return self.memory.recall(self._written(x), marks)
