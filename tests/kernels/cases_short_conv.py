"""Conformance cases of the short convolution."""

from functools import partial
from typing import Any

from harness import Draw, OperationCase, register_case

from palimpsest.kernels.op import Cost
from palimpsest.kernels.short_conv import short_conv
from palimpsest.kernels.short_conv.cost import cost


def make(draw: Draw, batch: int, length: int, *, width: int, bias: bool, activation: str | None) -> dict[str, Any]:
    """Six channels; parameters are the same for every batch and length."""
    own = Draw(5, draw.dtype)
    return {
        "x": draw.normal(batch, length, 6),
        "weight": own.normal(6, width),
        "bias": own.normal(6) if bias else None,
        "activation": activation,
    }


def costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward."""
    shapes = arguments["x"].shape, arguments["weight"].shape
    return cost(*shapes), cost(*shapes, backward=True)


for name, options in {
    "plain": {"width": 3, "bias": False, "activation": None},
    "silu_bias": {"width": 4, "bias": True, "activation": "silu"},
    "width_1": {"width": 1, "bias": True, "activation": None},
}.items():
    register_case(
        OperationCase(
            name=f"short_conv/{name}",
            operation="short_conv",
            call=short_conv,
            make=partial(make, **options),
            tokens=("x",),
            state=True,
            packed=True,
            block=4,
            cost=costs,
        )
    )

register_case(
    OperationCase(
        name="short_conv/triton",
        operation="short_conv",
        call=short_conv,
        make=partial(make, width=3, bias=True, activation="silu"),
        tokens=("x",),
        state=True,
        packed=True,
        block=4,
        cost=costs,
        backends=("triton",),
    )
)
