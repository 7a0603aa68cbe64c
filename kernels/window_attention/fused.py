"""The registered operator over the Triton kernels, which are imported when they first run."""

import torch
from torch import Tensor

from ..op import flop_formula
from ..operator import absent, operator, present
from .chunked import flops_of_call


@operator("window_attention_triton")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention o [B, T, H, D] and its log2-sum-exp2 [B, H, T]."""
    from .forward import forward as launch

    return launch(q, k, v, prefix_k, prefix_v, cache_k, cache_v, count, cu_seqlens, window, scale)


@forward.register_fake
def _(q, *_):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@operator("window_attention_triton_backward")
def backward(
    grad: Tensor,
    o: Tensor,
    log_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, prefix_k, prefix_v, cache_k, cache_v; empty for those that were None."""
    from .backward import backward as launch

    rest = (prefix_k, prefix_v, cache_k, cache_v, count, cu_seqlens, window, scale)
    return launch(grad, o, log_sum, q, k, v, *rest)


@backward.register_fake
def _(grad, o, log_sum, q, k, v, prefix_k, prefix_v, cache_k, cache_v, *_):
    inputs = (q, k, v, prefix_k, prefix_v, cache_k, cache_v)
    return [absent(q) if x is None else q.new_empty(x.shape) for x in inputs]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx, grad, _):
    o, log_sum, *tensors = ctx.saved_tensors
    gradients = backward(grad, o, log_sum, *tensors, ctx.window, ctx.scale)
    return *present(gradients, tensors[:7]), None, None, None, None


forward.register_autograd(_differentiate, setup_context=_keep)


flop_formula(torch.ops.palimpsest.window_attention_triton, flops_of_call)
flop_formula(
    torch.ops.palimpsest.window_attention_triton_backward,
    lambda grad, o, log_sum, *args, **kw: flops_of_call(*args, **kw, backward=True),
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """The registered operator on the tensors of ``prefix`` and ``state``."""
    past = (None, None, None) if state is None else (state["k"], state["v"], state["count"])
    return forward(q, k, v, *(prefix or (None, None)), *past, cu_seqlens, window, scale)[0]
