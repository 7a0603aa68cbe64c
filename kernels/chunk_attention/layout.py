"""Which tokens make a chunk, which chunks a query may choose from, and which queries choose together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import check
from ..packing import document_of


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """Chunks of a memory k [N, S], and Q = B T queries on it: all int32, on the device, of sizes that shapes give.

    Tokens, chunks and queries are numbered row by row: token s of row n is n S + s, chunk c is n Nc + c, query t of
    row b is b T + t. A query reads completed chunks alone: those that end at or before the start of the chunk in which
    its leader lies. With B = N > 1, queries of row b read row b.

    Attributes:
        start, end: [M], tokens start .. end - 1 are the chunk's; none where they are equal. Chunks share no tokens.
        first, last: [Q], the query's candidates are the chunks first .. last - 1, except the empty ones.
        local, own: [Q], a union also reads the tokens local .. own - 1: from the start of the leader's chunk up to and
            with the query's own token. All lie in chunks, and neither bound ever falls from one query to the next.
        leader: [Q], the query whose scores choose for this one. Queries of one leader follow one another, it is the
            first of them, and their candidates are the same.
        share: queries that a leader chooses for, at most.
        blocks: leaders, at most.
        longest: tokens of a chunk, at most; 0: not known.
    """

    start: Tensor
    end: Tensor
    first: Tensor
    last: Tensor
    local: Tensor
    own: Tensor
    leader: Tensor
    share: int
    blocks: int
    longest: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """start, end, first, last, local, own and leader."""
        return self.start, self.end, self.first, self.last, self.local, self.own, self.leader

    @classmethod
    def regular(
        cls, batch: int, length: int, chunk_size: int, share: int = 1, device: torch.device | str = "cpu"
    ) -> "ChunkLayout":
        """Rows of T tokens, which are also the queries: Nc = ceil(T / chunk_size), of which the last may be cut short.

        Queries that share a leader are those of T's multiples of ``share``.
        """
        _positive(chunk_size=chunk_size, share=share)
        chunks = -(-length // chunk_size)
        chunk, query = torch.arange(batch * chunks, device=device), torch.arange(batch * length, device=device)
        row, time = query // length, query % length
        begin = chunk // chunks * length
        start = begin + chunk % chunks * chunk_size
        leader = time // share * share
        whole = leader // chunk_size
        return _layout(
            (start, torch.minimum(start + chunk_size, begin + length)),
            (row * chunks, row * chunks + whole, row * length + whole * chunk_size, query + 1, row * length + leader),
            (share, batch * -(-length // share), chunk_size),
        )

    @classmethod
    def packed(cls, cu_seqlens: Tensor, length: int, chunk_size: int, share: int = 1) -> "ChunkLayout":
        """Documents packed into one row of T tokens, which are also the queries; chunks begin anew at each.

        Nc = T // chunk_size + documents, of which the last ones may be empty.
        """
        _positive(chunk_size=chunk_size, share=share)
        documents = cu_seqlens.numel() - 1
        query = torch.arange(length, device=cu_seqlens.device)
        chunk = torch.arange(length // chunk_size + documents, device=cu_seqlens.device)
        upto = torch.cumsum((cu_seqlens.diff() + chunk_size - 1) // chunk_size, 0)
        before = upto - (cu_seqlens.diff() + chunk_size - 1) // chunk_size
        owner = torch.searchsorted(upto, chunk, right=True).clamp(max=documents - 1)
        stop = cu_seqlens[1:][owner]
        start = torch.minimum(cu_seqlens[:-1][owner] + (chunk - before[owner]) * chunk_size, stop)
        document = document_of(cu_seqlens, length)
        begin, first = cu_seqlens[:-1][document], before[document]
        leader = (query - begin) // share * share
        whole = leader // chunk_size
        return _layout(
            (start, torch.minimum(start + chunk_size, stop)),
            (first, first + whole, begin + whole * chunk_size, query + 1, begin + leader),
            (share, length if share == 1 else length // share + documents, chunk_size),
        )

    @classmethod
    def borders(
        cls,
        cu_chunks: Tensor,
        length: int,
        share: int = 1,
        cu_seqlens: Tensor | None = None,
        longest: int = 0,
    ) -> "ChunkLayout":
        """One row of T tokens, which are also the queries, in chunks of any lengths: those between ``cu_chunks``.

        Args:
            cu_chunks: int32 [Nc + 1], from 0 to T, never falling. No query reads a chunk that lies in two documents.
            length: T.
            share: queries that choose together.
            cu_seqlens: int32 [N + 1], borders of documents.
            longest: tokens of a chunk, at most, where the caller knows; plain torch looks it up where this is 0.
        """
        _positive(share=share)
        check.require(isinstance(longest, int) and longest >= 0, "longest", longest, "be an integer >= 0")
        _check_borders(cu_chunks, length)
        query = torch.arange(length, device=cu_chunks.device)
        begin = torch.zeros_like(query)
        blocks = -(-length // share)
        if cu_seqlens is not None:
            begin = cu_seqlens[:-1][document_of(cu_seqlens, length)].long()
            blocks = length if share == 1 else length // share + cu_seqlens.numel() - 1
        leader = begin + (query - begin) // share * share
        whole = torch.searchsorted(cu_chunks[1:].contiguous(), leader, right=True)
        first = torch.searchsorted(cu_chunks[:-1].contiguous(), begin)
        local = torch.maximum(cu_chunks[:-1][whole], begin)
        return _layout(
            (cu_chunks[:-1], cu_chunks[1:]),
            (torch.minimum(first, whole), whole, local, query + 1, leader),
            (share, blocks, longest),
        )

    @classmethod
    def cached(
        cls,
        start: Tensor,
        length: int,
        slots: int,
        chunk_size: int,
        share: int = 1,
        cu_seqlens: Tensor | None = None,
    ) -> "ChunkLayout":
        """Queries that go on with rows of a memory [N, S], in which they already lie: Nc = ceil(S / chunk_size).

        Query t of row n has position start[n] + t. Positions of a row are cut into chunks and into runs of ``share``
        from 0 on; where a run began before this call, its first query here leads, and what the run chose then must be
        given as ``selection``.

        Args:
            start: int32 [N], tokens of each row before this call; start + T <= S.
            length: T, the queries of a row; of all rows together with ``cu_seqlens``.
            slots: S.
            chunk_size: tokens of a chunk.
            share: queries that choose together.
            cu_seqlens: int32 [N + 1], borders of the queries of each row, packed into one (B = 1).
        """
        _positive(chunk_size=chunk_size, share=share)
        rows, chunks = start.numel(), -(-slots // chunk_size)
        query = torch.arange(rows * length if cu_seqlens is None else length, device=start.device)
        if cu_seqlens is None:
            row, begin, fresh = query // length, query // length * length, torch.full_like(start, length)
            blocks = rows * (-(-length // share) + 1)
        else:
            row, fresh = document_of(cu_seqlens, length), cu_seqlens.diff()
            begin, blocks = cu_seqlens[:-1][row].long(), length // share + 2 * rows
        _check_room(start, fresh, slots)
        known = start.long()[row]
        place = known + query - begin
        leader = place // share * share
        whole = leader // chunk_size
        chunk = torch.arange(rows * chunks, device=start.device)
        owner = chunk // chunks
        filled = (start + fresh)[owner]
        low = torch.minimum(chunk % chunks * chunk_size, filled)
        return _layout(
            (owner * slots + low, owner * slots + torch.minimum(low + chunk_size, filled)),
            (
                row * chunks,
                row * chunks + whole,
                row * slots + whole * chunk_size,
                row * slots + place + 1,
                begin + (leader - known).clamp(min=0),
            ),
            (share, query.numel() if share == 1 else min(blocks, query.numel()), chunk_size),
        )


def _layout(chunks: tuple[Tensor, ...], queries: tuple[Tensor, ...], sizes: tuple[int, int, int]) -> ChunkLayout:
    start, end = (x.to(torch.int32) for x in chunks)
    first, last, local, own, leader = (x.to(torch.int32) for x in queries)
    return ChunkLayout(start, end, first, last, local, own, leader, *sizes)


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        check.require(isinstance(size, int) and size >= 1, name, size, "be an integer >= 1")


def _readable(x: Tensor) -> bool:
    """Whether the host may look at values without a stall."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_borders(cu_chunks: Tensor, length: int) -> None:
    check.shape("cu_chunks", cu_chunks, (None,), "[Nc + 1]")
    check.require(cu_chunks.numel() >= 2, "cu_chunks.shape", tuple(cu_chunks.shape), "be [Nc + 1]")
    check.dtype("cu_chunks", cu_chunks, (torch.int32,))
    if _readable(cu_chunks):
        borders = cu_chunks.tolist()
        check.require(borders[0] == 0 and borders[-1] == length, "cu_chunks", borders, f"run from 0 to T = {length}")
        check.require(borders == sorted(borders), "cu_chunks", borders, "never decrease")


def _check_room(start: Tensor, fresh: Tensor, slots: int) -> None:
    check.shape("start", start, (None,), "[N]")
    check.dtype("start", start, (torch.int32,))
    if _readable(start):
        last = (start + fresh).tolist()
        fits = all(a >= 0 and b <= slots for a, b in zip(start.tolist(), last, strict=True))
        check.require(fits, "start", start.tolist(), f"be >= 0 and leave room for the queries in S = {slots}")
