"""Conformance cases of window attention: all that went before, a window, and everything at once."""

from functools import partial
from typing import Any

from harness import Draw, OperationCase, register_case

from palimpsest.kernels.op import Cost
from palimpsest.kernels.window_attention import window_attention
from palimpsest.kernels.window_attention.cost import cost


def make(
    draw: Draw, batch: int, length: int, *, shared: int, prefix: int, window: int | None, heads: int = 4
) -> dict[str, Any]:
    """Heads of width 8 over ``shared`` key heads."""
    arguments: dict[str, Any] = {
        "q": draw.normal(batch, length, heads, 8),
        "k": draw.normal(batch, length, shared, 8),
        "v": draw.normal(batch, length, shared, 8),
        "window": window,
    }
    # Parameters come from a source of their own: the same for every batch and length.
    own = Draw(5, draw.dtype)
    if prefix:
        arguments["prefix"] = (own.normal(prefix, shared, 8), own.normal(prefix, shared, 8))
    return arguments


def costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward."""
    shapes = arguments["q"].shape, arguments["k"].shape
    known = {"window": arguments["window"], "prefix": arguments["prefix"][0].shape[0] if "prefix" in arguments else 0}
    return cost(*shapes, **known), cost(*shapes, **known, backward=True)


for name, options in {
    "full": {"shared": 4, "prefix": 0, "window": None},
    "prefix": {"shared": 2, "prefix": 3, "window": None},
    "window": {"shared": 4, "prefix": 0, "window": 6},
    "window_prefix_grouped": {"shared": 2, "prefix": 3, "window": 6},
}.items():
    register_case(
        OperationCase(
            name=f"window_attention/{name}",
            operation="window_attention",
            call=window_attention,
            make=partial(make, **options),
            tokens=("q", "k", "v"),
            state=True,
            packed=True,
            block=6,
            cost=costs,
        )
    )

for name, options in {
    "triton": {"shared": 1, "prefix": 3, "window": 4, "heads": 2},
    "triton_full": {"shared": 1, "prefix": 0, "window": None, "heads": 1},
}.items():
    everything = bool(options["prefix"])
    register_case(
        OperationCase(
            name=f"window_attention/{name}",
            operation="window_attention",
            call=window_attention,
            make=partial(make, **options),
            tokens=("q", "k", "v"),
            state=everything,
            packed=everything,
            block=4,
            cost=costs,
            backends=("triton",),
        )
    )
