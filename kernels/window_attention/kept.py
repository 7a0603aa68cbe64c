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
WIDEST = 512  # keys; SIZE + window or all of them, the probabilities of a token

aten = torch.ops.aten


def fits(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> bool:
    """Whether a call without prefix, cache and documents is to run here: training on a CPU, where nobody counts
    or traces operators, with as many key heads as query heads."""
    wide = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and q.shape == k.shape
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    seen = q.shape[1] if window is None else min(q.shape[1], SIZE + window)
    return wide and training and seen <= WIDEST and not torch.is_autocast_enabled("cpu") and plain((q, k, v))


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


class _Kept(torch.autograd.Function):
    """o = P V with P = softmax(scale Q K^T) under the window, of which P is kept, a block of queries at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        batch, length, heads, width = q.shape
        q, k, v = _rows(q) * scale, _rows(k), _rows(v)
        o = torch.empty_like(q)
        kept = []
        for rows, keys in _blocks(length, window):
            scores = torch.bmm(q[:, rows], k[:, keys].mT)
            count = rows.stop - rows.start
            scores[:, :, -count:] += _hidden(count, 1, False, q.dtype)
            offset = -count if window is None else rows.start - window - keys.start
            if offset > -count:
                left = scores[:, :, :count]
                left += _hidden(count, offset, True, q.dtype)
            kept.append(torch.softmax(scores, -1))
            o[:, rows] = torch.bmm(kept[-1], v[:, keys])
        ctx.window, ctx.scale = window, scale
        ctx.save_for_backward(q, k, v, *kept)
        return o.view(batch, heads, length, width).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """dV = P^T dO, dS = P (dP - rowsum(dP P)) with dP = dO V^T, dQ = scale dS K, dK = scale dS^T Q."""
        q, k, v, *kept = ctx.saved_tensors
        batch, length, heads, width = grad.shape
        grad = _rows(grad)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (rows, keys), p in zip(_blocks(length, ctx.window), kept, strict=True):
            d_scores = torch.bmm(grad[:, rows], v[:, keys].mT)
            aten._softmax_backward_data.out(d_scores, p, -1, p.dtype, grad_input=d_scores)
            d_v[:, keys] += torch.bmm(p.mT, grad[:, rows])
            d_k[:, keys] += torch.bmm(d_scores.mT, q[:, rows])
            d_q[:, rows] = torch.bmm(d_scores, k[:, keys])
        d_q *= ctx.scale
        d_q, d_k, d_v = (x.view(batch, heads, length, width).transpose(1, 2) for x in (d_q, d_k, d_v))
        return d_q, d_k, d_v, None, None


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Attention o [B, T, H, D] of q, k, v in that shape."""
    return _Kept.apply(q, k, v, window, scale)
