"""Small kernels whose machine code is known in kind: what the tests of the profiler compile."""

from typing import Any

import torch
import triton
import triton.language as tl

from palimpsest.kernels.launch import Config, Kernel


@triton.jit(do_not_specialize=["T"])
def product(x, y, o, T, rounds, scale, D: tl.constexpr, STRIDED: tl.constexpr, stride, BLOCK: tl.constexpr):
    """o = scale * sum over rounds of x @ y; with STRIDED, x has a stride that is known only at run time."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    total = tl.zeros([BLOCK, D], tl.float32)
    if not STRIDED:
        stride = 1
    for i in range(rounds):
        a = tl.load(x + rows[:, None] * D + columns[None, :] * stride + i * T * D, mask=rows[:, None] < T, other=0.0)
        b = tl.load(y + columns[:, None] * D + columns[None, :] + i * D * D)
        total = tl.dot(a, b, total)
    tl.store(o + rows[:, None] * D + columns[None, :], total * scale, mask=rows[:, None] < T)


@triton.jit
def crowded(x, o, rounds, N: tl.constexpr):
    """Keeps two tiles of N numbers over a loop: for N = 4096 and one warp 256 registers a thread; it has 255."""
    i = tl.arange(0, N)
    tile = tl.load(x + i)
    total = tile
    for _ in range(rounds):
        total = total * tile + tl.sum(total, 0)
    tl.store(o + i, total)


CONFIGS = [Config((("BLOCK", 64),), num_warps=4, num_stages=3), Config((("BLOCK", 16),), num_warps=1, num_stages=1)]


def product_canary(constants: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Seventy tokens, two rounds."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 64, generator=draw) for n in (70, 64))
    o = torch.empty(70, 64)
    arguments = {"x": x, "y": y, "o": o, "T": 70, "rounds": 2, "scale": 0.5, "stride": 1}
    PRODUCT(lambda every: (triton.cdiv(70, every["BLOCK"]),), arguments, constants)
    return [(o, 0.5 * (x @ y).sum(0))]


def crowded_canary(constants: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One round."""
    x = torch.linspace(-1, 1, constants["N"]) + 0.01
    o = torch.empty_like(x)
    CROWDED(lambda every: (1,), {"x": x, "o": o, "rounds": 1}, constants)
    return [(o, x * x + x.sum())]


PRODUCT = Kernel(product, lambda constants: CONFIGS, product_canary, name="sample_product")
CROWDED = Kernel(crowded, lambda constants: [Config(num_warps=1)], crowded_canary, name="sample_crowded")


def call_product(dtype: torch.dtype = torch.bfloat16, tokens: int = 1000, rounds: int = 16, stride: int = 1) -> None:
    """Launch ``product``."""
    x, y = torch.empty(rounds, tokens, 64, dtype=dtype), torch.empty(rounds, 64, 64, dtype=dtype)
    arguments = {"x": x, "y": y, "o": torch.empty(tokens, 64), "T": tokens, "rounds": rounds, "scale": 0.5}
    PRODUCT(
        lambda every: (triton.cdiv(tokens, every["BLOCK"]),),
        arguments | {"stride": stride},
        {"D": 64, "STRIDED": stride != 1},
    )


def call_crowded() -> None:
    """Launch ``crowded``."""
    x = torch.empty(4096)
    CROWDED(lambda every: (1,), {"x": x, "o": torch.empty_like(x), "rounds": 3}, {"N": 4096})


PLANS = {
    "product_bf16": call_product,
    "product_strided": lambda: call_product(stride=3),
    "product_one_round": lambda: call_product(rounds=1),
    "crowded": call_crowded,
}

#: What the plans do not reach: another type, and what spills.
VARIANTS = {"product_fp16": lambda: call_product(torch.float16), "crowded": call_crowded}
