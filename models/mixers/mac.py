"""Titans MAC: what the memory knows is context for attention."""

from itertools import pairwise

import torch
from torch import Tensor

from ...kernels import window_attention
from ..config import ModelConfig, TitansMAC
from ..layers import RMSNorm, rotary
from ..state import take_rows
from .attention import AttentionCore
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

    State: ``memory`` and ``conv`` (of the stream y), ``query`` (convolution of the stream x), ``segment`` (W_s),
    ``cache`` (keys and values of the segment so far), ``position`` int32 [N], tokens already in the segment.
    """

    def __init__(self, model: ModelConfig, mixer: TitansMAC) -> None:
        super().__init__()
        self.segment = mixer.segment
        self.attention = AttentionCore(model, mixer, None, mixer.persistent)
        self.memory = MemoryLayer(model, mixer.memory)
        self.norm_read = RMSNorm(model.dim, model.norm_eps)
        self.gate = MemoryGate(model)

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
        start = dict(zip(self.memory.weight_names, self.memory.start(), strict=True))
        held = state or {"memory": None, "conv": None, "segment": start, "cache": None, "query": None}
        core = self.attention
        q, gate, query = self.memory.query(x, held["query"], None, return_state)
        qkv = core.qkv(x).view(batch, length, -1, core.width)
        prefix = core.prefix()
        outputs = []
        borders = [0, *range(self.segment - place, length, self.segment), length]
        for begin, end in pairwise(borders):
            part, keep = slice(begin, end), return_state or end < length
            o, held = self._piece(
                q[:, part], gate[:, part], qkv[:, part], prefix, (place + begin) % self.segment, held, keep
            )
            outputs.append(o)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if not return_state:
            return y, None
        segment = {name: x if x.dim() == 4 else x.expand(batch, *x.shape) for name, x in held["segment"].items()}
        after = torch.full((batch,), (place + length) % self.segment, dtype=torch.int32, device=x.device)
        return y, held | {"segment": segment, "query": query, "position": after}

    def _piece(
        self,
        q: Tensor,
        gate: Tensor,
        qkv: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        place: int,
        held: LayerState,
        keep: bool,
    ) -> tuple[Tensor, LayerState]:
        """One segment, or the part of one that a call holds, from ``place`` on."""
        h = self.norm_read(self.memory.read(q, gate, list(held["segment"].values())))
        complete = place + q.shape[1] == self.segment
        y, cache = self._attend(h, qkv, prefix, place, held["cache"], keep and not complete)
        y = self.gate.norm_y(y)
        m, memory = self.memory(y, {"memory": held["memory"], "conv": held["conv"]}, None, keep)
        o = self.gate(y, m)
        if not keep or memory is None:
            return o, {}
        after = {"memory": memory["memory"], "conv": memory["conv"], "segment": held["segment"], "cache": cache}
        if complete:
            after["segment"] = {name: memory["memory"][name] for name in self.memory.weight_names}
            after["cache"] = self._empty_cache(y.shape[0], qkv.device, qkv.dtype)
        return o, after

    def _attend(
        self,
        h: Tensor,
        qkv: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        place: int,
        cache: LayerState | None,
        keep: bool,
    ) -> tuple[Tensor, LayerState | None]:
        """Attention of the tokens in qkv [B, n, (H + 2 Hkv), D] over [P ‖ h ‖ segment] → [B, n, H · D]."""
        core = self.attention
        batch, length, _, width = qkv.shape
        weight = core.qkv.weight[core.heads * width :]
        read = torch.nn.functional.linear(h, weight).view(batch, length, 2 * core.kv_heads, width)
        read_k, read_v = read.split(core.kv_heads, dim=2)
        qk, v = qkv.split([core.heads + core.kv_heads, core.kv_heads], dim=2)
        if core.rope:
            start = torch.full((1,), place, device=h.device)
            read_k = rotary(read_k, core.base, start)
            qk = rotary(qk, core.base, start + self.segment)
        q, k = qk.split([core.heads, core.kv_heads], dim=2)
        # No one asks for what the tokens h themselves attend to: their place in q is filled with the same queries.
        pairs = [torch.stack(pair, 2).flatten(1, 2) for pair in ((q, q), (read_k, k), (read_v, v))]
        held = cache if place else None
        y, after = window_attention(*pairs, window=None, prefix=prefix, state=held, return_state=keep)
        return y[:, 1::2].flatten(2), after

    def _empty_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        cache: LayerState = self.attention.init_state(batch, device, dtype)["cache"]
        return cache

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """W = W_s = W_0, an empty segment."""
        own = self.memory.init_state(batch, device, dtype)
        return {
            "memory": own["memory"],
            "conv": own["conv"],
            "query": self.memory.conv_state(batch, self.memory.dim, device, dtype),
            "segment": {name: own["memory"][name] for name in self.memory.weight_names},
            "cache": self._empty_cache(batch, device, dtype),
            "position": torch.zeros(batch, dtype=torch.int32, device=device),
        }

    @torch.no_grad()
    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """The memory's on y, the stream it is written with; see :meth:`MemoryLayer.diagnose`."""
        seen: list[Tensor] = []
        handle = self.gate.norm_y.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            self.forward(x, None, None, False)
        finally:
            handle.remove()
        return self.memory.diagnose(torch.cat(seen, 1))
