"""Calls that an offline report compiles and counts: every kernel, in its main variants."""

from collections.abc import Callable

import torch

from . import window_attention


def plan(width: int, *, window: int | None, extras: bool, batch: int = 8, length: int = 4096) -> None:
    """Forward and backward of 1024 channels in bfloat16; with ``extras`` grouped, packed, a prefix and a cache."""
    heads = 1024 // width
    shared = heads // 4 if extras else heads
    rows = 1 if extras else batch
    tokens = batch * length // rows

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)

    q, k, v = empty(rows, tokens, heads, width), empty(rows, tokens, shared, width), empty(rows, tokens, shared, width)
    options: dict = {}
    if extras:
        past = 511 if window is None else window - 1
        count = torch.zeros(batch, dtype=torch.int32)
        cache = {name: empty(batch, past, shared, width) for name in ("k", "v")}
        options["prefix"] = (empty(16, shared, width), empty(16, shared, width))
        options["state"] = {**cache, "count": count}
        options["cu_seqlens"] = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    o, _ = window_attention(q, k, v, window=window, backend="triton", **options)
    o.backward(torch.empty_like(o))


PLANS: dict[str, Callable[[], None]] = {
    "d64_w512_bf16": lambda: plan(64, window=512, extras=False),
    "d128_w512_prefix_cache_packed_bf16": lambda: plan(128, window=512, extras=True),
}
