"""The past of a sequence in chunks that are cut where the sequence surprises: a :class:`ChunkStore` of such."""

from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from ...kernels.chunk_attention import ChunkLayout
from ..borders import Chunk, Cutter, surprise
from ..config import ModelConfig
from ..mixer_config import ChunkMemory, Cut
from ..state import take_rows
from .chunk_store import Ages, ChunkStore, Read, laid, lengthened, written
from .mixer import LayerState


class CutStore(ChunkStore):
    """A :class:`ChunkStore` whose chunks end where :class:`palimpsest.models.borders.Cutter` has them end, by −log p of
    the keys that chunks are found by.

    A chunk is read from the token on at which it closed, and is a function of the tokens up to that one: a token never
    reads what a later one decided. Between the last chunk that a token can read and the token itself lie at most
    ``chunk_size`` tokens, for the window, or in a union for the token to read.

    Which tokens make a chunk is decided on the host; packed documents are run one by one.

    State: as of :class:`ChunkStore`, with M = S // least chunks a row: ``k``, ``v``, ``summary``; ``keys`` and
    ``queries`` [N, chunk_size, Hs, E] of the chunk under way; int32 [N, M] ``end``, after a chunk's last token, and
    ``closed``, the token at which it closed, 0 where there is no chunk yet; ``before`` [N, window, Hs E] and
    ``surprise`` [N, window] of the last tokens, the newest last; ``position``.
    """

    def __init__(
        self,
        model: ModelConfig,
        mixer: ChunkMemory,
        read: Literal["two_level", "union"],
        kv: tuple[int, int],
        choosing: tuple[int, int],
        cut: Cut,
    ) -> None:
        super().__init__(model, mixer, read, kv, choosing)
        self.cutter = Cutter(cut.gamma, cut.window, cut.least, mixer.chunk_size)
        self.names = [*self.names[:-1], "end", "closed", "before", "surprise", "position"]

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Nothing seen, no slots."""
        state = super().init_state(batch, device, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        heads, width = self.choosing
        for name in ("keys", "queries")[: 1 + self.scorer.asks]:
            state[name] = torch.zeros(batch, self.chunk_size, heads, width, device=device, dtype=dtype)
        state["before"] = torch.zeros(batch, self.cutter.window, heads * width, device=device, dtype=dtype)
        state["surprise"] = torch.zeros(batch, self.cutter.window, device=device, dtype=wide)
        for name in ("end", "closed"):
            state[name] = torch.zeros(batch, 0, device=device, dtype=torch.int32)
        return {name: state[name] for name in self.names}

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
        """See :class:`ChunkStore`; ``ages()``, two tensors [chunk_size, Hkv, D], are added to k and v of the tokens of
        a chunk when it closes, the last rows to its newest."""
        streams = (k, v, choosing, keys)
        rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        held = self.init_state(rows, k.device, k.dtype) if state is None else state
        if cu_seqlens is None:
            seen, after = self._run(streams, held, ages)
            return seen, after if return_state else None
        found, states = [], []
        for n, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            own = take_rows([held], [n])
            if begin < end:
                part, own = self._run(tuple(x[:, begin:end] for x in streams), own, ages)
                found.append(part)
            states.append(own)
        return _joined(found), self._together(states, held["k"].shape[1] + k.shape[1]) if return_state else None

    def _run(self, streams: tuple[Tensor, ...], held: LayerState, ages: Ages | None) -> tuple[Read, LayerState]:
        """Rows that go on from a state, each from its own place."""
        k, v, choosing, keys = streams
        (rows, length), start, device = k.shape[:2], held["position"], k.device
        row = torch.arange(rows, device=device)[:, None]
        position = start[:, None] + torch.arange(length, device=device, dtype=start.dtype)
        news = surprise(keys.flatten(2), held["before"], position)
        opened = held["end"].amax(1, keepdim=True) if held["end"].shape[1] else torch.zeros_like(start)[:, None]
        joined = {
            name: written(held[name], x, row, position - opened)
            for name, x in (("keys", keys), ("queries", choosing))
            if name in held
        }
        chunks = self._cut(news, joined["keys"], held, opened)
        slots = held["k"].shape[1] + length
        after = {name: written(held[name], x, row, position) for name, x in (("k", k), ("v", v))}
        after |= self._closed(chunks, held, joined, opened, slots // self.cutter.least)
        if ages is not None and any(chunks):
            age = _ages(chunks, slots, self.chunk_size, device)
            for name, table in zip(("k", "v"), ages(), strict=True):
                after[name] = after[name] + torch.cat([table, torch.zeros_like(table[:1])]).to(k.dtype)[age]
        window = self.cutter.window
        after["before"] = torch.cat([held["before"].to(k.dtype), keys.detach().flatten(2)], 1)[:, length:]
        after["surprise"] = torch.cat([held["surprise"].to(news.dtype), news], 1)[:, -window:]
        after["position"] = start + length
        layout = self._layout(after["end"], after["closed"], position, slots)
        found = Read(after["k"], after["v"], lengthened(after["summary"], 1), layout, choosing)
        return found, {name: after[name] for name in self.names}

    def numbers(self, shares: Tensor) -> dict[str, Tensor]:
        """See :class:`ChunkStore`: ``entropy`` alone."""
        return {"entropy": torch.special.entr(shares).sum(-1)}

    def _cut(self, news: Tensor, keys: Tensor, held: LayerState, opened: Tensor) -> list[list[Chunk]]:
        """The chunks of each row that these tokens close."""
        found = []
        for n, (at, begin) in enumerate(zip(held["position"].tolist(), opened[:, 0].tolist(), strict=True)):
            past = held["surprise"][n, max(0, self.cutter.window - at) :].tolist()
            own = keys[n, : at + news.shape[1] - begin].flatten(1)
            found.append(self.cutter.cut(news[n].tolist(), own, at, begin, past))
        return found

    def _closed(
        self, chunks: list[list[Chunk]], held: LayerState, joined: LayerState, opened: Tensor, room: int
    ) -> LayerState:
        """Ends, summaries and the chunk under way after ``chunks`` have closed."""
        device, most = opened.device, self.chunk_size
        row = torch.arange(len(chunks), device=device)
        had = (held["end"] > 0).sum(1)
        count = torch.tensor([len(new) for new in chunks], device=device)
        offset = torch.tensor([0, *accumulate(len(new) for new in chunks)], device=device)[:-1]
        after: LayerState = {}
        for name, values in (
            ("end", [chunk.end for new in chunks for chunk in new]),
            ("closed", [chunk.closed for new in chunks for chunk in new]),
        ):
            flat = torch.tensor(values, dtype=torch.int32, device=device)
            after[name] = laid(flat, offset, count, room, had, held[name])
        owner = torch.repeat_interleave(row, count, output_size=sum(len(new) for new in chunks))
        begin = torch.tensor([chunk.start for new in chunks for chunk in new], dtype=torch.int64, device=device)
        size = torch.tensor([chunk.end - chunk.start for new in chunks for chunk in new], device=device).long()
        last = torch.tensor([new[-1].end if new else 0 for new in chunks], device=device)[:, None]
        shift = torch.where(last > 0, last - opened, 0)[:, 0]
        filled = held["position"] - opened[:, 0] + joined["keys"].shape[1] - most
        pieces = []
        for name, x in joined.items():
            whole = x.shape[1]
            pieces.append(laid(x.flatten(0, 1), owner * whole + begin - opened[owner, 0], size, most))
            after[name] = laid(x.flatten(0, 1), row * whole + shift, filled - shift, most)
        fresh = self.scorer(pieces[0], pieces[-1], size)
        after["summary"] = laid(fresh, offset, count, room, had, held["summary"])
        return after

    def _layout(self, end: Tensor, closed: Tensor, position: Tensor, slots: int) -> ChunkLayout:
        """What each token may read: the chunks that had closed when it came."""
        rows, length = position.shape
        count = end.shape[1] + 1
        row = torch.arange(rows, device=end.device)[:, None]
        begin = torch.cat([end.new_zeros(rows, 1), end], 1)
        # The chunk under way, which nobody chooses, lies behind the others: where the first one without an end begins.
        chunk, under_way = torch.arange(count, device=end.device), (end > 0).sum(1, keepdim=True)
        stop = torch.where(chunk == under_way, position[:, -1:] + 1, lengthened(end, 1))
        start = torch.where(chunk <= under_way, begin, 0)
        when = torch.where(closed > 0, closed, torch.iinfo(torch.int32).max)
        ready = torch.searchsorted(when, position.to(torch.int32).contiguous(), right=True)
        laid_out = (
            row * slots + start,
            row * slots + stop,
            (row * count).expand(rows, length),
            row * count + ready,
            row * slots + begin.gather(1, ready),
            row * slots + position + 1,
        )
        query = torch.arange(rows * length, dtype=torch.int32, device=end.device)
        start, stop, first, last, local, own = (x.flatten().to(torch.int32) for x in laid_out)
        return ChunkLayout(start, stop, first, last, local, own, query, 1, query.numel(), self.chunk_size)

    def _together(self, states: list[LayerState], slots: int) -> LayerState:
        """One state of several rows', with this many slots."""
        room = slots // self.cutter.least
        sizes = {"k": slots, "v": slots, "summary": room, "end": room, "closed": room}
        level = [
            {name: lengthened(x, sizes[name] - x.shape[1]) if name in sizes else x for name, x in state.items()}
            for state in states
        ]
        return take_rows(level, range(len(level)))


