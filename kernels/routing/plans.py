"""Calls that an offline report compiles and counts: every kernel, in its main variants."""

from collections.abc import Callable

import torch

from . import combine, dispatch, route


def plan(memories: int, top_k: int, *, packed: bool, batch: int = 8, length: int = 4096, channels: int = 1024) -> None:
    """Forward and backward of routing, with a shared memory, there and back in bfloat16."""
    shape = (1, batch * length) if packed else (batch, length)
    logits = torch.empty(*shape, memories, dtype=torch.bfloat16, requires_grad=True)
    x = torch.empty(*shape, channels, dtype=torch.bfloat16, requires_grad=True)
    borders = torch.arange(0, batch * length + 1, length, dtype=torch.int32) if packed else None
    routing = route(logits, top_k, shared=True, cu_seqlens=borders, backend="triton")
    y = combine(dispatch(x, routing, "triton"), routing, "triton")
    y.backward(torch.empty_like(y))


PLANS: dict[str, Callable[[], None]] = {
    "e4_top2_c1024_bf16": lambda: plan(4, 2, packed=False),
    "e64_top8_c1024_packed_bf16": lambda: plan(64, 8, packed=True),
}
