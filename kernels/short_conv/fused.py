"""The registered operator over the Triton kernels, which are imported when they first run."""

import torch
from torch import Tensor

from ..op import flop_formula
from ..operator import absent, operator, present
from .cost import cost


@operator("short_conv_triton")
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """The output [B, T, C]."""
    from .forward import forward as launch

    return launch(x, weight, bias, state, cu_seqlens, silu)


@forward.register_fake
def _(x, weight, bias, state, cu_seqlens, silu):
    return x.new_empty(x.shape)


@operator("short_conv_triton_backward")
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    """Gradients of x, weight, bias and state; empty for those that were None."""
    from .backward import backward as launch

    return launch(grad, x, weight, bias, state, cu_seqlens, silu)


@backward.register_fake
def _(grad, x, weight, bias, state, cu_seqlens, silu):
    return [absent(x) if y is None else y.new_empty(y.shape) for y in (x, weight, bias, state)]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    tensors = ctx.saved_tensors
    return *present(backward(grad, *tensors, ctx.silu), tensors[:4]), None, None


forward.register_autograd(_differentiate, setup_context=_keep)
flop_formula(torch.ops.palimpsest.short_conv_triton, lambda x, weight, *_, out_shape: cost(x, weight).flops)
flop_formula(
    torch.ops.palimpsest.short_conv_triton_backward,
    lambda grad, x, weight, *_, out_shape: cost(x, weight, backward=True).flops,
)


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """The registered operator."""
    return forward(x, weight, bias, state, cu_seqlens, silu)
