"""The registered operator over the Triton kernels, which are imported when they first run."""

import torch
from torch import Tensor

from ..op import flop_formula
from ..operator import operator
from .cost import cost


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
    log_sum: Tensor,
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
    """Gradients of x [N, d] and weight [V, d] for the incoming gradients ``grad`` [N] of the tokens' losses."""
    from .backward import backward as launch

    return launch(grad, log_sum, x, weight, target, ignore_index, smoothing, z_loss, softcap, threshold, chunk)


@backward.register_fake
def _(grad, log_sum, x, weight, *_):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:
    x, weight, target, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], x, weight, target)


def _differentiate(ctx, grad, _):
    return *backward(grad, *ctx.saved_tensors, *ctx.rest), *(None for _ in range(7))


forward.register_autograd(_differentiate, setup_context=_keep)
flop_formula(torch.ops.palimpsest.linear_cross_entropy_triton, lambda x, weight, *_, out_shape: cost(x, weight).flops)
flop_formula(
    torch.ops.palimpsest.linear_cross_entropy_triton_backward,
    lambda grad, log_sum, x, weight, *_, out_shape: cost(x, weight, reduction="none", backward=True).flops,
)


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
