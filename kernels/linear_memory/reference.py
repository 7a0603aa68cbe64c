"""Token by token, as the equations read; the judge of every other implementation. Gradients by autograd."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..check import compute_dtype


def _run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, decay: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence over rows: q, k [N, T, H, D], v [N, T, H, D_v], β and a [N, T, H], memory [N, H, D, D_v]."""
    outputs = []
    for t in range(q.shape[1]):
        key, value = k[:, t, :, :, None], v[:, t, :, None]
        if decay is not None:
            memory = decay[:, t, :, None, None] * memory
        if beta is not None:
            value = beta[:, t, :, None, None] * (value - key.mT @ memory)
        memory = memory + key * value
        outputs.append((q[:, t, :, None] @ memory).squeeze(-2))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), memory


def linear_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """o and the final memory; ``beta`` None is linear attention. ``chunk`` changes nothing."""
    kind = compute_dtype(q)
    decay = None if log_decay is None else log_decay.exp()
    borders = None if cu_seqlens is None else cu_seqlens.tolist()
    rows = q.shape[0] if borders is None else len(borders) - 1
    memory = q.new_zeros(rows, q.shape[2], q.shape[3], v.shape[3], dtype=kind) if state is None else state
    tokens: list[Any] = [q.to(kind) * scale, k.to(kind), v.to(kind), beta, decay]
    if borders is None:
        o, final = _run(*[*tokens, memory])
        return o.to(v.dtype), final
    parts = []
    for n, (start, end) in enumerate(pairwise(borders)):
        own: list[Any] = [None if x is None else x[:, start:end] for x in tokens]
        parts.append(_run(*[*own, memory[n : n + 1]]))
    return torch.cat([o for o, _ in parts], 1).to(v.dtype), torch.cat([final for _, final in parts])
