"""The registered operator over plain torch or the Triton kernels, which are imported when they first run.

Plain torch keeps what entered the activation; the kernels keep nothing but the arguments.
"""

from functools import partial

import torch
from torch import Tensor

from ..op import flop_formula
from ..operator import absent, operator, present
from . import chunked
from .cost import cost


@operator("short_conv")
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
    inverse: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """The output [B, T, C], [1, S, C] with an index, and what the backward wants of it (else empty)."""
    arguments = x, weight, bias, state, cu_seqlens, silu, index
    if triton:
        from .forward import forward as launch

        return launch(*arguments), absent(x)
    return chunked.forward(*arguments)


@forward.register_fake
def _(x, weight, bias, state, cu_seqlens, silu, index, inverse, triton):
    shape = x.shape if index is None else (1, index.shape[0], x.shape[2])
    return x.new_empty(shape), x.new_empty(shape) if silu and not triton else absent(x)


@operator("short_conv_backward")
def backward(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
    inverse: Tensor | None,
    triton: bool,
) -> list[Tensor]:
    """Gradients of x, weight, bias and state; empty for those that were None."""
    arguments = x, weight, bias, state, cu_seqlens, silu, index, inverse
    if triton:
        from .backward import backward as launch

        return launch(grad, *arguments)
    return chunked.backward(grad, z, *arguments)


@backward.register_fake
def _(grad, z, x, weight, bias, state, *_):
    return [absent(x) if y is None else y.new_empty(y.shape) for y in (x, weight, bias, state)]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.silu, index, inverse, ctx.triton = inputs
    ctx.save_for_backward(output[1], *tensors, index, inverse)


def _differentiate(ctx, grad, _):
    z, *tensors, index, inverse = ctx.saved_tensors
    gradients = backward(grad, z, *tensors, ctx.silu, index, inverse, ctx.triton)
    return *present(gradients, tensors[:4]), None, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_keep)


def _flops(x, weight, bias, state, cu_seqlens, silu, index, *_, out_shape, backward=False) -> int:
    shape = x if index is None else (1, *index, x[2])  # every slot is a token where there is an index
    return cost(shape, weight, backward=backward).flops


flop_formula(torch.ops.palimpsest.short_conv, _flops)
flop_formula(torch.ops.palimpsest.short_conv_backward, lambda grad, z, *args, **kw: _flops(*args, **kw, backward=True))


def _call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
    inverse: Tensor | None,
    *,
    triton: bool,
) -> Tensor:
    return forward(x, weight, bias, state, cu_seqlens, silu, index, inverse, triton)[0]


#: The output, by plain torch and by the Triton kernels.
short_conv = partial(_call, triton=False)
short_conv_triton = partial(_call, triton=True)
