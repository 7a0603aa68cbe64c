"""The Newton-Schulz iteration in Triton, forward: a program takes one matrix through all steps, tile by tile.

The matrix is taken [k, l] with k <= l, by exchanging its strides. Iterates and products of [k, k] lie in memory, in
float32, and are read again tile by tile: what a program holds is one tile of a product, so that matrices of any size
fit; all that the programs of a GPU work on at a time fits its cache. Programs see only their own matrix, and a barrier
between two products orders what one writes and the other reads.
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
def tile(x, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """A tile of a matrix [ROWS, COLUMNS] of these strides in float32, zeros beyond it."""
    place = x + row[:, None] * ROW + column[None, :] * COLUMN
    if ((row.shape[0] - 1) & ROWS) + ((column.shape[0] - 1) & COLUMNS) == 0:  # powers of two that divide them
        return tl.load(place).to(tl.float32)
    else:
        mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
        return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def put(x, y, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """Write a tile."""
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(x + row[:, None] * ROW + column[None, :] * COLUMN, y.to(x.dtype.element_ty), mask=mask)


@triton.jit
def multiply(
    out, left, right, before, scale, keep, like, rows, depths, columns,
    ROWS: tl.constexpr, DEPTHS: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr, TURNED: tl.constexpr,
    BOTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = left right, or with ADD scale * left right + keep * before, [ROWS, COLUMNS]; operands in like's dtype.

    TURNED: ``right`` is the transpose of what lies there. BOTH: ``left`` is the sum of what lies there and its
    transpose. A barrier before and after it belongs to the caller. Sizes are given a second time as numbers that the
    compiler does not know: it unrolls loops of known length.
    """
    span = tl.arange(0, BLOCK)
    for i in range(0, rows, BLOCK):
        for j in range(0, columns, BLOCK):
            row, column = i + span, j + span
            total = tl.zeros([BLOCK, BLOCK], tl.float32)
            for begin in range(0, depths, BLOCK):
                depth = begin + span
                a = tile(left, row, depth, ROWS, DEPTHS, DEPTHS, 1)
                if BOTH:
                    a += tile(left, row, depth, ROWS, DEPTHS, 1, DEPTHS)
                if TURNED:
                    b = tile(right, depth, column, DEPTHS, COLUMNS, 1, DEPTHS)
                else:
                    b = tile(right, depth, column, DEPTHS, COLUMNS, COLUMNS, 1)
                kind = like.dtype.element_ty
                total = tl.dot(a.to(kind), b.to(kind), total, input_precision=PRECISION)
            if ADD:
                total = scale * total + keep * tile(before, row, column, ROWS, COLUMNS, COLUMNS, 1)
            put(out, total, row, column, ROWS, COLUMNS, COLUMNS, 1)


