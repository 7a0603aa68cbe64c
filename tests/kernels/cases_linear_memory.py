"""Conformance cases of the linear memories: delta rule and linear attention."""

from functools import partial
from typing import Any

import torch
from harness import Draw, OperationCase, register_case

from palimpsest.kernels import delta_rule, linear_attention
from palimpsest.kernels.linear_memory.cost import linear_memory_cost
from palimpsest.kernels.op import Cost


def make(
    draw: Draw, batch: int, length: int, *, delta: bool, decay: float, widths: tuple[int, int], chunk: int, heads: int
) -> dict[str, Any]:
    """Unit keys as a layer would give them; log decays down to ``decay`` (0: none)."""
    # Gates stay in float32 where tokens are halves, as the operation demands.
    gate = torch.float64 if draw.dtype == torch.float64 else torch.float32
    shape = (batch, length, heads)
    found: dict[str, Any] = {
        "q": draw.normal(*shape, widths[0]),
        "k": torch.nn.functional.normalize(draw.normal(*shape, widths[0]), dim=-1),
        "v": draw.normal(*shape, widths[1]),
        "log_decay": draw.uniform(decay, 0.0, *shape, dtype=gate) if decay else None,
        "chunk_size": chunk,
    }
    if delta:
        found["beta"] = draw.uniform(0.0, 1.0, *shape, dtype=gate)
    return found


def costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward."""
    sizes = *arguments["q"].shape, arguments["v"].shape[-1]
    one = partial(linear_memory_cost, *sizes, delta="beta" in arguments, chunk_size=arguments["chunk_size"])
    return one(), one(backward=True)


def add(name: str, delta: bool, decay: float, widths: tuple[int, int], chunk: int, heads: int = 2, **more: Any) -> None:
    """Register one case."""
    operation = "delta_rule" if delta else "linear_attention"
    register_case(
        OperationCase(
            name=f"{operation}/{name}",
            operation=operation,
            call=delta_rule if delta else linear_attention,
            make=partial(make, delta=delta, decay=decay, widths=widths, chunk=chunk, heads=heads),
            tokens=("q", "k", "v", "beta", "log_decay") if delta else ("q", "k", "v", "log_decay"),
            state=True,
            packed=True,
            cost=costs,
            **{"block": chunk, **more},
        )
    )


add("gated", True, -0.5, (5, 4), 8)
add("plain", True, 0.0, (4, 6), 4)
add("decay", False, -0.5, (4, 5), 8)
add("plain", False, 0.0, (5, 4), 4)

# The kernels in the interpreter, which takes 0.1 s for a chunk of a head, forward and backward: one head, and lengths
# up to 17, two chunks. The other switches, widths and chunk sizes are in test_linear_memory.py.
TRITON: dict[str, Any] = {"chunk": 16, "heads": 1, "block": 7, "backends": ("triton",), "single": 1e-5}
add("triton_gated", True, -0.5, (16, 32), **TRITON)
add("triton_decay", False, -0.5, (32, 16), **TRITON)
