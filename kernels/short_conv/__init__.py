"""Causal depthwise convolution over a few tokens."""

from typing import Literal

import torch
from torch import Tensor

from .. import check
from ..op import register
from ..packing import tail
from . import operator, reference
from .cost import cost

__all__ = ["short_conv"]

OPERATION = register(
    "short_conv",
    cost=cost,
    reference=reference.short_conv,
    torch=operator.short_conv,
    triton=operator.short_conv_triton,
)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    state: dict[str, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    index: Tensor | None = None,
    inverse: Tensor | None = None,
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
        index: int64 [S], with ``cu_seqlens``, which are then borders of S slots: slot s reads the token b T + t of x at
            index[s], in place. None: x is read as it lies.
        inverse: int64 [B, T, K'], with ``index``, S = B T K': the slots that read each token, over which its gradient
            is added up in their order.
        return_state: also return the state after the last token.
        backend: "reference", "torch" or "triton" (not float64); None: see :func:`palimpsest.kernels.backend.resolve`.

    Returns: y [B, T, C], with ``index`` [1, S, C], and the state, or None.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    _check(x, weight, bias, activation, state, cu_seqlens, index, inverse)
    past = None if state is None else state["x"]
    y = OPERATION.choose(x.device, backend, check.no_float64("x", x))(
        x, weight, bias, past, cu_seqlens, activation == "silu", index, inverse
    )
    if not return_state:
        return y, None
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    cache = x.new_zeros(rows, weight.shape[1] - 1, x.shape[2]) if past is None else past.to(x.dtype)
    if index is None:
        return y, {"x": tail(x, cache, weight.shape[1] - 1, cu_seqlens)}
    pool = torch.cat([x.flatten(0, 1), cache.flatten(0, 1)])  # the tail of places in it, which are fewer than entries
    places = torch.arange(pool.shape[0] - cache.shape[0] * cache.shape[1], pool.shape[0], device=x.device)
    return y, {"x": pool[tail(index[None], places.view(cache.shape[:2]), weight.shape[1] - 1, cu_seqlens)]}


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
    index: Tensor | None,
    inverse: Tensor | None,
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
    if index is None:
        check.require(inverse is None, "inverse", "a tensor", "be None without index")
        check.sequence_borders(cu_seqlens, batch, length, x.device)
    else:
        _check_index(x, index, inverse, cu_seqlens)
    if state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        check.require("x" in state, "state", sorted(state), "hold x")
        check.shape("state['x']", state["x"], (rows, weight.shape[1] - 1, channels), "[N, K - 1, C]")
        others["state['x']"] = state["x"]
    for name, tensor in others.items():
        check.dtype(name, tensor, check.FLOATS)
        check.device(name, tensor, x.device)


def _check_index(x: Tensor, index: Tensor, inverse: Tensor | None, cu_seqlens: Tensor | None) -> None:
    check.shape("index", index, (None,), "[S]")
    check.require(cu_seqlens is not None, "cu_seqlens", None, "be the borders of slots with index")
    if inverse is None:
        raise ValueError("inverse was None; it must be a tensor [B, T, K'] with index")
    check.shape("inverse", inverse, (*x.shape[:2], None), "[B, T, K']")
    slots = inverse.numel()
    check.require(index.shape[0] == slots, "index.shape", tuple(index.shape), f"be [S] = [{slots}], as inverse has")
    check.sequence_borders(cu_seqlens, 1, slots, x.device)
    for name, tensor in {"index": index, "inverse": inverse}.items():
        check.dtype(name, tensor, (torch.int64,))
        check.device(name, tensor, x.device)
