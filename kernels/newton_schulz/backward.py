"""The Newton-Schulz iteration in Triton, backward: the forward's kernel once more, and one that goes back over it.

Iterates and gradients lie in memory in float32, as in the forward. With G the gradient of Y' = a Y + P Y, where
P = b A + c A^2, A = Y Y^T, S = G Y^T, Q = S + S^T and T = Q A:

    dY = a G + P G + R Y        R = b Q + c (T + T^T)
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Kernel, Pairs
from . import chunked
from .forward import call, configs, copy, multiply, polynomial, problem, put, run, scale_of, tile


@triton.jit
def both(out, s, t, b, c, small, K: tl.constexpr, BLOCK: tl.constexpr):
    """out = b (S + S^T) + c (T + T^T)."""
    span = tl.arange(0, BLOCK)
    for i in range(0, small, BLOCK):
        for j in range(0, small, BLOCK):
            row, column = i + span, j + span
            y = b * (tile(s, row, column, K, K, K, 1) + tile(s, row, column, K, K, 1, K))
            y += c * (tile(t, row, column, K, K, K, 1) + tile(t, row, column, K, K, 1, K))
            put(out, y, row, column, K, K, K, 1)


@triton.jit
def finish(
    d_x, g, y, factor, small, large, K: tl.constexpr, L: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Through X_0 = factor x: factor (G - X_0 sum(G X_0))."""
    span = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, small, BLOCK):
        for j in range(0, large, BLOCK):
            row, column = i + span, j + span
            total += tile(g, row, column, K, L, L, 1) * tile(y, row, column, K, L, L, 1)
    along = tl.sum(total)
    for i in range(0, small, BLOCK):
        for j in range(0, large, BLOCK):
            row, column = i + span, j + span
            of_x = factor * (tile(g, row, column, K, L, L, 1) - along * tile(y, row, column, K, L, L, 1))
            put(d_x, of_x, row, column, K, L, ROW, COLUMN)


@triton.jit(do_not_specialize=["small", "large", "steps", "slots"])
def newton_schulz_backward(
    grad, x, d_x, iterates, squares, slopes, small, large, steps, slots, a, b, c, eps,
    K: tl.constexpr, L: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (matrix). ``iterates`` [N, slots, k, l] before every step, ``squares`` [N, 4, k, k], ``slopes``
    [N, 2, k, l]."""
    number = tl.program_id(0).to(tl.int64)
    first, own = number * (K * L), iterates + number * slots * (K * L)
    square, slope = squares + number * (4 * K * K), slopes + number * (2 * K * L)
    p, s, t = square + K * K, square + 2 * K * K, square + 3 * K * K
    copy(slope, grad + first, 1.0, small, large, K, L, L, 1, ROW, COLUMN, BLOCK)
    for done in range(steps):
        y = own + (steps - 1 - done) * (K * L)
        g, earlier = slope + done % 2 * (K * L), slope + (1 - done % 2) * (K * L)
        polynomial(y, square, p, x, b, c, small, large, K, L, PRECISION, BLOCK)
        multiply(s, g, y, y, 1.0, 0.0, x, small, large, small, K, L, K, False, True, False, PRECISION, BLOCK)
        multiply(earlier, p, g, g, 1.0, a, x, small, small, large, K, K, L, True, False, False, PRECISION, BLOCK)
        tl.debug_barrier()
        multiply(t, s, square, y, 1.0, 0.0, x, small, small, small, K, K, K, False, False, True, PRECISION, BLOCK)
        tl.debug_barrier()
        both(square, s, t, b, c, small, K, BLOCK)
        tl.debug_barrier()
        multiply(
            earlier, square, y, earlier, 1.0, 1.0, x, small, small, large, K, K, L, True, False, False, PRECISION, BLOCK
        )
    tl.debug_barrier()
    factor = scale_of(x + first, eps, small, large, K, L, ROW, COLUMN, BLOCK)
    finish(d_x + first, slope + steps % 2 * (K * L), own, factor, small, large, K, L, ROW, COLUMN, BLOCK)


def canary(constants: Mapping[str, Any]) -> Pairs:
    """The gradient against the plain path's."""
    x, *numbers = problem(constants).values()
    grad = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device)
    found = backward(grad.to(x.dtype), x, *numbers)
    wanted = chunked.backward(grad, x.float(), *numbers)
    return list(zip(found, wanted, strict=True))  # by matrix: their gradients differ in size as they do


BACKWARD = Kernel(newton_schulz_backward, configs, canary)


def backward(grad: Tensor, x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """Gradient of x [N, m, n]."""
    x, d_x, slots = x.contiguous(), x.new_empty(x.shape), max(1, steps)
    iterates = run(x, d_x, slots, slots - 1, a, b, c, eps)
    small, large = iterates.shape[2:]
    tensors = {"grad": grad.contiguous(), "x": x, "d_x": d_x, "iterates": iterates}
    tensors["squares"] = iterates.new_empty(len(x), 4, small, small)
    tensors["slopes"] = iterates.new_empty(len(x), 2, small, large)
    numbers = {"small": small, "large": large, "steps": steps, "slots": slots, "a": a, "b": b, "c": c, "eps": eps}
    BACKWARD(lambda it: (len(x),), {**tensors, **numbers}, call(x))
    return d_x
