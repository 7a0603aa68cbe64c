"""Conformance cases of the loss: one per token, since rows and tokens must be told apart."""

from functools import partial
from typing import Any

from harness import Draw, OperationCase, register_case

from palimpsest.kernels.cross_entropy import linear_cross_entropy
from palimpsest.kernels.cross_entropy.cost import cost
from palimpsest.kernels.op import Cost


def make(draw: Draw, batch: int, length: int, vocabulary: int = 11, **options: Any) -> dict[str, Any]:
    """Width 7, chunks that cut across rows."""
    return {
        "x": draw.normal(batch, length, 7),
        "weight": Draw(5, draw.dtype).normal(vocabulary, 7),
        "target": draw.integers(vocabulary, batch, length),
        "reduction": "none",
        "chunk": 5,
        **options,
    }


def costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward."""
    shapes = arguments["x"].shape, arguments["weight"].shape
    return cost(*shapes), cost(*shapes, reduction="none", backward=True)


for name, (options, backends) in {
    "plain": ({}, ("reference", "torch")),
    "smoothing_z_softcap": ({"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}, ("reference", "torch")),
    # Two spans of the vocabulary.
    "triton": ({"vocabulary": 140, "chunk": 1}, ("triton",)),
    "triton_all": (
        {"vocabulary": 140, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "filter": 1e-30},
        ("triton",),
    ),
}.items():
    register_case(
        OperationCase(
            name=f"linear_cross_entropy/{name}",
            operation="linear_cross_entropy",
            call=linear_cross_entropy,
            make=partial(make, **options),
            tokens=("x", "target"),
            cost=costs,
            backends=backends,
        )
    )
