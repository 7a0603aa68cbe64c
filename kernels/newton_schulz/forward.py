"""The Newton-Schulz iteration in Triton, forward: a program holds one matrix through all steps.

The matrix is taken [k, l] with k <= l, by exchanging its strides. A step needs X and its transpose as operands; the
transpose is read back from memory, where X was just written, for Triton has miscompiled products with the transpose of
a result. Programs see only their own matrix, so that a barrier orders the two.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel, Pairs, precision
from . import chunked


@triton.jit
def read(x, row, column, K: tl.constexpr, L: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """The matrix [k, l] at x, or with ``row`` [1, k] and ``column`` [l, 1] its transpose."""
    place = x + row * ROW + column * COLUMN
    if row.numel * column.numel == K * L:
        return tl.load(place)
    else:
        return tl.load(place, mask=(row < K) & (column < L), other=0.0)


@triton.jit
def write(x, y, row, column, K: tl.constexpr, L: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """y as the matrix at x, in its dtype."""
    place = x + row * ROW + column * COLUMN
    if row.numel * column.numel == K * L:
        tl.store(place, y.to(x.dtype.element_ty))
    else:
        tl.store(place, y.to(x.dtype.element_ty), mask=(row < K) & (column < L))


@triton.jit
def begin(x, row, column, eps, K: tl.constexpr, L: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """X_0, and the factor that made it from x."""
    y = read(x, row, column, K, L, ROW, COLUMN).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(y * y) + eps * eps)
    return y * factor, factor


@triton.jit
def squares(narrow, flipped, b, c, PRECISION: tl.constexpr):
    """c A and b A + c A^2 for A = Y Y^T, as operands of products."""
    square = tl.dot(narrow, flipped, input_precision=PRECISION)
    plain, scaled = square.to(narrow.dtype), (c * square).to(narrow.dtype)
    return scaled, tl.dot(scaled, plain, b * square, input_precision=PRECISION).to(narrow.dtype)


@triton.jit
def advance(
    y, scratch, row, column, a, b, c,
    K: tl.constexpr, L: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The next iterate; Y itself is written to ``scratch``."""
    write(scratch, y, row, column, K, L, ROW, COLUMN)
    tl.debug_barrier()
    narrow = y.to(scratch.dtype.element_ty)
    _, p = squares(narrow, read(scratch, tl.trans(row), tl.trans(column), K, L, ROW, COLUMN), b, c, PRECISION)
    tl.debug_barrier()
    return tl.dot(p, narrow, a * y, input_precision=PRECISION)


@triton.jit
def newton_schulz_forward(
    x, out, a, b, c, eps,
    K: tl.constexpr, L: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, STEPS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Program (matrix). ``out`` holds every iterate on its way."""
    first = tl.program_id(0).to(tl.int64) * (K * L)
    row, column = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_L)[None, :]
    y, _ = begin(x + first, row, column, eps, K, L, ROW, COLUMN)
    for _ in range(STEPS):
        y = advance(y, out + first, row, column, a, b, c, K, L, ROW, COLUMN, PRECISION)
    write(out + first, y, row, column, K, L, ROW, COLUMN)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """The matrix whole; loads are never moved ahead of a barrier (one stage)."""
    blocks = tuple((f"BLOCK_{name}", max(16, triton.next_power_of_2(constants[name]))) for name in "KL")
    return [Config(blocks, num_warps=warps, num_stages=1) for warps in (8, 4)]


def problem(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with these constants: five matrices of normal numbers, of very different sizes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    shape = (constants["K"], constants["L"])
    x = torch.randn((5, *(shape if constants["COLUMN"] == 1 else shape[::-1])), generator=source, device=device)
    x *= 10.0 ** torch.arange(-2, 3, device=device)[:, None, None]
    numbers = {"steps": constants["STEPS"], "a": 3.4445, "b": -4.7750, "c": 2.0315, "eps": 1e-7}
    return {"x": x.to(getattr(torch, constants["DTYPE"])), **numbers}


def canary(constants: Mapping[str, Any]) -> Pairs:
    """The last iterate against the plain path."""
    arguments = problem(constants)
    x, *numbers = arguments.values()
    return [(forward(x, *numbers), chunked.forward.body(x.float(), *numbers))]


FORWARD = Kernel(newton_schulz_forward, configs, canary)


def call(x: Tensor, steps: int) -> dict[str, Any]:
    """Constants that the kernels of forward and backward have in common."""
    m, n = x.shape[1:]
    return {
        "K": min(m, n),
        "L": max(m, n),
        "ROW": n if m <= n else 1,
        "COLUMN": 1 if m <= n else n,
        "STEPS": steps,
        "DTYPE": str(x.dtype).removeprefix("torch."),
        "PRECISION": precision(x.dtype),
    }


def forward(x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """The last iterate of every matrix of x [N, m, n]."""
    out = x.new_empty(x.shape)
    arguments = {"x": x.contiguous(), "out": out, "a": a, "b": b, "c": c, "eps": eps}
    FORWARD(lambda it: (len(x),), arguments, call(x, steps))
    return out
