"""Packed rows: which document a token belongs to, and the last tokens of every document."""

import torch
from torch import Tensor


def document_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """Document number int64 [length] of each token of a packed row; empty documents own no token."""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def tail(x: Tensor, cache: Tensor, size: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The last ``size`` entries of each row of [cache ; x], zeros on the left where there are not that many.

    Args:
        x: [B, T, ...], or [1, T, ...] with ``cu_seqlens``.
        cache: [N, S, ...], the entries that went before; N = B, or the number of documents.

    Returns: [N, size, ...], differentiable with respect to both, computed on the device without a host read.
    """
    rows, kept = cache.shape[:2]
    if cu_seqlens is None:
        whole = torch.cat([cache, x], 1)
        missing = size - whole.shape[1]
        if missing > 0:
            whole = torch.cat([x.new_zeros(rows, missing, *x.shape[2:]), whole], 1)
        return whole[:, whole.shape[1] - size :]
    back = torch.arange(size, 0, -1, device=x.device)  # 1 is the newest
    ends, lengths = cu_seqlens[1:, None].long(), cu_seqlens.diff()[:, None]
    pool = torch.cat([x.new_zeros(1, *x.shape[2:]), x.flatten(0, 1), cache.flatten(0, 1)])
    first = 1 + x.shape[1] + kept * torch.arange(1, rows + 1, device=x.device)[:, None]
    older = torch.where(back - lengths <= kept, first - (back - lengths), 0)
    return pool[torch.where(back <= lengths, 1 + ends - back, older)]
