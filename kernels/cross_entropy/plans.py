"""Calls that an offline report compiles and counts: every kernel, in its main variants."""

from collections.abc import Callable

import torch

from . import linear_cross_entropy


def plan(vocabulary: int, *, tokens: int = 32768, width: int = 1024, **options: float) -> None:
    """Forward and backward in bfloat16; without any storage, for weight and gradients are large."""
    x = torch.empty(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
    target = torch.empty(tokens, dtype=torch.int64).zero_()
    linear_cross_entropy(x, weight, target, backend="triton", **options).backward()  # type: ignore[arg-type]


PLANS: dict[str, Callable[[], None]] = {
    "d1024_v32k_bf16": lambda: plan(32768),
    "d1024_v32k_filter_smoothing_z_softcap_one_span_bf16": lambda: plan(
        32768, filter=2**-12, label_smoothing=0.1, z_loss=1e-4, softcap=30.0, chunk=32768
    ),
}
