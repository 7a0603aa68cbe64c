"""The registered operator over the Triton kernels, which are imported when they first run."""

import torch
from torch import Tensor

from ..op import flop_formula
from ..operator import absent, operator, present
from .cost import cost


@operator("norm_triton")
def forward(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool) -> tuple[Tensor, Tensor]:
    """The output and the factor that each token was multiplied by, [..., 1] in float32."""
    from .forward import forward as launch

    return launch(x, weight, gate, eps, mean)


@forward.register_fake
def _(x, weight, gate, eps, mean):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@operator("norm_triton_backward")
def backward(
    grad: Tensor, factor: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, mean: bool
) -> list[Tensor]:
    """Gradients of x, weight and gate; empty for those that were None."""
    from .backward import backward as launch

    return launch(grad, factor, x, weight, gate, mean)


@backward.register_fake
def _(grad, factor, x, weight, gate, mean):
    return [absent(x) if y is None else y.new_empty(y.shape) for y in (x, weight, gate)]


def _keep(ctx, inputs, output) -> None:
    x, weight, gate, _, ctx.mean = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], x, weight, gate)


def _differentiate(ctx, grad, _):
    factor, *tensors = ctx.saved_tensors
    return *present(backward(grad, factor, *tensors, ctx.mean), tensors), None, None


def _flops(x, weight, gate, *_, out_shape, backward=False) -> int:
    return cost(x, weight=weight is not None, gate=gate is not None, backward=backward).flops


forward.register_autograd(_differentiate, setup_context=_keep)
flop_formula(torch.ops.palimpsest.norm_triton, _flops)
flop_formula(
    torch.ops.palimpsest.norm_triton_backward,
    lambda grad, factor, *args, **kw: _flops(*args, **kw, backward=True),
)


def normalise(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool) -> Tensor:
    """The registered operator."""
    return forward(x, weight, gate, eps, mean)[0]
