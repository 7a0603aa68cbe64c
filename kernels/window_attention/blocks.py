"""The blocks of window attention: which queries see which keys, and the kernel that runs one block."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..check import compute_dtype

aten = torch.ops.aten


def heads_first(x: Tensor) -> Tensor:
    """[B, T, H, D] seen as [B, H, T, D], rows contiguous as the kernels need them."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def has_kernel(device: torch.device) -> bool:
    """Whether ATen has a kernel there that never holds the scores and whose backward goes on from the log-sum-exp."""
    return device.type == "cpu"


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, C, D] of one block and its log-sum-exp [B, H, C]; ``mask`` [B or 1, 1, C, K] is added to scores.

    Query heads that share a key head are taken one by one, or as more rows: keys are never repeated.
    """
    group = q.shape[1] // k.shape[1]
    if not has_kernel(q.device):
        probability, log_sum = _probability(_fold(q, group), k, mask, scale)
        return _unfold(probability.to(v.dtype) @ v, group), _unfold(log_sum, group)
    run = aten._scaled_dot_product_flash_attention_for_cpu
    parts = [run(q[:, g::group], k, v, 0.0, causal, attn_mask=mask, scale=scale) for g in range(group)]
    if group == 1:
        return parts[0]
    o, log_sum = (torch.stack([part[i] for part in parts], 2).flatten(1, 2) for i in range(2))
    return o, log_sum


def block_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block with respect to q [B, H, C, D] and k, v [B, Hkv, K, D].

    With P the probabilities: dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q.
    """
    group = q.shape[1] // k.shape[1]
    if not has_kernel(q.device):
        q, grad, o = (_fold(x, group) for x in (q, grad, o))
        probability, _ = _probability(q, k, mask, scale, _fold(lse.unsqueeze(-1), group))
        along = (grad * o).to(lse.dtype).sum(-1, keepdim=True)
        d_scores = (probability * ((grad @ v.mT).to(lse.dtype) - along) * scale).to(q.dtype)
        return _unfold(d_scores @ k, group), d_scores.mT @ q, probability.to(q.dtype).mT @ grad
    run = aten._scaled_dot_product_flash_attention_for_cpu_backward
    parts = [
        run(grad[:, g::group], q[:, g::group], k, v, o[:, g::group], lse[:, g::group], 0.0, causal,
            attn_mask=mask, scale=scale)
        for g in range(group)
    ]  # fmt: skip
    if group == 1:
        return parts[0]
    d_q = torch.stack([part[0] for part in parts], 2).flatten(1, 2)
    return d_q, sum(part[1] for part in parts), sum(part[2] for part in parts)


def _fold(x: Tensor, group: int) -> Tensor:
    """[B, Hkv * group, C, ...] as [B, Hkv, group * C, ...]."""
    return x.unflatten(1, (-1, group)).flatten(2, 3)


def _unfold(x: Tensor, group: int) -> Tensor:
    """The inverse of :func:`_fold`."""
    return x.unflatten(2, (group, -1)).flatten(1, 2)


def _probability(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, log_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax [B, Hkv, group * C, K] of folded queries and its log-sum-exp, or from one that is known."""
    scores = (q @ k.mT).to(compute_dtype(q)) * scale
    if mask is not None:
        scores = (scores.unflatten(2, (-1, mask.shape[2])) + mask.unsqueeze(2)).flatten(2, 3)
    if log_sum is None:
        log_sum = torch.logsumexp(scores, -1, keepdim=True)
    return torch.exp(scores - log_sum), log_sum.squeeze(-1)


@dataclass
class Block:
    """Queries ``rows`` see the prefix and the keys ``columns``, through ``mask`` (None: all, or causally)."""

    rows: slice
    columns: slice
    mask: Tensor | None
    causal: bool


def blocks(q: Tensor, total: int, window: int | None, prefix: int, valid: Tensor | None) -> Iterator[Block]:
    """Cut the queries q [B, T, ...], which stand at the end of ``total`` keys, into blocks.

    ``valid`` [B, total] marks the keys that exist; None: all of them.
    """
    length = q.shape[1]
    past = total - length
    if window is not None and window >= total:
        window = None
    if length == 0:
        return
    if window is None and past == prefix == 0 and valid is None and has_kernel(q.device):
        yield Block(slice(0, length), slice(0, length), None, True)
        return
    size = 256 if window is None else min(max(window, 64), 256)
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, past + start - window + 1)
        columns = slice(first, past + stop)
        i = torch.arange(past + start, past + stop, device=q.device)[:, None]
        j = torch.arange(first, past + stop, device=q.device)
        seen = j <= i if window is None else (j <= i) & (j > i - window)
        if valid is not None:
            seen = seen & valid[:, None, None, columns]
        elif stop - start == 1:
            yield Block(slice(start, stop), columns, None, False)
            continue
        if prefix:
            seen = torch.cat([seen.new_ones(*seen.shape[:-1], prefix), seen], -1)
        # A slot that no key fills must not be seen by anyone, and every query sees at least itself: no empty rows.
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
        yield Block(slice(start, stop), columns, mask.expand(q.shape[0], 1, *mask.shape[-2:]), False)


@dataclass
class Piece:
    """Tokens that may see each other: all rows of a batch, or one packed document, after their cached entries."""

    rows: slice
    tokens: slice
    past: int
    k: Tensor
    v: Tensor
    valid: Tensor | None


def pieces(
    k: Tensor, v: Tensor, cache: tuple | None, count: Tensor | None, cu_seqlens: Tensor | None
) -> Iterator[Piece]:
    """Cut the call into pieces and put the cached entries before their keys."""
    length = k.shape[1]
    if cu_seqlens is not None:
        borders = cu_seqlens.tolist()
        counts = [0] * (len(borders) - 1) if count is None else count.tolist()
        for n, past in enumerate(counts):
            keys, values = (x[:, borders[n] : borders[n + 1]] for x in (k, v))
            if cache is not None and past:
                keys, values = (
                    torch.cat([old[n : n + 1, old.shape[1] - past :], new], 1)
                    for old, new in zip(cache, (keys, values), strict=True)
                )
            yield Piece(slice(n, n + 1), slice(borders[n], borders[n + 1]), past, keys, values, None)
        return
    everything = Piece(slice(None), slice(0, length), 0, k, v, None)
    if cache is not None and count is not None and cache[0].shape[1]:
        past = cache[0].shape[1]
        everything.past = past
        # Reading the counts is free on a CPU, and saves the mask in the common case of full caches.
        if k.device.type != "cpu" or bool((count < past).any()):
            slots = torch.arange(past + length, device=k.device)
            everything.valid = slots >= past - count[:, None]
            hole = ~everything.valid[:, :past, None, None]
            cache = tuple(old.masked_fill(hole, 0) for old in cache)
        everything.k, everything.v = (torch.cat([old, new], 1) for old, new in zip(cache, (k, v), strict=True))
    yield everything
