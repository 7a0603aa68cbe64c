"""Calls that an offline report compiles and counts: every kernel, in its main variants."""

from collections.abc import Callable

import torch

from . import newton_schulz


def plan(*shape: int) -> None:
    """Forward and backward of a momentum per head and chunk, in bfloat16."""
    x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
    y = newton_schulz(x, backend="triton")
    y.backward(torch.empty_like(y))


PLANS: dict[str, Callable[[], None]] = {
    "m512_n128_bf16": lambda: plan(8, 16, 128, 512),
}