def _ages(chunks: list[list[Chunk]], slots: int, most: int, device: torch.device) -> Tensor:
    """Rows of a table of ages for all slots [N, S]: the last for a chunk's newest token, ``most`` outside of chunks."""
    age = torch.full((len(chunks), slots), most, dtype=torch.int64)
    for n, new in enumerate(chunks):
        for chunk in new:
            age[n, chunk.start : chunk.end] = torch.arange(most - (chunk.end - chunk.start), most)
    return age.to(device)


def _joined(parts: list[Read]) -> Read:
    """What several documents read, as one row."""
    layouts = [part.layout for part in parts]
    tokens = [0, *accumulate(part.k.shape[1] for part in parts)]
    chunks = [0, *accumulate(part.summary.shape[1] for part in parts)]
    queries = [0, *accumulate(layout.leader.numel() for layout in layouts)]

    def moved(name: str, by: list[int]) -> Tensor:
        return torch.cat([getattr(x, name) + n for x, n in zip(layouts, by, strict=False)])

    start, end = moved("start", tokens), moved("end", tokens)
    first, last = moved("first", chunks), moved("last", chunks)
    local, own, leader = moved("local", tokens), moved("own", tokens), moved("leader", queries)
    layout = ChunkLayout(start, end, first, last, local, own, leader, 1, queries[-1], layouts[0].longest)
    k, v, summary, choosing = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("k", "v", "summary", "choosing")
    )
    return Read(k, v, summary, layout, choosing)