@triton.jit
def scale_of(
    x, eps, small, large, K: tl.constexpr, L: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The factor that makes X_0 of x."""
    span = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, small, BLOCK):
        for j in range(0, large, BLOCK):
            y = tile(x, i + span, j + span, K, L, ROW, COLUMN)
            total += y * y
    return 1.0 / tl.sqrt(tl.sum(total) + eps * eps)


@triton.jit
def copy(
    out, x, factor, small, large, K: tl.constexpr, L: tl.constexpr, OUT_ROW: tl.constexpr, OUT_COLUMN: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = factor * x, [k, l], of other strides and dtype."""
    span = tl.arange(0, BLOCK)
    for i in range(0, small, BLOCK):
        for j in range(0, large, BLOCK):
            y = factor * tile(x, i + span, j + span, K, L, ROW, COLUMN)
            put(out, y, i + span, j + span, K, L, OUT_ROW, OUT_COLUMN)


@triton.jit
def polynomial(
    y, square, p, like, b, c, small, large, K: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A = Y Y^T to ``square`` and b A + c A^2 to ``p``."""
    tl.debug_barrier()
    multiply(square, y, y, y, 1.0, 0.0, like, small, large, small, K, L, K, False, True, False, PRECISION, BLOCK)
    tl.debug_barrier()
    multiply(p, square, square, square, c, b, like, small, small, small, K, K, K, True, False, False, PRECISION, BLOCK)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["small", "large", "steps", "slots"])
def newton_schulz_forward(
    x, out, iterates, squares, small, large, steps, slots, a, b, c, eps,
    K: tl.constexpr, L: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (matrix). Iterate i goes to place i % slots of iterates [N, slots, k, l]; ``squares`` [N, 2, k, k]."""
    number = tl.program_id(0).to(tl.int64)
    first, own, square = number * (K * L), iterates + number * slots * (K * L), squares + number * (2 * K * K)
    factor = scale_of(x + first, eps, small, large, K, L, ROW, COLUMN, BLOCK)
    copy(own, x + first, factor, small, large, K, L, L, 1, ROW, COLUMN, BLOCK)
    for step in range(steps):
        y, p, later = own + step % slots * (K * L), square + K * K, own + (step + 1) % slots * (K * L)
        polynomial(y, square, p, x, b, c, small, large, K, L, PRECISION, BLOCK)
        multiply(later, p, y, y, 1.0, a, x, small, small, large, K, K, L, True, False, False, PRECISION, BLOCK)
    tl.debug_barrier()
    copy(out + first, own + steps % slots * (K * L), 1.0, small, large, K, L, ROW, COLUMN, L, 1, BLOCK)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """Tiles as wide as the smaller side, up to 64, or half of that; one stage: no load may pass a barrier."""
    wide = min(64, max(16, triton.next_power_of_2(constants["K"])))
    sizes = ((wide, 8 if wide == 64 else 4), (max(16, wide // 2), 2 if wide == 16 else 4))
    return [Config((("BLOCK", block),), num_warps=warps, num_stages=1) for block, warps in sizes]


def problem(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with these constants: three steps of five matrices of normal numbers, of different sizes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    shape = (constants["K"], constants["L"])
    x = torch.randn((5, *(shape if constants["COLUMN"] == 1 else shape[::-1])), generator=source, device=device)
    x *= 10.0 ** torch.arange(-2, 3, device=device)[:, None, None]
    numbers = {"steps": 3, "a": 3.4445, "b": -4.7750, "c": 2.0315, "eps": 1e-7}
    return {"x": x.to(getattr(torch, constants["DTYPE"])), **numbers}


def canary(constants: Mapping[str, Any]) -> Pairs:
    """The last iterate against the plain path."""
    x, *numbers = problem(constants).values()
    return [(forward(x, *numbers), chunked.forward(x.float(), *numbers))]


FORWARD = Kernel(newton_schulz_forward, configs, canary)


def call(x: Tensor) -> dict[str, Any]:
    """Constants that the kernels of forward and backward have in common."""
    m, n = x.shape[1:]
    return {
        "K": min(m, n),
        "L": max(m, n),
        "ROW": n if m <= n else 1,
        "COLUMN": 1 if m <= n else n,
        "DTYPE": str(x.dtype).removeprefix("torch."),
        "PRECISION": precision(x.dtype),
    }


def run(x: Tensor, out: Tensor, slots: int, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """The last iterate to ``out``, and the last ``slots`` of them [N, slots, k, l]."""
    small, large = sorted(x.shape[1:])
    iterates, squares = (
        x.new_empty(len(x), *shape, dtype=torch.float32) for shape in ((slots, small, large), (2, small, small))
    )
    tensors = {"x": x, "out": out, "iterates": iterates, "squares": squares}
    numbers = {"small": small, "large": large, "steps": steps, "slots": slots, "a": a, "b": b, "c": c, "eps": eps}
    FORWARD(lambda it: (len(x),), {**tensors, **numbers}, call(x))
    return iterates


def forward(x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """The last iterate of every matrix of x [N, m, n]."""
    out = x.new_empty(x.shape)
    run(x.contiguous(), out, 2, steps, a, b, c, eps)
    return out
