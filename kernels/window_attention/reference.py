"""Window attention, one query at a time."""

from itertools import pairwise

import torch
from torch import Tensor


def document(
    q: Tensor, k: Tensor, v: Tensor, past: int, window: int | None, prefix: tuple | None, scale: float
) -> Tensor:
    """One sequence: q [T, H, D] over k, v [past + T, Hkv, D], whose first ``past`` entries came before q."""
    length, heads, _ = q.shape
    group = heads // k.shape[1]
    outputs = []
    for t in range(length):
        last = past + t
        first = 0 if window is None else max(0, last - window + 1)
        keys, values = k[first : last + 1], v[first : last + 1]
        if prefix is not None:
            keys, values = torch.cat([prefix[0], keys]), torch.cat([prefix[1], values])
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        weights = torch.softmax(scale * torch.einsum("hd,jhd->hj", q[t], keys), -1)
        outputs.append(torch.einsum("hj,jhd->hd", weights, values))
    return torch.stack(outputs) if outputs else torch.zeros_like(q)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """Every row, or every packed document, by itself: its valid cached entries, then its tokens."""
    if cu_seqlens is None:
        pieces = [(q[n], k[n], v[n]) for n in range(q.shape[0])]
    else:
        borders = cu_seqlens.tolist()
        pieces = [(q[0, a:b], k[0, a:b], v[0, a:b]) for a, b in pairwise(borders)]
    outputs = []
    for n, (queries, keys, values) in enumerate(pieces):
        past = 0 if state is None else int(state["count"][n])
        if state is not None and past:
            keys = torch.cat([state["k"][n, -past:], keys])
            values = torch.cat([state["v"][n, -past:], values])
        outputs.append(document(queries, keys, values, past, window, prefix, scale))
    return torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
