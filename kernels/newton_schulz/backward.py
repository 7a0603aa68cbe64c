"""The Newton-Schulz iteration in Triton, backward: a program repeats its matrix's iterates, then goes back over them.

The iterates are written to memory in x's dtype, the operands' own; the gradient passes through dx's memory where its
transpose is needed. With G the gradient of Y' = a Y + P Y, where P = b A + c A^2, A = Y Y^T, and Q = G Y^T + Y G^T:

    dY = a G + P G + (b Q + c (Q A + A Q)) Y
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Kernel, Pairs
from . import chunked
from .forward import advance, begin, call, configs, problem, read, squares, write


@triton.jit
def newton_schulz_backward(
    grad, x, iterates, d_x, a, b, c, eps,
    K: tl.constexpr, L: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, STEPS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Program (matrix)."""
    number = tl.program_id(0).to(tl.int64)
    first = number * (K * L)
    own = iterates + first * STEPS
    row, column = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_L)[None, :]
    y, factor = begin(x + first, row, column, eps, K, L, ROW, COLUMN)
    for i in range(STEPS):
        y = advance(y, own + i * (K * L), row, column, a, b, c, K, L, ROW, COLUMN, PRECISION)
    g = read(grad + first, row, column, K, L, ROW, COLUMN).to(tl.float32)
    for i in range(STEPS):
        here = own + (STEPS - 1 - i) * (K * L)
        tl.debug_barrier()
        write(d_x + first, g, row, column, K, L, ROW, COLUMN)
        tl.debug_barrier()
        # In this order, and with c in an operand, few tiles are alive at a time. Barriers keep them few: without them
        # operands are fetched for several products ahead, and spill.
        flipped = read(here, tl.trans(row), tl.trans(column), K, L, ROW, COLUMN)
        scaled, p = squares(read(here, row, column, K, L, ROW, COLUMN), flipped, b, c, PRECISION)
        tl.debug_barrier()
        half = read(d_x + first, row, column, K, L, ROW, COLUMN)
        g = tl.dot(p, half, a * g, input_precision=PRECISION)
        tl.debug_barrier()
        q = tl.dot(half, flipped, input_precision=PRECISION)
        narrow = read(here, row, column, K, L, ROW, COLUMN)
        turned = read(d_x + first, tl.trans(row), tl.trans(column), K, L, ROW, COLUMN)
        q = tl.dot(narrow, turned, q, input_precision=PRECISION)
        tl.debug_barrier()
        outer = q.to(narrow.dtype)
        r = tl.dot(outer, scaled, b * q, input_precision=PRECISION)
        tl.debug_barrier()
        r = tl.dot(scaled, outer, r, input_precision=PRECISION)
        g = tl.dot(r.to(narrow.dtype), narrow, g, input_precision=PRECISION)
    tl.debug_barrier()
    y, _ = begin(x + first, row, column, eps, K, L, ROW, COLUMN)
    write(d_x + first, (g - y * tl.sum(g * y)) * factor, row, column, K, L, ROW, COLUMN)


def canary(constants: Mapping[str, Any]) -> Pairs:
    """The gradient against the plain path's."""
    x, *numbers = problem(constants).values()
    grad = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device)
    found = backward(grad.to(x.dtype), x, *numbers)
    wanted = chunked.backward.body(grad, x.float(), *numbers)
    return list(zip(found, wanted, strict=True))  # by matrix: their gradients differ in size as they do


BACKWARD = Kernel(newton_schulz_backward, configs, canary)


def backward(grad: Tensor, x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """Gradient of x [N, m, n]."""
    d_x = x.new_empty(x.shape)
    arguments: dict[str, Any] = {"grad": grad.to(x.dtype).contiguous(), "x": x.contiguous(), "d_x": d_x}
    arguments |= {"iterates": x.new_empty(len(x), steps, *x.shape[1:]), "a": a, "b": b, "c": c, "eps": eps}
    BACKWARD(lambda it: (len(x),), arguments, call(x, steps))
    return d_x
