"""Calls of both linear memories that an offline report compiles and counts."""

from collections.abc import Callable
from typing import Any

import torch


def plan(
    operation: Callable[..., Any],
    *,
    delta: bool,
    decay: bool = True,
    packed: bool = False,
    key_dim: int = 64,
    value_dim: int = 64,
    heads: int = 16,
    batch: int = 8,
    length: int = 4096,
) -> None:
    """Forward and backward in bfloat16 at chunk size 64; ``packed``: documents in one row, and a state."""
    rows, tokens = (1, batch * length) if packed else (batch, length)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    gates: list[torch.Tensor | None] = [empty(rows, tokens, heads, dtype=torch.float32)] * delta
    gates += [empty(rows, tokens, heads, dtype=torch.float32) if decay else None]
    more: dict[str, Any] = {}
    if packed:
        more["cu_seqlens"] = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
        more["state"] = {"memory": empty(batch, heads, key_dim, value_dim, dtype=torch.float32)}
    q, k, v = (empty(rows, tokens, heads, width) for width in (key_dim, key_dim, value_dim))
    o, _ = operation(q, k, v, *gates, backend="triton", **more)
    torch.autograd.grad(o, [q, k, v], torch.empty_like(o))


def decode(operation: Callable[..., Any], *, delta: bool, batch: int = 64, heads: int = 16, key_dim: int = 128) -> None:
    """One token a row in bfloat16, going on from a state."""
    gates = [torch.empty(batch, 1, heads)] * (1 + delta)
    q, k, v = (torch.empty(batch, 1, heads, key_dim, dtype=torch.bfloat16) for _ in range(3))
    state = {"memory": torch.empty(batch, heads, key_dim, key_dim)}
    operation(q, k, v, *gates, state=state, return_state=True, backend="triton")
