"""Conformance cases of the short convolution."""

from functools import partial
from typing import Any

from harness import Draw, OperationCase, register_case
from torch import Tensor

from palimpsest.kernels import route
from palimpsest.kernels.op import Cost
from palimpsest.kernels.routing.cost import route_cost
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


def call_routed(
    x: Tensor, logits: Tensor, weight: Tensor, bias: Tensor, *, cu_seqlens: Tensor | None = None, backend: str
) -> Tensor:
    """Inside each of three memories; what lies in each token's slots, [B, T, K' C]."""
    routing = route(logits, 2, cu_seqlens=cu_seqlens, backend="torch")
    places = {"cu_seqlens": routing.cu_seqlens, "index": routing.token, "inverse": routing.slot}
    y, _ = short_conv(x, weight, bias, activation="silu", **places, backend=backend)
    return y[0][routing.slot].flatten(2)


def make_routed(draw: Draw, batch: int, length: int) -> dict[str, Any]:
    """Width 3, with bias."""
    arguments = make(draw, batch, length, width=3, bias=True, activation="silu")
    del arguments["activation"]
    return {**arguments, "logits": draw.normal(batch, length, 3)}


def routed_costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward over slots, and of the routing, which here has no gradient."""
    batch, length, channels = arguments["x"].shape
    shapes = (1, 2 * batch * length, channels), arguments["weight"].shape
    return cost(*shapes) + route_cost(arguments["logits"].shape, 2), cost(*shapes, backward=True)


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

register_case(
    OperationCase(
        name="short_conv/routed",
        operation="short_conv",
        call=call_routed,
        make=make_routed,
        tokens=("x", "logits"),
        packed=True,
        block=4,
        cost=routed_costs,
        backends=("reference", "torch", "triton"),
    )
)
