"""Calls that an offline report compiles and counts: every kernel, in its main variants."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import l2_norm, rms_norm


def empty(*shape: int) -> Tensor:
    """A tensor in bfloat16 that wants a gradient."""
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)


def plan(y: Tensor) -> None:
    """The backward of a forward."""
    y.backward(torch.empty_like(y))


PLANS: dict[str, Callable[[], None]] = {
    "rms_d1024_weight_bf16": lambda: plan(rms_norm(empty(8, 4096, 1024), empty(1024), backend="triton")),
    "rms_d64_weight_gate_bf16": lambda: plan(
        rms_norm(empty(8, 4096, 16, 64), empty(64), gate=empty(8, 4096, 16, 64), backend="triton")
    ),
    "l2_d64_bf16": lambda: plan(l2_norm(empty(8, 4096, 16, 64), backend="triton")),
}
