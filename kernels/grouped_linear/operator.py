"""The registered operator over plain torch or the Triton kernels, which are imported when they first run."""

from functools import partial

import torch
from torch import Tensor

from ..op import flop_formula
from ..operator import operator
from . import chunked
from .cost import cost


@operator("grouped_linear")
def forward(x: Tensor, weight: Tensor, token: Tensor, slot: Tensor, cu_seqlens: Tensor, triton: bool) -> Tensor:
    """y [1, S, out]."""
    if triton:
        from .forward import forward as launch

        return launch(x, weight, token, cu_seqlens)
    return chunked.forward(x, weight, token, cu_seqlens)


@forward.register_fake
def _(x, weight, token, slot, cu_seqlens, triton):
    return x.new_empty(1, token.shape[0], weight.shape[2])


@operator("grouped_linear_backward")
def backward(
    grad: Tensor, x: Tensor, weight: Tensor, token: Tensor, slot: Tensor, cu_seqlens: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    if triton:
        from .backward import backward as launch

        return launch(grad, x, weight, token, slot, cu_seqlens)
    return chunked.backward(grad, x, weight, token, slot, cu_seqlens)


@backward.register_fake
def _(grad, x, weight, token, slot, cu_seqlens, triton):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.triton = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    return *backward(grad, *ctx.saved_tensors, ctx.triton), None, None, None, None


forward.register_autograd(_differentiate, setup_context=_keep)
flop_formula(
    torch.ops.palimpsest.grouped_linear,
    lambda x, weight, token, slot, *_, out_shape: cost(x, weight, slot[2]).flops,
)
flop_formula(
    torch.ops.palimpsest.grouped_linear_backward,
    lambda grad, x, weight, token, slot, *_, out_shape: cost(x, weight, slot[2], backward=True).flops,
)


def _grouped_linear(
    x: Tensor, weight: Tensor, token: Tensor, slot: Tensor, cu_seqlens: Tensor, *, triton: bool
) -> Tensor:
    return forward(x, weight, token, slot, cu_seqlens, triton)


grouped_linear = partial(_grouped_linear, triton=False)
grouped_linear_triton = partial(_grouped_linear, triton=True)
