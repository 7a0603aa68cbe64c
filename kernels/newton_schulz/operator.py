"""The registered operator of plain torch and the Triton kernels, which are imported when they first run."""

from functools import partial

import torch
from torch import Tensor

from ..op import flop_formula
from ..operator import operator
from . import chunked
from .cost import cost


@operator("newton_schulz")
def forward(x: Tensor, steps: int, a: float, b: float, c: float, eps: float, triton: bool) -> Tensor:
    """The last iterate of every matrix of x [N, m, n]."""
    if triton:
        from .forward import forward as launch

        return launch(x, steps, a, b, c, eps)
    return chunked.forward(x, steps, a, b, c, eps)


@forward.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@operator("newton_schulz_backward")
def backward(grad: Tensor, x: Tensor, steps: int, a: float, b: float, c: float, eps: float, triton: bool) -> Tensor:
    """Gradient of x."""
    if triton:
        from .backward import backward as launch

        return launch(grad, x, steps, a, b, c, eps)
    return chunked.backward(grad, x, steps, a, b, c, eps)


@backward.register_fake
def _(grad, x, *_):
    return x.new_empty(x.shape)


def _keep(ctx, inputs, output) -> None:
    x, *ctx.rest = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, grad):
    return backward(grad, *ctx.saved_tensors, *ctx.rest), *(None for _ in range(6))


forward.register_autograd(_differentiate, setup_context=_keep)
flop_formula(torch.ops.palimpsest.newton_schulz, lambda x, steps, *_, out_shape: cost(x, steps).flops)
flop_formula(
    torch.ops.palimpsest.newton_schulz_backward,
    lambda grad, x, steps, *_, out_shape: cost(x, steps, backward=True).flops,
)


def _call(x: Tensor, steps: int, a: float, b: float, c: float, eps: float, triton: bool) -> Tensor:
    return forward(x, steps, a, b, c, eps, triton)


#: The last iterates, by batched products and by the Triton kernels.
newton_schulz = partial(_call, triton=False)
newton_schulz_triton = partial(_call, triton=True)
