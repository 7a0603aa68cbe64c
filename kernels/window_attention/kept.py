"""Attention over few keys that keeps its probabilities for the backward, by batched products on a CPU.

ATen's flash attention makes the scores again in its backward, in tiles that a CPU runs at half of the speed of its
products. Where a token sees few keys the probabilities are not much larger than what a block keeps anyway, and keeping
them leaves four products to the backward.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..operator import plain

SIZE = 64  # queries at a time: fewer waste less above the diagonal, more make better products
WIDEST = 512  # keys; the prefix, and SIZE + window or all of them: as many probabilities a token keeps

aten = torch.ops.aten


def fits(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, window: int | None) -> bool:
    """Whether a call without cache and documents is to run here: training on a CPU, where nobody counts or traces
    operators, with as many key heads as query heads."""
    wide = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and q.shape == k.shape
    tensors = (q, k, v, *(prefix or ()))
    training = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    seen = q.shape[1] if window is None else min(q.shape[1], SIZE + window)
    seen += 0 if prefix is None else prefix[0].shape[0]
    return wide and training and seen <= WIDEST and not torch.is_autocast_enabled("cpu") and plain(tensors)


@lru_cache(maxsize=64)
def _hidden(rows: int, offset: int, below: bool, dtype: torch.dtype) -> Tensor:
    """-inf at the ``rows`` x ``rows`` places beyond a diagonal, 0 at the others. Adding is quicker than filling."""
    with torch.inference_mode(False):
        every = torch.ones(rows, rows, dtype=torch.bool)
        return torch.zeros(rows, rows, dtype=dtype).masked_fill_(
            every.tril(offset) if below else every.triu(offset), -torch.inf
        )


def _blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """Queries and the keys that any of them sees."""
    starts = range(0, length, SIZE)
    first = [0 if window is None else max(0, start - window + 1) for start in starts]
    stops = [min(start + SIZE, length) for start in starts]
    return [(slice(a, e), slice(f, e)) for a, f, e in zip(starts, first, stops, strict=True)]


def _rows(x: Tensor) -> Tensor:
    """[B, T, H, D] as [B H, T, D], contiguous."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _learnt(prefix: Tensor | None, x: Tensor) -> Tensor:
    """[P, H, D] for every row of x [B, T, H, D], as :func:`_rows`; without a prefix, P = 0."""
    if prefix is None:
        return x.new_empty(x.shape[0] * x.shape[2], 0, x.shape[3])
    return prefix.transpose(0, 1).expand(x.shape[0], -1, -1, -1).flatten(0, 1)


class _Kept(torch.autograd.Function):
    """o = P V with P = softmax(scale Q K^T) under the window, of which P is kept, a block of queries at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        window: int | None,
        scale: float,
    ) -> Tensor:
        batch, length, heads, width = q.shape
        first_k, first_v = _learnt(prefix_k, k), _learnt(prefix_v, v)
        q, k, v = _rows(q) * scale, _rows(k), _rows(v)
        o = torch.empty_like(q)
        kept = []
        extra = first_k.shape[1]
        for rows, keys in _blocks(length, window):
            scores = torch.bmm(q[:, rows], torch.cat([first_k, k[:, keys]], 1).mT)
            count = rows.stop - rows.start
            scores[:, :, -count:] += _hidden(count, 1, False, q.dtype)
            offset = -count if window is None else rows.start - window - keys.start
            if offset > -count:
                scores[:, :, extra : extra + count] += _hidden(count, offset, True, q.dtype)
            kept.append(torch.softmax(scores, -1))
            o[:, rows] = torch.bmm(kept[-1], torch.cat([first_v, v[:, keys]], 1))
        ctx.window, ctx.scale, ctx.learnt = window, scale, prefix_k is not None
        ctx.save_for_backward(q, k, v, first_k, first_v, *kept)
        return o.view(batch, heads, length, width).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dV = P^T dO, dS = P (dP - rowsum(dP P)) with dP = dO V^T, dQ = scale dS K, dK = scale dS^T Q."""
        q, k, v, first_k, first_v, *kept = ctx.saved_tensors
        batch, length, heads, width = grad.shape
        extra = first_k.shape[1]
        grad = _rows(grad)
        d_q, sums = (
            torch.empty_like(q),
            [(torch.zeros_like(x), torch.zeros_like(y)) for x, y in ((first_k, k), (first_v, v))],
        )
        for (rows, keys), p in zip(_blocks(length, ctx.window), kept, strict=True):
            d_scores = torch.bmm(grad[:, rows], torch.cat([first_v, v[:, keys]], 1).mT)
            aten._softmax_backward_data.out(d_scores, p, -1, p.dtype, grad_input=d_scores)
            d_q[:, rows] = torch.bmm(d_scores, torch.cat([first_k, k[:, keys]], 1))
            for (d_first, d_all), left, right in zip(sums, (d_scores, p), (q, grad), strict=True):
                added = torch.bmm(left.mT, right[:, rows])
                d_all[:, keys] += added[:, extra:]
                d_first += added[:, :extra]
        d_q *= ctx.scale
        (d_first_k, d_k), (d_first_v, d_v) = sums
        d_q, d_k, d_v = (x.view(batch, heads, length, width).transpose(1, 2) for x in (d_q, d_k, d_v))
        if not ctx.learnt:
            return d_q, d_k, d_v, None, None, None, None
        learnt = (x.view(batch, heads, extra, width).sum(0).transpose(0, 1) for x in (d_first_k, d_first_v))
        return d_q, d_k, d_v, *learnt, None, None


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, window: int | None, scale: float
) -> Tensor:
    """Attention o [B, T, H, D] of q, k, v in that shape."""
    return _Kept.apply(q, k, v, *(prefix or (None, None)), window, scale)
