"""The registered operator over the Triton kernels, which are imported when they first run."""

import torch
from torch import Tensor

from ..op import flop_formula
from ..operator import operator
from .cost import backward_flops, forward_flops


@operator("linear_cross_entropy_triton")
def forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
    threshold: float | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """Losses [N] and their log-sum-exps [N]; the last two arguments are for the backward."""
    from .forward import forward as launch

    return launch(x, weight, target, ignore_index, smoothing, z_loss, softcap)


@forward.register_fake
def _(x, weight, target, *_):
    return tuple(x.new_empty(target.shape, dtype=torch.float32) for _ in range(2))


@operator("linear_cross_entropy_triton_backward")
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
    threshold: float | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, d] and weight [V, d] for the incoming gradients ``grad`` [N] of the tokens' losses."""
    from .backward import backward as launch

    return launch(grad, x, weight, target, log_sum, ignore_index, smoothing, z_loss, softcap, threshold, chunk)


@backward.register_fake
def _(grad, x, weight, *_):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:
    x, weight, target, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, target, output[1])


def _differentiate(ctx, grad, _):
    return *backward(grad, *ctx.saved_tensors, *ctx.rest), *(None for _ in range(7))


forward.register_autograd(_differentiate, setup_context=_keep)
flop_formula(torch.ops.palimpsest.linear_cross_entropy_triton, forward_flops)
flop_formula(torch.ops.palimpsest.linear_cross_entropy_triton_backward, backward_flops)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk: int | None,
    threshold: float | None,
) -> Tensor:
    """The registered operator for x [N, d] and target [N], and the reduction."""
    loss, _ = forward(x, weight, target, ignore_index, label_smoothing, z_loss, softcap, threshold, chunk)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum().clamp(min=1)
