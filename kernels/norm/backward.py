"""Normalisation over the last dimension in Triton, backward, in one pass.

With n = x r, u the gradient of the output times silu(gate), and g = u weight that of n:

    dx = r (g - a n sum(g n))     dweight = sum_rows u n     dgate = grad n weight silu'(gate)

a is 1/D for a mean of squares and 1 for their sum. Each program adds up the weight's gradient over a span of rows, and
torch adds these parts.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import sigmoid, silu_slope
from ..launch import Kernel, Pairs
from . import chunked
from .forward import call, configs, problem, span, wide


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    grad, factor, x, weight, gate, d_x, d_gate, parts, rows,
    D: tl.constexpr, DEPTH: tl.constexpr, X_STRIDE: tl.constexpr, MEAN: tl.constexpr, WEIGHT: tl.constexpr,
    GATE: tl.constexpr, DTYPE: tl.constexpr, SPAN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (span of rows)."""
    begin = tl.program_id(0).to(tl.int64) * SPAN
    column = tl.arange(0, DEPTH)
    known = column < D
    if WEIGHT:
        scale = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
        part = tl.zeros([DEPTH], tl.float32)
    for start in range(0, SPAN, BLOCK_R):
        row = begin + start + tl.arange(0, BLOCK_R)
        live = row < rows
        mask = live[:, None] & known[None, :]
        place = row[:, None] * D + column[None, :]
        r = tl.load(factor + row, mask=live, other=0.0)
        n = tl.load(x + row[:, None] * X_STRIDE + column[None, :], mask=mask, other=0.0).to(tl.float32) * r[:, None]
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            z = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
            slope = g * n * silu_slope(z)
            if WEIGHT:
                slope *= scale[None, :]
            tl.store(d_gate + place, slope.to(d_gate.dtype.element_ty), mask=mask)
            g *= z * sigmoid(z)
        if WEIGHT:
            part += tl.sum(g * n, 0)
            g *= scale[None, :]
        along = tl.sum(g * n, 1)
        if MEAN:
            along = along / D
        tl.store(d_x + place, (r[:, None] * (g - n * along[:, None])).to(d_x.dtype.element_ty), mask=mask)
    if WEIGHT:
        tl.store(parts + tl.program_id(0).to(tl.int64) * D + column, part, mask=known)


def canary(constants: Mapping[str, Any]) -> Pairs:
    """Every gradient against the plain path's."""
    arguments = problem(constants)
    exact = wide(arguments)
    del arguments["eps"], exact["eps"]
    x = exact["x"]
    grad = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device)
    factor = chunked.forward.body(x, exact["weight"], exact["gate"], 1e-6, exact["mean"])[1]
    found = backward(grad.to(arguments["x"].dtype), factor, **arguments)
    wanted = chunked.backward.body(grad, factor, *exact.values())
    return [pair for pair in zip(found, wanted, strict=True) if pair[1].numel()]


BACKWARD = Kernel(norm_backward, configs, canary)


def backward(
    grad: Tensor, factor: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, mean: bool
) -> list[Tensor]:
    """Gradients of x, weight and gate; empty for those that were None."""
    arguments, constants = call(x, weight, gate, mean)
    size = span(constants["DEPTH"])
    programs = triton.cdiv(arguments["rows"], size)
    d_x = x.new_empty(x.shape)
    d_gate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    parts = x.new_empty(0 if weight is None else (programs, x.shape[-1]), dtype=torch.float32)
    BACKWARD(
        lambda it: (programs,),
        {**arguments, "grad": grad.contiguous(), "factor": factor, "d_x": d_x, "d_gate": d_gate, "parts": parts},
        {**constants, "SPAN": size},
    )
    return [d_x, x.new_empty(0) if weight is None else parts.sum(0).to(weight.dtype), d_gate]
