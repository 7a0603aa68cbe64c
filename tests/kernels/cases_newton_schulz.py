"""Conformance cases of the Newton-Schulz iteration: every token is a matrix of its own."""

from functools import partial
from typing import Any

from harness import Draw, OperationCase, register_case

from palimpsest.kernels.newton_schulz import newton_schulz
from palimpsest.kernels.newton_schulz.cost import cost
from palimpsest.kernels.op import Cost


def make(draw: Draw, batch: int, length: int, *, shape: tuple[int, int], steps: int) -> dict[str, Any]:
    """Matrices of normal numbers."""
    return {"x": draw.normal(batch, length, *shape), "steps": steps}


def costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward."""
    known = arguments["x"].shape, arguments["steps"]
    return cost(*known), cost(*known, backward=True)


for name, (shape, steps, *backends) in {
    "wide": ((3, 5), 5, "reference", "torch"),
    "tall": ((5, 3), 2, "reference", "torch"),
    "triton": ((5, 3), 2, "triton"),
}.items():
    register_case(
        OperationCase(
            name=f"newton_schulz/{name}",
            operation="newton_schulz",
            call=newton_schulz,
            make=partial(make, shape=shape, steps=steps),
            tokens=("x",),
            block=1 if "triton" in backends else 2,
            cost=costs,
            # Triton multiplies half precision in its own dtype, and every step makes its error three times as large:
            # what is left is checked in test_newton_schulz.py, for what it is.
            half="triton" not in backends,
            backends=tuple(backends),
        )
    )
