"""Calls that an offline report compiles and counts: every kernel, in its main variants."""

from collections.abc import Callable

import torch

from . import short_conv


def plan(
    *, packed: bool, state: bool, batch: int = 8, length: int = 4096, channels: int = 1024, choices: int = 0
) -> None:
    """Forward and backward of width 4 in bfloat16 with SiLU; of ``choices`` slots a token, read by an index."""
    shape = (1, batch * length, channels) if packed else (batch, length, channels)
    x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(channels, 4, dtype=torch.bfloat16, requires_grad=True)
    borders = torch.arange(0, batch * length + 1, length, dtype=torch.int32) if packed else None
    past = {"x": torch.empty(batch, 3, channels, dtype=torch.bfloat16, requires_grad=True)} if state else None
    index = inverse = None
    if choices:
        inverse = torch.empty(*shape[:2], choices, dtype=torch.int64)
        index = inverse.flatten()
        borders = torch.arange(0, index.numel() + 1, index.numel() // (8 * batch), dtype=torch.int32)
    y, _ = short_conv(
        x, weight, activation="silu", state=past, cu_seqlens=borders, index=index, inverse=inverse, backend="triton"
    )
    y.backward(torch.empty_like(y))


PLANS: dict[str, Callable[[], None]] = {
    "c1024_k4_silu_bf16": lambda: plan(packed=False, state=False),
    "c1024_k4_silu_packed_state_bf16": lambda: plan(packed=True, state=True),
    "c1024_k4_silu_index3_bf16": lambda: plan(packed=True, state=False, choices=3),
}
