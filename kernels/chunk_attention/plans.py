"""Calls that an offline report compiles and counts: every kernel, in its main variants."""

from collections.abc import Callable

import torch

from . import chunk_attention


def plan(width: int, chunk_size: int, *, read: str, share: int = 64, borders: bool = False) -> None:
    """Forward and backward of 1024 channels in bfloat16, 16 of the chunks; with ``borders`` of unequal lengths."""
    heads, batch, length = 1024 // width, 1 if borders else 8, 4096
    cuts = torch.arange(0, length + 1, chunk_size, dtype=torch.int32) if borders else None

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)

    q, k, v = (empty(batch, length, h, width) for h in (heads, heads // 4, heads // 4))
    summary_q, summary_k = empty(batch, length, 1, 64), empty(batch, length // chunk_size, 1, 64)
    chunks = {"cu_chunks": cuts} if borders else {"chunk_size": chunk_size}
    options = {**chunks, "top_k": 16, "read": read, "share": share, "return_selection": True, "backend": "triton"}
    o, _ = chunk_attention(q, k, v, summary_q, summary_k, **options)  # type: ignore[arg-type]
    o.backward(torch.empty_like(o))


PLANS: dict[str, Callable[[], None]] = {
    "two_level_d64_c64_share64_bf16": lambda: plan(64, 64, read="two_level"),
    "union_d64_c32_share64_bf16": lambda: plan(64, 32, read="union"),
    "two_level_d128_borders_share1_bf16": lambda: plan(128, 64, read="two_level", share=1, borders=True),
}
