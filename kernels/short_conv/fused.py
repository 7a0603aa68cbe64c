"""The registered operator over the Triton kernels, which are imported when they first run."""

import torch
from torch import Tensor

from ..op import flop_formula
from ..operator import absent, operator, present
from .chunked import flops


@operator("short_conv_triton")
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
    inverse: Tensor | None,
) -> Tensor:
    """The output [B, T, C], [1, S, C] with an index."""
    from .forward import forward as launch

    return launch(x, weight, bias, state, cu_seqlens, silu, index)


@forward.register_fake
def _(x, weight, bias, state, cu_seqlens, silu, index, inverse):
    return x.new_empty(x.shape if index is None else (1, index.shape[0], x.shape[2]))


@operator("short_conv_triton_backward")
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
    inverse: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, weight, bias and state; empty for those that were None."""
    from .backward import backward as launch

    return launch(grad, x, weight, bias, state, cu_seqlens, silu, index, inverse)


@backward.register_fake
def _(grad, x, weight, bias, state, cu_seqlens, silu, index, inverse):
    return [absent(x) if y is None else y.new_empty(y.shape) for y in (x, weight, bias, state)]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.silu, index, inverse = inputs
    ctx.save_for_backward(*tensors, index, inverse)


def _differentiate(ctx, grad):
    *tensors, index, inverse = ctx.saved_tensors
    gradients = backward(grad, *tensors, ctx.silu, index, inverse)
    return *present(gradients, tensors[:4]), None, None, None, None


forward.register_autograd(_differentiate, setup_context=_keep)
flop_formula(torch.ops.palimpsest.short_conv_triton, flops)
flop_formula(
    torch.ops.palimpsest.short_conv_triton_backward, lambda grad, *args, **kw: flops(*args, **kw, backward=True)
)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
    inverse: Tensor | None,
) -> Tensor:
    """The registered operator."""
    return forward(x, weight, bias, state, cu_seqlens, silu, index, inverse)
