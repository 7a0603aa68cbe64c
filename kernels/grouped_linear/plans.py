"""Calls that an offline report compiles and counts: every kernel, in its main variants."""

from collections.abc import Callable

import torch

from ..routing import Routing
from . import grouped_linear


def plan(inner: int, outer: int, *, rows: int = 8, length: int = 4096, memories: int = 5, choices: int = 3) -> None:
    """Forward and backward in bfloat16 over four memories, of which each token goes to two, and a shared one."""
    x = torch.empty(rows, length, inner, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(memories, inner, outer, dtype=torch.bfloat16, requires_grad=True)
    held = torch.empty(rows, length, choices)
    slots = torch.empty(rows, length, choices, dtype=torch.int64)
    borders = torch.empty(rows * memories + 1, dtype=torch.int32)
    routing = Routing(held, slots, slots.flatten(), slots, borders, held, memories, choices)
    y = grouped_linear(x, weight, routing, "triton")
    y.backward(torch.empty_like(y))


PLANS: dict[str, Callable[[], None]] = {
    "in1024_out2048_bf16": lambda: plan(1024, 2048),
    "in1024_out32_bf16": lambda: plan(1024, 32),
}
