"""The registered operators of routing, over plain torch or the Triton kernels, which are imported when they first run.

Both keep the same tensors for the backward; which of the two runs is the operators' last argument.
"""

from functools import partial

import torch
from torch import Tensor

from ..check import compute_dtype
from ..op import flop_formula
from ..operator import operator
from . import chunked
from .cost import combine_cost, dispatch_cost, route_cost


@operator("route")
def route_op(
    logits: Tensor, top_k: int, shared: bool, cu_seqlens: Tensor | None, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight [B, T, K], probability [B, T, M], memory [B, T, K], token [S], slot [B, T, K], borders [N M' + 1]."""
    if triton:
        from .forward import route as launch

        return launch(logits, top_k, shared, cu_seqlens)
    weight, probability, memory = chunked.choose(logits, top_k, shared)
    return weight, probability, memory, *chunked.sort(memory, logits.shape[2] + shared, cu_seqlens)


@route_op.register_fake
def _(logits, top_k, shared, cu_seqlens, triton):
    batch, length, routed = logits.shape
    kind, whole = compute_dtype(logits), torch.int64
    shape = batch, length, top_k + shared
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        logits.new_empty(shape, dtype=kind),
        logits.new_empty(logits.shape, dtype=kind),
        logits.new_empty(shape, dtype=whole),
        logits.new_empty(batch * length * (top_k + shared), dtype=whole),
        logits.new_empty(shape, dtype=whole),
        logits.new_empty(rows * (routed + shared) + 1, dtype=torch.int32),
    )


@operator("route_backward")
def route_backward(
    d_weight: Tensor,
    d_probability: Tensor,
    weight: Tensor,
    probability: Tensor,
    memory: Tensor,
    top_k: int,
    triton: bool,
) -> Tensor:
    """Gradient of the logits, in the dtype of the probabilities."""
    if triton:
        from .backward import route_backward as launch

        return launch(d_weight, d_probability, weight, probability, memory, top_k)
    return chunked.route_backward(d_weight, d_probability, weight, probability, memory, top_k)


@route_backward.register_fake
def _(d_weight, d_probability, weight, probability, memory, top_k, triton):
    return probability.new_empty(probability.shape)


def _keep_route(ctx, inputs, output) -> None:
    logits, ctx.top_k, *_, ctx.triton = inputs
    ctx.kind = logits.dtype
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output[:3])


def _differentiate_route(ctx, d_weight, d_probability, *_):
    gradient = route_backward(d_weight, d_probability, *ctx.saved_tensors, ctx.top_k, ctx.triton)
    return gradient.to(ctx.kind), None, None, None, None


route_op.register_autograd(_differentiate_route, setup_context=_keep_route)


@operator("dispatch")
def dispatch_op(x: Tensor, token: Tensor, slot: Tensor, triton: bool) -> Tensor:
    """[1, S, C]: tokens [B, T, C] in the order of slots."""
    if triton:
        from .move import spread as launch

        return launch(x, slot)
    return chunked.spread(x, token)


@dispatch_op.register_fake
def _(x, token, slot, triton):
    return x.new_empty(1, token.shape[0], x.shape[2])


@operator("dispatch_backward")
def dispatch_backward(grad: Tensor, slot: Tensor, triton: bool) -> Tensor:
    """[B, T, C]: the sum over each token's slots."""
    if triton:
        from .move import gather as launch

        return launch(grad, None, slot)
    return chunked.gather(grad, None, slot)


@dispatch_backward.register_fake
def _(grad, slot, triton):
    return grad.new_empty(*slot.shape[:2], grad.shape[2])


def _keep_dispatch(ctx, inputs, output) -> None:
    _, _, slot, ctx.triton = inputs
    ctx.save_for_backward(slot)


def _differentiate_dispatch(ctx, grad):
    return dispatch_backward(grad, *ctx.saved_tensors, ctx.triton), None, None, None


dispatch_op.register_autograd(_differentiate_dispatch, setup_context=_keep_dispatch)


@operator("combine")
def combine_op(y: Tensor, weight: Tensor, slot: Tensor, triton: bool) -> Tensor:
    """[B, T, C]: the weighted sum of what lies in each token's slots, y [1, S, C]."""
    if triton:
        from .move import gather as launch

        return launch(y, weight, slot)
    return chunked.gather(y, weight, slot)


@combine_op.register_fake
def _(y, weight, slot, triton):
    return y.new_empty(*slot.shape[:2], y.shape[2])


@operator("combine_backward")
def combine_backward(
    grad: Tensor, y: Tensor, weight: Tensor, slot: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of y and weight."""
    if triton:
        from .move import spread_weighted as launch

        return launch(grad, y, weight, slot)
    return chunked.combine_backward(grad, y, weight, slot)


@combine_backward.register_fake
def _(grad, y, weight, slot, triton):
    return y.new_empty(y.shape), weight.new_empty(weight.shape)


def _keep_combine(ctx, inputs, output) -> None:
    *tensors, ctx.triton = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_combine(ctx, grad):
    return *combine_backward(grad, *ctx.saved_tensors, ctx.triton), None, None


combine_op.register_autograd(_differentiate_combine, setup_context=_keep_combine)

OPERATORS = torch.ops.palimpsest
flop_formula(OPERATORS.route, lambda logits, top_k, *_, out_shape: route_cost(logits, top_k).flops)
flop_formula(
    OPERATORS.route_backward,
    lambda d_weight, d_probability, weight, probability, memory, top_k, *_, out_shape: (
        route_cost(probability, top_k, backward=True).flops
    ),
)
flop_formula(OPERATORS.dispatch, lambda *_, out_shape: 0)
flop_formula(
    OPERATORS.dispatch_backward,
    lambda grad, slot, *_, out_shape: dispatch_cost((*slot[:2], grad[2]), slot[2], backward=True).flops,
)
flop_formula(OPERATORS.combine, lambda y, weight, *_, out_shape: combine_cost(y, weight).flops)
flop_formula(
    OPERATORS.combine_backward,
    lambda grad, y, weight, *_, out_shape: combine_cost(y, weight, backward=True).flops,
)


def _route(logits: Tensor, top_k: int, shared: bool, cu_seqlens: Tensor | None, *, triton: bool) -> tuple[Tensor, ...]:
    return route_op(logits, top_k, shared, cu_seqlens, triton)


def _dispatch(x: Tensor, token: Tensor, slot: Tensor, *, triton: bool) -> Tensor:
    return dispatch_op(x, token, slot, triton)


def _combine(y: Tensor, weight: Tensor, slot: Tensor, *, triton: bool) -> Tensor:
    return combine_op(y, weight, slot, triton)


route, route_triton = partial(_route, triton=False), partial(_route, triton=True)
dispatch, dispatch_triton = partial(_dispatch, triton=False), partial(_dispatch, triton=True)
combine, combine_triton = partial(_combine, triton=False), partial(_combine, triton=True)
