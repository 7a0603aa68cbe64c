"""The registered operator over the Triton kernels, which are imported when they first run."""

import torch
from torch import Tensor

from ..op import flop_formula
from ..operator import operator
from .cost import cost


@operator("newton_schulz_triton")
def forward(x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """The last iterate of every matrix of x [N, m, n]."""
    from .forward import forward as launch

    return launch(x, steps, a, b, c, eps)


@forward.register_fake
def _(x, steps, a, b, c, eps):
    return x.new_empty(x.shape)


@operator("newton_schulz_triton_backward")
def backward(grad: Tensor, x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """Gradient of x."""
    from .backward import backward as launch

    return launch(grad, x, steps, a, b, c, eps)


@backward.register_fake
def _(grad, x, steps, a, b, c, eps):
    return x.new_empty(x.shape)


def _keep(ctx, inputs, output) -> None:
    x, *ctx.rest = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, grad):
    return backward(grad, *ctx.saved_tensors, *ctx.rest), *(None for _ in range(5))


forward.register_autograd(_differentiate, setup_context=_keep)
flop_formula(torch.ops.palimpsest.newton_schulz_triton, lambda x, steps, *_, out_shape: cost(x, steps).flops)
flop_formula(
    torch.ops.palimpsest.newton_schulz_triton_backward,
    lambda grad, x, steps, *_, out_shape: cost(x, steps, backward=True).flops,
)


def newton_schulz(x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """The registered operator."""
    return forward(x, steps, a, b, c, eps)
