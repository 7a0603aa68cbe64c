"""Normalisation over the last dimension in Triton, forward: weight and gate in the same pass."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import sigmoid
from ..launch import Config, Kernel, Pairs
from . import chunked


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    x, weight, gate, y, factor, rows, eps,
    D: tl.constexpr, DEPTH: tl.constexpr, X_STRIDE: tl.constexpr, MEAN: tl.constexpr, WEIGHT: tl.constexpr,
    GATE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (block of rows)."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK_R
    row, column = begin + tl.arange(0, BLOCK_R), tl.arange(0, DEPTH)
    live, known = row < rows, column < D
    mask = live[:, None] & known[None, :]
    value = tl.load(x + row[:, None] * X_STRIDE + column[None, :], mask=mask, other=0.0).to(tl.float32)
    square = tl.sum(value * value, 1)
    if MEAN:
        square = square / D
    r = 1.0 / tl.sqrt(square + eps)
    value = value * r[:, None]
    if WEIGHT:
        value *= tl.load(weight + column, mask=known, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * D + column[None, :]
    if GATE:
        z = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
        value *= z * sigmoid(z)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)
    tl.store(factor + row, r, mask=live)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """About 32 or 16 elements a thread, in whole rows."""
    depth = constants["DEPTH"]
    warps = min(16, max(4, depth // 1024))
    sizes = (max(1, size // depth) for size in (1024 * warps, 512 * warps))
    return [Config((("BLOCK_R", size),), num_warps=warps, num_stages=1) for size in dict.fromkeys(sizes)]


def problem(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with these constants: more rows than a program of the backward takes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    kind, width = getattr(torch, constants["DTYPE"]), constants["D"]
    rows = 2 * span(constants["DEPTH"]) + 5

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device).to(kind)

    return {
        "x": draw(rows, constants["X_STRIDE"])[:, :width],
        "weight": draw(width) if constants["WEIGHT"] else None,
        "gate": draw(rows, width) if constants["GATE"] else None,
        "eps": 1e-6,
        "mean": constants["MEAN"],
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float32."""
    return {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def canary(constants: Mapping[str, Any]) -> Pairs:
    """The output and the factors against the plain path."""
    arguments = problem(constants)
    wanted = chunked.forward.body(*wide(arguments).values())
    return list(zip(forward(**arguments), wanted, strict=True))


FORWARD = Kernel(norm_forward, configs, canary)


def span(depth: int) -> int:
    """Rows of a program of the backward, a multiple of every block: its part of the weight's gradient is one row."""
    return max(64, 16384 // depth)


def call(x: Tensor, weight: Tensor | None, gate: Tensor | None, mean: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that forward and backward have in common; all but the last dimension make rows."""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    arguments = {
        "x": flat,
        "weight": weight if weight is None else weight.contiguous(),
        "gate": gate if gate is None else gate.contiguous(),
        "rows": flat.shape[0],
    }
    constants = {
        "D": width,
        "DEPTH": triton.next_power_of_2(width),
        "X_STRIDE": flat.stride(0),
        "MEAN": mean,
        "WEIGHT": weight is not None,
        "GATE": gate is not None,
        "DTYPE": str(x.dtype).removeprefix("torch."),
    }
    return arguments, constants


def forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and the factor that each token was multiplied by, [..., 1]."""
    arguments, constants = call(x, weight, gate, mean)
    y, factor = x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    FORWARD(
        lambda it: (triton.cdiv(arguments["rows"], it["BLOCK_R"]),),
        {**arguments, "y": y, "factor": factor, "eps": eps},
        constants,
    )
    return y, factor
