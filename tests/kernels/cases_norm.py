"""Conformance cases of the norms."""

from functools import partial
from typing import Any

from harness import Draw, OperationCase, register_case

from palimpsest.kernels.norm import l2_norm, rms_norm
from palimpsest.kernels.norm.cost import cost
from palimpsest.kernels.op import Cost


def make(draw: Draw, batch: int, length: int, *, weight: bool, gate: bool) -> dict[str, Any]:
    """Tokens of width 7, with the optional arguments that are wished."""
    arguments = {"x": draw.normal(batch, length, 7)}
    if weight:
        arguments["weight"] = Draw(5, draw.dtype).normal(7)
    if gate:
        arguments["gate"] = draw.normal(batch, length, 7)
    return arguments


def costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward."""
    known = {"weight": "weight" in arguments, "gate": "gate" in arguments}
    return cost(arguments["x"].shape, **known), cost(arguments["x"].shape, **known, backward=True)


PLAIN = ("reference", "torch")

for name, (operation, call, weight, gate, *backends) in {
    "rms_norm/plain": ("rms_norm", rms_norm, False, False, *PLAIN),
    "rms_norm/weight": ("rms_norm", rms_norm, True, False, *PLAIN, "triton"),
    "rms_norm/gate": ("rms_norm", rms_norm, False, True, *PLAIN),
    "rms_norm/weight_gate": ("rms_norm", rms_norm, True, True, *PLAIN, "triton"),
    "l2_norm": ("l2_norm", l2_norm, False, False, *PLAIN, "triton"),
}.items():
    register_case(
        OperationCase(
            name=name,
            operation=operation,
            call=call,
            make=partial(make, weight=weight, gate=gate),
            tokens=("x", "gate") if gate else ("x",),
            cost=costs,
            backends=tuple(backends),
        )
    )
