"""The past of a sequence in chunks: what queries read from, in training, prefill and decoding alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.chunk_attention import ChunkLayout, chunk_attention, select_chunks
from ...kernels.packing import document_of
from ..config import ModelConfig
from ..layers import token_positions
from ..mixer_config import ChunkMemory
from .mixer import LayerState
from .scorers import make_scorer

#: k and v of the ages in a chunk, made when they are needed.
Ages = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Read:
    """What a call reads: k, v [N, S, Hkv, D], summaries [N, Nc, Hs, E], which chunks there are, and what chooses among
    them, [B, T, Hs, E]."""

    k: Tensor
    v: Tensor
    summary: Tensor
    layout: ChunkLayout
    choosing: Tensor


class ChunkStore(nn.Module):
    """Keys and values of all tokens, cut into chunks of C from each sequence's beginning, and a summary of each chunk
    that is complete.

    A token reads the chunks that end before the chunk of its run's first token begins, where runs are ``share`` tokens
    long, by :func:`palimpsest.kernels.chunk_attention`. What a chunk's summary is depends on its own tokens alone, so
    it is made once, by the call that completes the chunk.

    Args:
        model: gives init_std.
        mixer: gives chunk_size, top_k, share, branching and the scorer.
        read: "two_level" or "union".
        kv: heads of k and v, and their width.
        choosing: heads that choose, and their width.

    State, of N rows that have S slots: ``k``, ``v`` [N, S, Hkv, D], token t in slot t; ``summary`` [N, S // C, Hs, E];
    ``keys`` [N, C − 1, Hs, E], what the tokens of the unfinished chunk are found by, and ``queries`` like it where the
    scorer asks for them; ``leader`` [N, Hs, E], what chooses for the rest of an unfinished run, where share > 1;
    ``position`` int32 [N], tokens so far. Slots that no token has reached are 0.
    """

    def __init__(
        self,
        model: ModelConfig,
        mixer: ChunkMemory,
        read: Literal["two_level", "union"],
        kv: tuple[int, int],
        choosing: tuple[int, int],
    ) -> None:
        super().__init__()
        self.chunk_size, self.top_k, self.share = mixer.chunk_size, mixer.top_k, mixer.share
        self.branching, self.read = mixer.branching, read
        self.kv, self.choosing = kv, choosing
        self.scorer = make_scorer(model, mixer.scorer, *choosing)
        asked, led = ["queries"] * self.scorer.asks, ["leader"] * (mixer.share > 1)
        self.names = ["k", "v", "summary", "keys", *asked, *led, "position"]  # of the state

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        choosing: Tensor,
        keys: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
        ages: Ages | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Add tokens, and read at each.

        Args:
            q: [B, T, H, D].
            k, v: [B, T, Hkv, D].
            choosing: [B, T, Hs, E], what each token looks for among the chunks.
            keys: like choosing, what its chunk is found by.
            state, cu_seqlens, return_state: as of a mixer.
            ages: of a store that cuts chunks itself; others know a token's age when it comes.

        Returns: o [B, T, H, D], 0 where there is nothing to read yet, and the state.
        """
        found, after = self.look(k, v, choosing, keys, state, cu_seqlens, return_state, ages)
        selection = None
        if self.branching is not None or found.choosing is not choosing:
            selection = self.select(found)
        o = chunk_attention(
            q,
            found.k,
            found.v,
            choosing,
            found.summary,
            top_k=self.top_k,
            layout=found.layout,
            read=self.read,
            selection=selection,
        )
        assert isinstance(o, Tensor)  # and no selection, which was not asked for
        return o, after

    def select(self, found: Read) -> Tensor:
        """Chosen chunks int32 [B, T, Hs, K] of every token, −1 where there are fewer."""
        return select_chunks(found.choosing, found.summary, found.layout, self.top_k, branching=self.branching)

    @torch.no_grad()
    def shares(self, k: Tensor, v: Tensor, choosing: Tensor, keys: Tensor) -> Tensor:
        """How much each chunk counts for each token of rows from their beginning: [B, T, Nc], a mean over Hs.

        Two-level: the chunk's weight; union: one over the number of chunks chosen. Zeros where there is none.
        """
        found, _ = self.look(k, v, choosing, keys, None, None, False)
        chosen, chunks = self.select(found), found.summary.shape[1]
        chosen = torch.where(
            chosen < 0, -1, chosen - chunks * torch.arange(len(k), device=k.device)[:, None, None, None]
        )
        weight = self.weights(choosing, found.summary, chosen)
        return weight.new_zeros(*weight.shape[:3], chunks).scatter_add(-1, chosen.clamp(min=0), weight).mean(2)

    def weights(self, choosing: Tensor, summary: Tensor, chosen: Tensor) -> Tensor:
        """How much each chosen chunk counts, [N, T, Hs, K]: for choosing [N, T, Hs, E], summaries [N, Nc, Hs, E] and
        numbers of chunks [N, T, Hs, K], −1 where there is none."""
        score = torch.einsum("bthe,bche->bthc", choosing, summary) * choosing.shape[-1] ** -0.5
        score = score.gather(-1, chosen.long().clamp(min=0)) * (self.read == "two_level")
        return score.masked_fill(chosen < 0, -torch.inf).softmax(-1).nan_to_num(0.0)

    def numbers(self, shares: Tensor) -> dict[str, Tensor]:
        """Of the weights of chunks, shares [B, T, Nc]: their ``entropy`` in nats, and the ``distance`` from a token to
        the middle of the chunks, in tokens, by weight; both [B, T], 0 where there is no chunk."""
        size, device = self.chunk_size, shares.device
        middle = torch.arange(shares.shape[2], device=device) * size + (size - 1) / 2
        back = torch.arange(shares.shape[1], device=device)[:, None] - middle
        return {"entropy": torch.special.entr(shares).sum(-1), "distance": (shares * back).sum(-1)}

    def look(
        self,
        k: Tensor,
        v: Tensor,
        choosing: Tensor,
        keys: Tensor,
        state: LayerState | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
        ages: Ages | None = None,
    ) -> tuple[Read, LayerState | None]:
        """What :meth:`forward` is to read, and the state after the tokens."""
        if state is None and cu_seqlens is None:
            return self._rows(k, v, choosing, keys, return_state)
        if state is None and cu_seqlens is not None and not return_state:
            return self._documents(k, v, choosing, keys, cu_seqlens), None
        rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        held = self.init_state(rows, k.device, k.dtype) if state is None else state
        return self._continued(k, v, choosing, keys, held, cu_seqlens)

    def _rows(
        self, k: Tensor, v: Tensor, choosing: Tensor, keys: Tensor, return_state: bool
    ) -> tuple[Read, LayerState | None]:
        """Rows from their beginning: the memory is the tokens themselves."""
        size, (batch, length) = self.chunk_size, k.shape[:2]
        whole, left = divmod(length, size)
        pieces = [x[:, : whole * size].unflatten(1, (whole, size)) for x in (keys, choosing)]
        summary = self.scorer(*pieces)
        layout = ChunkLayout.regular(batch, length, size, self.share, k.device)
        found = Read(k, v, lengthened(summary, left > 0), layout, choosing)
        if not return_state:
            return found, None
        state = {"k": k, "v": v, "summary": summary, "keys": lengthened(keys[:, whole * size :], size - 1 - left)}
        if self.scorer.asks:
            state["queries"] = lengthened(choosing[:, whole * size :], size - 1 - left)
        if self.share > 1:
            run = length // self.share * self.share
            state["leader"] = choosing[:, run] if run < length else torch.zeros_like(choosing[:, 0])
        return found, state | {"position": torch.full((batch,), length, dtype=torch.int32, device=k.device)}

    def _documents(self, k: Tensor, v: Tensor, choosing: Tensor, keys: Tensor, cu_seqlens: Tensor) -> Read:
        """Packed documents from their beginnings, of which nothing is kept."""
        layout = ChunkLayout.packed(cu_seqlens, k.shape[1], self.chunk_size, self.share)
        count = layout.end - layout.start
        pieces = [laid(x.flatten(0, 1), layout.start, count, self.chunk_size) for x in (keys, choosing)]
        return Read(k, v, self.scorer(*pieces, count)[None], layout, choosing)

    def _continued(
        self, k: Tensor, v: Tensor, choosing: Tensor, keys: Tensor, held: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Read, LayerState]:
        """Rows or documents that go on from where a state stands, each from its own place."""
        size, length, start = self.chunk_size, k.shape[1], held["position"]
        row = torch.arange(start.shape[0], device=k.device)
        begin, count = (row * length, torch.full_like(start, length))
        if cu_seqlens is not None:
            begin, count = cu_seqlens[:-1].long(), cu_seqlens.diff()
        position = token_positions(length, start, cu_seqlens, k.device)
        owner = row[:, None] if cu_seqlens is None else document_of(cu_seqlens, length)[None]
        slots = held["k"].shape[1] + length
        layout = ChunkLayout.cached(start, length, slots, size, self.share, cu_seqlens)
        after = {name: written(held[name], x, owner, position) for name, x in (("k", k), ("v", v))}

        place = position - (start - start % size)[owner]
        filled = start % size + count
        done = filled // size
        pieces = []
        for name, x in (("keys", keys), ("queries", choosing)):
            if name == "keys" or self.scorer.asks:
                joined = written(held[name], x, owner, place)
                over = row * joined.shape[1] + done * size
                after[name] = laid(joined.flatten(0, 1), over, filled - done * size, size - 1)
                whole = joined.shape[1] // size
                pieces.append(joined[:, : whole * size].unflatten(1, (whole, size)))
        fresh = self.scorer(pieces[0], pieces[-1])
        after["summary"] = laid(
            fresh.flatten(0, 1), row * fresh.shape[1], done, slots // size, start // size, held["summary"]
        )
        summary = lengthened(after["summary"], slots % size > 0)
        if self.share > 1:
            leader = held["leader"][owner].to(choosing.dtype)
            begun = position - position % self.share < start[owner]
            run = (start + count) // self.share * self.share
            known = (run < start).to(run.dtype)
            after["leader"] = laid(
                choosing.flatten(0, 1), begin + run - start, start + count - run, 1, known, held["leader"][:, None]
            )[:, 0]
            choosing = torch.where(begun[..., None, None], leader, choosing)
        after["position"] = start + count.to(start.dtype)
        return Read(after["k"], after["v"], summary, layout, choosing), {name: after[name] for name in self.names}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Nothing seen, no slots."""

        def empty(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        state = {"k": empty(0, *self.kv), "v": empty(0, *self.kv), "summary": empty(0, *self.choosing)}
        state["keys"] = empty(self.chunk_size - 1, *self.choosing)
        if self.scorer.asks:
            state["queries"] = empty(self.chunk_size - 1, *self.choosing)
        if self.share > 1:
            state["leader"] = empty(*self.choosing)
        return state | {"position": torch.zeros(batch, dtype=torch.int32, device=device)}


def laid(
    x: Tensor, begin: Tensor, count: Tensor, size: int, start: Tensor | None = None, cache: Tensor | None = None
) -> Tensor:
    """Rows [N, size, ...] of which row n has the first start[n] entries of cache[n], then x[begin[n]] and those that
    follow it, count[n] in all, then zeros.

    Args:
        x: [P, ...].
        begin, count: integers [N].
        size: entries of a row; the last ones are cut off.
        start: integers [N]; None: 0.
        cache: [N, S, ...], S at least every start; None: nothing.
    """
    slot = torch.arange(size, device=x.device)
    pool = [x.new_zeros(1, *x.shape[1:]), x]
    fresh = slot if start is None else slot - start[:, None]
    index = torch.where((fresh >= 0) & (fresh < count[:, None]), 1 + begin[:, None] + fresh, 0)
    if cache is not None and start is not None:
        pool.append(cache.flatten(0, 1).to(x.dtype))
        row = torch.arange(cache.shape[0], device=x.device)[:, None]
        index = torch.where(fresh < 0, 1 + x.shape[0] + row * cache.shape[1] + slot, index)
    return torch.cat(pool)[index]


def written(cache: Tensor, x: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    """A copy of cache [N, S, ...] with T more slots, x[b, t] in row row[b, t] and slot slot[b, t] (or both [B, 1] or
    [1, T])."""
    grown = torch.cat([cache.to(x.dtype), x.new_zeros(cache.shape[0], x.shape[1], *x.shape[2:])], 1)
    size = grown.shape[1]
    target = (row * size + slot).flatten().long()
    return grown.flatten(0, 1).index_copy(0, target, x.flatten(0, 1)).unflatten(0, (cache.shape[0], size))


def lengthened(x: Tensor, more: int) -> Tensor:
    """x [N, S, ...] with ``more`` zeros behind its S."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, int(more))) if more else x
