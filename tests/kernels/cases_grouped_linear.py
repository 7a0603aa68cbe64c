"""Conformance cases of the grouped linear map."""

from functools import partial
from typing import Any

from harness import Draw, OperationCase, register_case
from torch import Tensor

from palimpsest.kernels import grouped_linear, route
from palimpsest.kernels.grouped_linear.cost import cost
from palimpsest.kernels.op import Cost
from palimpsest.kernels.routing.cost import route_cost

TOP_K = 2


def make(draw: Draw, batch: int, length: int, *, shared: bool) -> dict[str, Any]:
    """Widths 5 and 6; what chooses among three memories; matrices that are the same for every batch and length."""
    matrices = Draw(5, draw.dtype).normal(3 + shared, 5, 6)
    return {
        "x": draw.normal(batch, length, 5),
        "logits": draw.normal(batch, length, 3),
        "weight": matrices,
        "shared": shared,
    }


def call(
    x: Tensor, logits: Tensor, weight: Tensor, shared: bool, *, cu_seqlens: Tensor | None = None, backend: str
) -> Tensor:
    """What lies in each token's slots, [B, T, K out]."""
    routing = route(logits, TOP_K, shared=shared, cu_seqlens=cu_seqlens, backend="torch")
    return grouped_linear(x, weight, routing, backend)[0][routing.slot].flatten(2)


def costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward; the routing here has no gradient."""
    shapes = arguments["x"].shape, arguments["weight"].shape, TOP_K + arguments["shared"]
    return cost(*shapes) + route_cost(arguments["logits"].shape, TOP_K), cost(*shapes, backward=True)


for name, shared, backends in (
    ("plain", False, ("reference", "torch")),
    ("shared", True, ("reference", "torch", "triton")),
):
    register_case(
        OperationCase(
            name=f"grouped_linear/{name}",
            operation="grouped_linear",
            call=call,
            make=partial(make, shared=shared),
            tokens=("x", "logits"),
            packed=True,
            block=4,
            cost=costs,
            backends=backends,
        )
    )
