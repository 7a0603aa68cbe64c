"""Attention over chosen chunks in plain torch: what a run of queries chose is gathered, some runs at a time.

Heads that share both their keys and their choice are rows of one product: U sets of ``group`` heads. The chunks of the
memory are laid out once, padded to the longest, so that one is one row of a gather and of the sum of its gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..check import compute_dtype
from .selection import leaders
from .tables import group_of

SIZE = 2**21  # gathered numbers at a time, which a cache nearly holds


@dataclass(frozen=True)
class Piece:
    """Some runs of queries: n runs of R queries, K chunks of L tokens, and for a union W local tokens.

    Attributes:
        query: [n, R], their numbers; ``live`` [n, R]: which are there; ``place`` [n, R]: Q for the others.
        rows: what a set of heads chose, rows [n U K] of the chunks as laid out, else [n U K L] of the memory.
        local: [n, W], tokens that are also read, or None.
        seen: [n, U, R or 1, 1, K L + W], which tokens a query sees.
    """

    query: Tensor
    live: Tensor
    place: Tensor
    rows: Tensor
    local: Tensor | None
    seen: Tensor


class Gather:
    """One call's shapes and tables, and its keys and values chunk by chunk."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, selection: Tensor, layout: tuple[Tensor, ...], share: int, blocks: int,
        longest: int, union: bool,
    ) -> None:  # fmt: skip
        self.start, self.end, _, _, self.local, self.own, self.leader = (x.long() for x in layout)
        self.heads, self.shared, self.width, self.union = q.shape[2], k.shape[2], q.shape[3], union
        choosers = selection.shape[2]
        self.group = group_of(self.heads, self.shared, choosers)
        self.sets = self.heads // self.group
        self.kind = compute_dtype(q)
        self.share, self.reach = min(share, q.shape[1]), share
        # Only a layout that does not know its longest chunk makes the host wait for one number.
        self.longest = longest or int((self.end - self.start).max())
        self.starts, _ = leaders(self.leader, share, blocks)
        first = torch.arange(0, self.heads, self.group, device=q.device)
        self.keys_of = first * self.shared // self.heads
        self.choice_of = first * choosers // self.heads
        self.selection = selection.flatten(0, 1).long()
        self.k, self.v = k.flatten(0, 1), v.flatten(0, 1)
        # A few queries on a long memory, as in decoding, read less than it would take to lay all of it out.
        laid = (self.starts.numel() - 1) * self.sets * selection.shape[3] >= self.start.numel() * self.shared
        self.tokens, self.there = self._tokens(torch.arange(self.start.numel() if laid else 0, device=q.device))
        self.chunk_k, self.chunk_v = (self._chunks(x) if laid else None for x in (self.k, self.v))

    def _tokens(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of chunks [..., L], and whether they are there."""
        place = self.start[number][..., None] + torch.arange(self.longest, device=number.device)
        return place.clamp(max=self.k.shape[0] - 1), place < self.end[number][..., None]

    def _chunks(self, x: Tensor) -> Tensor:
        """[M Hkv, L D]."""
        read = x[self.tokens].masked_fill_(~self.there[..., None, None], 0)  # what is not seen may be no number
        return read.transpose(1, 2).reshape(-1, self.longest * self.width)

    def pieces(self) -> Iterator[Piece]:
        """Runs of queries, as many at a time as a cache holds."""
        kept = self.selection.shape[2]
        wide = self.longest + self.reach - 1 if self.union else 0
        each = self.sets * (kept * self.longest + wide) * (2 * self.width + 3 * self.share * self.group)
        step = max(1, SIZE // max(1, each))
        count = self.own.numel()
        offset = torch.arange(self.share, device=self.own.device)
        for begin in range(0, self.starts.numel() - 1, step):
            starts = self.starts[begin : begin + step + 1]
            query = starts[:-1, None] + offset
            live = query < starts[1:, None]
            put = torch.where(live, query, count)
            query = query.clamp(max=count - 1)
            number = self.selection[query[:, 0]][:, self.choice_of]
            chosen = number >= 0
            number = number.clamp(min=0)
            if self.chunk_k is None:
                tokens, there = self._tokens(number)
                rows = tokens * self.shared + self.keys_of[:, None, None]
            else:
                there, rows = self.there[number], number * self.shared + self.keys_of[:, None]
            seen = (there & chosen[..., None]).flatten(2)[:, :, None]
            local = None
            if self.union:
                place = self.local[query[:, 0], None] + torch.arange(wide, device=query.device)
                local = place.clamp(max=self.k.shape[0] - 1)
                near = ((place[:, None] < self.own[query][..., None]) & live[..., None])[:, None]
                seen = torch.cat([seen.expand(-1, -1, self.share, -1), near.expand(-1, self.sets, -1, -1)], -1)
            yield Piece(query, live, put, rows.flatten(), local, seen[:, :, :, None])

    def take(self, x: Tensor, piece: Piece) -> Tensor:
        """Rows of queries [Q, H, D] as [n U, R group, D]."""
        runs, share = piece.query.shape
        taken = x[piece.query].view(runs, share, self.sets, self.group, -1).transpose(1, 2)
        return taken.reshape(runs * self.sets, share * self.group, -1).to(self.kind)

    def put(self, out: Tensor, rows: Tensor, piece: Piece) -> None:
        """Write what :meth:`take` would read; ``out`` has one row more, for queries that are not there."""
        runs, share = piece.query.shape
        rows = rows.view(runs, self.sets, share, self.group, -1).transpose(1, 2).reshape(runs, share, self.heads, -1)
        out[piece.place] = rows.to(out.dtype)

    def memory(self, chunks: Tensor | None, tokens: Tensor, piece: Piece) -> Tensor:
        """Keys or values of a piece [n U, K L + W, D]."""
        runs = piece.query.shape[0]
        if chunks is None:
            read = tokens.reshape(-1, self.width).index_select(0, piece.rows).view(runs * self.sets, -1, self.width)
            there = piece.seen[:, :, 0, 0, : read.shape[1]].reshape(runs * self.sets, -1, 1)
            read = read.masked_fill_(~there, 0)
        else:
            read = chunks.index_select(0, piece.rows).view(runs * self.sets, -1, self.width)
        if piece.local is not None:
            there = piece.seen[:, 0, :, 0, -piece.local.shape[1] :].any(1)[..., None, None]
            near = tokens[piece.local].masked_fill(~there, 0)[:, :, self.keys_of].transpose(1, 2)
            read = torch.cat([read, near.reshape(runs * self.sets, -1, self.width)], 1)
        return read.to(self.kind)

    def split(self, x: Tensor) -> Tensor:
        """Scores and the like [n U, R group, K L + W] as [n, U, R, group, K, L], or with all as one for a union."""
        shape = (x.numel() // (self.sets * self.share * self.group * x.shape[-1]), self.sets, self.share, self.group)
        return x.view(*shape, 1, x.shape[-1]) if self.union else x.view(*shape, -1, self.longest)

    def probabilities(
        self, queries: Tensor, keys: Tensor, piece: Piece, scale: float, log_sum: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Softmax inside of each chunk, or over all of a union, and its log-sum-exp, infinite where nothing is seen."""
        scores = (scale * (queries @ keys.mT)).view(-1, self.sets, self.share, self.group, keys.shape[1])
        scores = self.split(scores.masked_fill_(~piece.seen, float("-inf")))
        if log_sum is None:
            log_sum = torch.logsumexp(scores, -1)
            log_sum = torch.where(log_sum == float("-inf"), float("inf"), log_sum)
        return torch.exp(scores - log_sum[..., None]), log_sum

    def weights_of(self, weights: Tensor, piece: Piece) -> Tensor:
        """Weights of the chunks [Q, Hs, K] as [n, U, R, 1, K, 1]."""
        return weights[piece.query][:, :, self.choice_of].transpose(1, 2)[:, :, :, None, :, None]

    def zeros(self) -> tuple[Tensor | None, Tensor]:
        """For :meth:`add`: of the chunks as laid out [M Hkv, L D], and of tokens [S + 1, Hkv, D] (one to spare)."""
        near = self.k.new_zeros(self.k.shape[0] + 1, *self.k.shape[1:], dtype=self.kind)
        return None if self.chunk_k is None else torch.zeros_like(self.chunk_k, dtype=self.kind), near

    def add(self, total: Tensor | None, near: Tensor, rows: Tensor, piece: Piece) -> None:
        """Add gradients [n U, K L + W, D]."""
        runs, wide = piece.query.shape[0], 0 if piece.local is None else piece.local.shape[1]
        far = rows[:, : rows.shape[1] - wide].reshape(piece.rows.numel(), -1)
        add_rows(near.view(-1, self.width) if total is None else total, piece.rows, far)
        if piece.local is None:
            return
        part = rows[:, -wide:].reshape(runs, self.sets, wide, self.width).transpose(1, 2)
        index = piece.local[:, :, None] * self.shared + self.keys_of
        add_rows(near.view(-1, self.width), index.flatten(), part.reshape(-1, self.width))

    def tokens_of(self, total: Tensor | None, near: Tensor) -> Tensor:
        """All that was added, by tokens [S, Hkv, D]."""
        if total is None:
            return near[:-1]
        rows = total.view(-1, self.shared, self.longest, self.width).transpose(1, 2).flatten(0, 1)
        place = torch.where(self.there, self.tokens, near.shape[0] - 1).flatten()
        return near.index_add_(0, place, rows)[:-1]  # chunks share no tokens: each is added once


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, always in the same order."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)  # sorts, where index_add_ would use atomics


def chunk_weights(
    summary_q: Tensor, summary_k: Tensor, selection: Tensor, leader: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """w [Q, Hs, K], the softmax of a query's own scores over what its leader chose; summaries and numbers of these."""
    queries = summary_q.flatten(0, 1).to(compute_dtype(summary_q))
    chosen = selection.flatten(0, 1)[leader].long()
    head = torch.arange(queries.shape[1], device=queries.device)[:, None]
    chunks = summary_k.flatten(0, 1)[chosen.clamp(min=0), head].to(queries.dtype)
    score = scale * (chunks @ queries[..., None])[..., 0]
    score = score.masked_fill(chosen < 0, float("-inf"))
    weights = torch.softmax(score, -1).masked_fill(chosen < 0, 0.0)
    return weights, chunks, chosen


def forward(
    q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, summary_k: Tensor, selection: Tensor,
    layout: tuple[Tensor, ...], share: int, blocks: int, longest: int, union: bool, scale: float, summary_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o [B, T, H, D], log-sum-exp [Q, H, K] (K = 1 for a union), and weights [Q, Hs, K] (none for a union)."""
    call = Gather(q, k, v, selection, layout, share, blocks, longest, union)
    count, kept = call.own.numel(), selection.shape[3]
    o = q.new_empty(count + 1, *q.shape[2:])
    log_sum = q.new_empty(count + 1, q.shape[2], 1 if union else kept, dtype=call.kind)
    weights = q.new_empty(0, dtype=call.kind)
    if not union:
        weights = chunk_weights(summary_q, summary_k, selection, call.leader, summary_scale)[0]
    queries = q.flatten(0, 1)
    for piece in call.pieces():
        keys, values = call.memory(call.chunk_k, call.k, piece), call.memory(call.chunk_v, call.v, piece)
        taken, own_sum = call.probabilities(call.take(queries, piece), keys, piece, scale, None)
        if not union:
            taken = taken * call.weights_of(weights, piece)
        call.put(o, taken.view(keys.shape[0], -1, keys.shape[1]) @ values, piece)
        call.put(log_sum, own_sum.flatten(0, 1).flatten(1, 2), piece)
    return o[:-1].view(q.shape), log_sum[:-1], weights


def backward(
    grad: Tensor, o: Tensor, log_sum: Tensor, weights: Tensor, q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor,
    summary_k: Tensor, selection: Tensor, layout: tuple[Tensor, ...], share: int, blocks: int, longest: int,
    union: bool, scale: float, summary_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, summary_q and summary_k; those of a union's summaries are zero.

    With a the probabilities inside of chunk i, w its weight, D_i = sum_j a_ij (do . v_ij) and delta = sum_i w_i D_i:

        dl_ij = w_i a_ij (do . v_ij - D_i)      dv_ij = w_i a_ij do      dr_i = w_i (D_i - delta), over a choice's heads
    """
    call = Gather(q, k, v, selection, layout, share, blocks, longest, union)
    queries, slopes = q.flatten(0, 1), grad.flatten(0, 1)
    count = queries.shape[0]
    d_q = q.new_empty(count + 1, *q.shape[2:])
    sums = call.zeros(), call.zeros()
    along = q.new_empty(count + 1, *log_sum.shape[1:], dtype=call.kind)
    for piece in call.pieces():
        keys, values = call.memory(call.chunk_k, call.k, piece), call.memory(call.chunk_v, call.v, piece)
        rows, slope = call.take(queries, piece), call.take(slopes, piece)
        rows, slope = (x.masked_fill(~_live(piece, call), 0.0) for x in (rows, slope))
        known = call.take(log_sum, piece).view(-1, call.sets, call.share, call.group, log_sum.shape[2])
        taken, _ = call.probabilities(rows, keys, piece, scale, known)
        d_taken = call.split(slope @ values.mT)
        mass = (taken * d_taken).sum(-1)
        call.put(along, mass.flatten(0, 1).flatten(1, 2), piece)
        if not union:
            taken = taken * call.weights_of(weights, piece)
        d_scores = (taken * (d_taken - mass[..., None])).view(keys.shape[0], -1, keys.shape[1]) * scale
        call.put(d_q, d_scores @ keys, piece)
        call.add(*sums[0], d_scores.mT @ rows, piece)
        call.add(*sums[1], taken.view(d_scores.shape).mT @ slope, piece)
    d_k, d_v = (call.tokens_of(*pair).view(k.shape).to(k.dtype) for pair in sums)
    d_q = d_q[:-1].view(q.shape)
    if union:
        return d_q, d_k, d_v, torch.zeros_like(summary_q), torch.zeros_like(summary_k)
    _, chunks, chosen = chunk_weights(summary_q, summary_k, selection, call.leader, summary_scale)
    return d_q, d_k, d_v, *summary_gradients(
        along[:-1], weights, chunks, chosen, summary_q, summary_k, summary_scale
    )  # fmt: skip


def _live(piece: Piece, call: Gather) -> Tensor:
    """Which rows of :meth:`Gather.take` are there, [n U, R group, 1]."""
    runs, share = piece.live.shape
    live = piece.live[:, None, :, None].expand(runs, call.sets, share, call.group)
    return live.reshape(runs * call.sets, -1, 1)


def summary_gradients(
    along: Tensor, weights: Tensor, chunks: Tensor, chosen: Tensor, summary_q: Tensor, summary_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of summary_q and summary_k from D [Q, H, K], and from what :func:`chunk_weights` returned."""
    heads = summary_q.shape[2]
    mass = along.view(along.shape[0], heads, -1, along.shape[2]).sum(2)
    d_score = scale * weights * (mass - (weights * mass).sum(-1, keepdim=True))
    d_q = (d_score[:, :, None] @ chunks)[:, :, 0]
    d_k = torch.zeros(summary_k.shape, dtype=d_q.dtype, device=d_q.device)
    rows = d_score[..., None] * summary_q.flatten(0, 1)[:, :, None].to(d_q.dtype)
    place = chosen.clamp(min=0) * heads + torch.arange(heads, device=chosen.device)[:, None]
    add_rows(d_k.view(-1, d_k.shape[3]), place.flatten(), rows.flatten(0, 2))
    return d_q.view(summary_q.shape).to(summary_q.dtype), d_k.to(summary_k.dtype)
