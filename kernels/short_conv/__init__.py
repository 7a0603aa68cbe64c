"""Causal depthwise convolution over a few tokens."""

from typing import Literal

from torch import Tensor

from .. import check
from ..op import register
from ..packing import tail
from . import chunked, fused, reference
from .cost import cost

__all__ = ["short_conv"]

OPERATION = register(
    "short_conv", cost=cost, reference=reference.short_conv, torch=chunked.short_conv, triton=fused.short_conv
)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    state: dict[str, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Causal depthwise convolution, as linear memories use it before their keys, values and queries.

        y_t = act(b + sum_j w_j * x_{t - K + 1 + j})     j = 0 .. K - 1, per channel; x is zero before the start

    Args:
        x: [B, T, C], float16, bfloat16, float32 or float64; sums are float32 at least.
        weight: [C, K]; its last column weighs the current token. A dtype of its own is allowed.
        bias: [C] or None.
        activation: "silu" or None.
        state: {"x": [N, K - 1, C]}, the inputs that went before, zeros for a fresh row; N = B, or the number of packed
            documents. None: all fresh.
        cu_seqlens: int32 [N + 1], borders of documents packed into one row (B = 1), which never see each other.
        return_state: also return the state after the last token.
        backend: "reference", "torch" or "triton" (not float64); None: see :func:`palimpsest.kernels.backend.resolve`.

    Returns: y [B, T, C] and the state, or None.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    _check(x, weight, bias, activation, state, cu_seqlens)
    past = None if state is None else state["x"]
    y = OPERATION.choose(x.device, backend, check.no_float64("x", x))(
        x, weight, bias, past, cu_seqlens, activation == "silu"
    )
    if not return_state:
        return y, None
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    cache = x.new_zeros(rows, weight.shape[1] - 1, x.shape[2]) if past is None else past.to(x.dtype)
    return y, {"x": tail(x, cache, weight.shape[1] - 1, cu_seqlens)}


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> None:
    check.shape("x", x, (None, None, None), "[B, T, C]")
    check.dtype("x", x, check.FLOATS)
    batch, length, channels = x.shape
    check.require(length > 0, "x.shape", tuple(x.shape), "have at least one token")
    check.shape("weight", weight, (channels, None), "[C, K]")
    check.require(weight.shape[1] > 0, "weight.shape", tuple(weight.shape), "be [C, K] with K >= 1")
    others = {"weight": weight}
    if bias is not None:
        check.shape("bias", bias, (channels,), "[C]")
        others["bias"] = bias
    check.require(activation in (None, "silu"), "activation", repr(activation), 'be "silu" or None')
    check.sequence_borders(cu_seqlens, batch, length, x.device)
    if state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        check.require("x" in state, "state", sorted(state), "hold x")
        check.shape("state['x']", state["x"], (rows, weight.shape[1] - 1, channels), "[N, K - 1, C]")
        others["state['x']"] = state["x"]
    for name, tensor in others.items():
        check.dtype(name, tensor, check.FLOATS)
        check.device(name, tensor, x.device)
