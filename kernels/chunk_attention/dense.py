"""Attention over chosen chunks on a CPU as one over all chunks, of which those not chosen weigh nothing.

Where queries choose one by one, to gather what each chose takes longer than to multiply with all of a memory that is
not very long. Blocks of queries are taken with the chunks that any of them may see; nothing of their size is kept.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..check import compute_dtype
from .chunked import chunk_weights, summary_gradients

SIZE = 64  # queries of each row at a time
LOWEST = -1e30  # a score that weighs nothing beside any other; finite, so that a chunk without tokens is no NaN


def fits(q: Tensor, k: Tensor, summary_k: Tensor, kept: int, share: int, longest: int, group: int) -> bool:
    """Whether this is the quicker way: each row of queries has a row of memory, and that is short.

    A gathered token costs half of a dense one where many rows share it, of which the scores of all tokens are scaled,
    and as much as 22 more where one row has it alone. A query sees all tokens before it, and those of the whole memory
    are laid out once. Measured on one core, heads of 64, forward and backward.
    """
    known = longest or -(-k.shape[1] // summary_k.shape[1])
    memory, length = summary_k.shape[1] * known, q.shape[1]
    cost = memory - min(length, memory) / 2 + 4 * memory / length
    return q.device.type == "cpu" and q.shape[0] == k.shape[0] and cost <= kept * known * (0.5 + 22 / (share * group))


class Blocks:
    """One call's memory chunk by chunk, [N, Hkv, Nc L, D], and what each block of queries sees of it."""

    def __init__(
        self, q: Tensor, k: Tensor, selection: Tensor, layout: tuple[Tensor, ...], longest: int, union: bool
    ) -> None:
        start, end, first, last, local, own, leader = (x.long() for x in layout)
        self.rows, self.length, self.heads, self.width = q.shape
        self.shared, self.choosers, self.union = k.shape[2], selection.shape[2], union
        self.longest = longest or int((end - start).max())
        self.kind = compute_dtype(q)
        self.leader = leader
        self.chunks = start.numel() // self.rows
        row = torch.arange(self.rows, device=q.device)[:, None]
        shape = self.rows, self.length
        self.low, self.high = (x.view(shape) - row * self.chunks for x in (first, last))
        self.chosen = selection.flatten(0, 1)[leader].view(*shape, *selection.shape[2:]).long()
        self.number = torch.where(self.chosen < 0, self.chunks, self.chosen - row[..., None, None] * self.chunks)
        step = torch.arange(self.longest, device=q.device)
        self.place = start[:, None] + step
        there = self.place < end[:, None]
        self.there = None if bool(there.all()) else there.view(self.rows, 1, 1, 1, self.chunks, self.longest)
        self.place = torch.where(there, self.place, k.shape[0] * k.shape[1])
        self.local, self.own = local.view(shape), own.view(shape)
        self.start, self.end = start.view(self.rows, -1), end.view(self.rows, -1)

    def lay(self, x: Tensor) -> Tensor:
        """Tokens [N, S, Hkv, D] as [N, Hkv, Nc L, D], zeros where a chunk is shorter than the longest."""
        flat = x.flatten(0, 1)
        if self.there is not None:
            flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        read = flat[self.place.flatten()].view(self.rows, -1, *x.shape[2:])
        return read.transpose(1, 2).to(self.kind).contiguous()

    def tokens(self, x: Tensor, like: Tensor) -> Tensor:
        """The reverse of :meth:`lay`."""
        flat = x.transpose(1, 2).reshape(-1, self.shared, self.width)
        out = flat.new_zeros(like.shape[0] * like.shape[1] + 1, self.shared, self.width)
        return out.index_add_(0, self.place.flatten(), flat)[:-1].view(like.shape).to(like.dtype)

    def pieces(self) -> Iterator[tuple[slice, slice, slice]]:
        """Queries of each row, the chunks that some of them see, and the tokens of these."""
        for begin in range(0, self.length, SIZE):
            time = slice(begin, begin + SIZE)
            low, high = int(self.low[:, time].min()), int(self.high[:, time].max())
            if self.union:
                near = self.start < self.own[:, time].max(1, keepdim=True).values
                near &= self.end > self.local[:, time].min(1, keepdim=True).values
                held = near.any(0).nonzero()
                low, high = min(low, int(held.min())), max(high, int(held.max()) + 1)
            if low < high:
                yield time, slice(low, high), slice(low * self.longest, high * self.longest)

    def take(self, x: Tensor, time: slice) -> Tensor:
        """Rows of queries [B, T, H, D] as [B, Hkv, H/Hkv t, D]."""
        part = x[:, time].to(self.kind).transpose(1, 2)
        return part.reshape(self.rows, self.shared, -1, x.shape[3])

    def put(self, out: Tensor, x: Tensor, time: slice) -> None:
        """Write what :meth:`take` would read."""
        out[:, time] = x.view(self.rows, self.heads, -1, out.shape[3]).transpose(1, 2).to(out.dtype)

    def spread(self, x: Tensor, time: slice, chunks: slice) -> Tensor:
        """x [B, T, Hs, K] of what was chosen as [B, Hkv, H/Hkv, t, n], zero for all other chunks."""
        index = self.number[:, time].transpose(1, 2)
        wide = x.new_zeros(*index.shape[:3], self.chunks + 1)
        wide = wide.scatter_(-1, index, x[:, time].transpose(1, 2))[..., chunks]
        wide = wide.repeat_interleave(self.heads // self.choosers, 1)
        return wide.view(self.rows, self.shared, -1, *wide.shape[2:])

    def pick(self, x: Tensor, time: slice, chunks: slice) -> Tensor:
        """The reverse: of x [B, Hkv, H/Hkv, t, n] what was chosen, [B, t, H, K], zero where nothing was."""
        index = self.number[:, time].transpose(1, 2).repeat_interleave(self.heads // self.choosers, 1)
        inside = (index >= chunks.start) & (index < chunks.stop)
        found = x.flatten(1, 2).gather(-1, (index - chunks.start).clamp(0, x.shape[-1] - 1))
        return torch.where(inside, found, 0.0).transpose(1, 2)

    def probabilities(self, rows: Tensor, keys: Tensor, time: slice, chunks: slice, ones: Tensor | None) -> Tensor:
        """Softmax [B, Hkv, H/Hkv, t, n, L] inside of each chunk, or for a union over all tokens that a query sees."""
        scores = (rows @ keys.mT).view(
            self.rows, self.shared, self.heads // self.shared, -1, chunks.stop - chunks.start, self.longest
        )
        if self.there is not None:
            scores.masked_fill_(~self.there[..., chunks, :], LOWEST)
        if not self.union:
            return torch.softmax(scores, -1)
        place = self.place.view(self.rows, 1, self.chunks, self.longest)[:, :, chunks]
        near = (place >= self.local[:, time, None, None]) & (place < self.own[:, time, None, None])
        seen = near[:, None, None] | (self.spread(ones, time, chunks) > 0)[..., None]  # type: ignore[arg-type]
        scores = scores.masked_fill_(~seen, LOWEST)
        return torch.softmax(scores.flatten(-2), -1).view(scores.shape).masked_fill_(~seen, 0.0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, summary_k: Tensor, selection: Tensor,
    layout: tuple[Tensor, ...], longest: int, union: bool, scale: float, summary_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o [B, T, H, D]; no log-sum-exp, for the softmax is made again; weights [Q, Hs, K] (none for a union)."""
    call = Blocks(q, k, selection, layout, longest, union)
    o = torch.zeros_like(q, memory_format=torch.contiguous_format)
    keys, values = call.lay(k), call.lay(v)
    weights, ones = q.new_empty(0, dtype=call.kind), None
    if union:
        ones = torch.ones_like(call.number, dtype=call.kind)
    else:
        weights = chunk_weights(summary_q, summary_k, selection, call.leader, summary_scale)[0]
    for time, chunks, tokens in call.pieces():
        taken = call.probabilities(call.take(q, time) * scale, keys[:, :, tokens], time, chunks, ones)
        if not union:
            taken *= call.spread(weights.view(call.chosen.shape), time, chunks)[..., None]
        call.put(o, taken.view(*taken.shape[:2], -1, tokens.stop - tokens.start) @ values[:, :, tokens], time)
    return o, q.new_empty(0, dtype=call.kind), weights


def backward(
    grad: Tensor, weights: Tensor, q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, summary_k: Tensor,
    selection: Tensor, layout: tuple[Tensor, ...], longest: int, union: bool, scale: float, summary_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, summary_q and summary_k, by the equations of :func:`.chunked.backward`."""
    call = Blocks(q, k, selection, layout, longest, union)
    d_q, kept = torch.zeros_like(q, memory_format=torch.contiguous_format), selection.shape[3]
    keys, values = call.lay(k), call.lay(v)
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    along = q.new_zeros(*q.shape[:3], kept, dtype=call.kind)
    ones = torch.ones_like(call.number, dtype=call.kind) if union else None
    for time, chunks, tokens in call.pieces():
        rows, slope = call.take(q, time) * scale, call.take(grad, time)
        taken = call.probabilities(rows, keys[:, :, tokens], time, chunks, ones)
        part = taken * (slope @ values[:, :, tokens].mT).view(taken.shape)
        mass = part.sum((-2, -1), keepdim=True) if union else part.sum(-1, keepdim=True)
        part.addcmul_(taken, mass, value=-1)
        if not union:
            share = call.spread(weights.view(call.chosen.shape), time, chunks)[..., None]
            along[:, time] = call.pick(mass[..., 0], time, chunks)
            part *= share
            taken *= share
        flat = (*taken.shape[:2], -1, tokens.stop - tokens.start)
        part, taken = part.view(flat), taken.view(flat)
        call.put(d_q, (part @ keys[:, :, tokens]) * scale, time)
        d_keys[:, :, tokens] += part.mT @ rows
        d_values[:, :, tokens] += taken.mT @ slope
    d_k, d_v = call.tokens(d_keys, k), call.tokens(d_values, v)
    if union:
        return d_q, d_k, d_v, torch.zeros_like(summary_q), torch.zeros_like(summary_k)
    _, chunks_of, chosen = chunk_weights(summary_q, summary_k, selection, call.leader, summary_scale)
    d_summaries = summary_gradients(
        along.flatten(0, 1), weights, chunks_of, chosen, summary_q, summary_k, summary_scale
    )  # fmt: skip
    return d_q, d_k, d_v, *d_summaries
