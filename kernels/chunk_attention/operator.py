"""The registered operators of attention over chunks, on plain torch or the Triton kernels, which are imported late.

What runs is the operators' last argument, which the backward gets as it was in the forward.
"""

from functools import partial

import torch
from torch import Tensor

from ..backend import log_once
from ..check import compute_dtype
from ..op import flop_formula
from ..operator import operator
from . import chunked, dense, selection
from .cost import cost, select_cost
from .layout import ChunkLayout
from .tables import group_of


@operator("chunk_select")
def select_op(
    summary_q: Tensor,
    summary_k: Tensor,
    start: Tensor,
    end: Tensor,
    first: Tensor,
    last: Tensor,
    leader: Tensor,
    share: int,
    blocks: int,
    top_k: int,
    scale: float,
    branching: int,
    triton: bool,
) -> Tensor:
    """Chosen chunks [B, T, Hs, K]; ``branching`` 0: of all candidates."""
    if triton:
        from .choose import select as launch

        return launch(summary_q, summary_k, start, end, first, last, leader, share, blocks, top_k, scale)
    return selection.select(
        summary_q, summary_k, start, end, first, last, leader, share, blocks, top_k, scale, branching
    )


@select_op.register_fake
def _(summary_q, summary_k, start, end, first, last, leader, share, blocks, top_k, scale, branching, triton):
    return summary_q.new_empty((*summary_q.shape[:3], top_k), dtype=torch.int32)


@operator("chunk_attention")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_q: Tensor,
    summary_k: Tensor,
    chosen: Tensor,
    start: Tensor,
    end: Tensor,
    first: Tensor,
    last: Tensor,
    local: Tensor,
    own: Tensor,
    leader: Tensor,
    share: int,
    blocks: int,
    longest: int,
    union: bool,
    scale: float,
    summary_scale: float,
    way: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, T, H, D]; log-sum-exp [Q, H, K], [Q, H, 1] for a union; weights [Q, Hs, K], none for a union.

    ``way``: "gather" or "dense" in plain torch, of which the second keeps no log-sum-exp, or "triton".
    """
    layout = (start, end, first, last, local, own, leader)
    tensors = (q, k, v, summary_q, summary_k, chosen)
    if way == "triton":
        from .forward import forward as launch

        return launch(*tensors, layout, share, blocks, longest, union, scale, summary_scale)
    if way == "dense":
        return dense.forward(*tensors, layout, longest, union, scale, summary_scale)
    return chunked.forward(*tensors, layout, share, blocks, longest, union, scale, summary_scale)


@forward.register_fake
def _(q, k, v, summary_q, summary_k, chosen, *rest):
    union, way, kind = rest[10], rest[13], compute_dtype(q)
    count, heads, kept = q.shape[0] * q.shape[1], q.shape[2], chosen.shape[3]
    return (
        q.new_empty(q.shape),
        q.new_empty((0,) if way == "dense" else (count, heads, 1 if union else kept), dtype=kind),
        q.new_empty((0,) if union else (count, summary_q.shape[2], kept), dtype=kind),
    )


@operator("chunk_attention_backward")
def backward(
    grad: Tensor,
    o: Tensor,
    log_sum: Tensor,
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_q: Tensor,
    summary_k: Tensor,
    chosen: Tensor,
    start: Tensor,
    end: Tensor,
    first: Tensor,
    last: Tensor,
    local: Tensor,
    own: Tensor,
    leader: Tensor,
    share: int,
    blocks: int,
    longest: int,
    union: bool,
    scale: float,
    summary_scale: float,
    way: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, summary_q and summary_k."""
    layout = (start, end, first, last, local, own, leader)
    tensors = (grad, o, log_sum, weights, q, k, v, summary_q, summary_k, chosen)
    if way == "triton":
        from .backward import backward as launch

        return launch(*tensors, layout, share, blocks, longest, union, scale, summary_scale)
    if way == "dense":
        return dense.backward(grad, weights, *tensors[4:], layout, longest, union, scale, summary_scale)
    return chunked.backward(*tensors, layout, share, blocks, longest, union, scale, summary_scale)


@backward.register_fake
def _(grad, o, log_sum, weights, q, k, v, summary_q, summary_k, *_):
    q, k, v, summary_q, summary_k = (x.new_empty(x.shape) for x in (q, k, v, summary_q, summary_k))
    return q, k, v, summary_q, summary_k


def _keep(ctx, inputs, output) -> None:
    ctx.plain = inputs[13:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, *inputs[:13])


def _differentiate(ctx, grad, *_):
    gradients = backward(grad, *ctx.saved_tensors, *ctx.plain)
    if ctx.plain[3]:
        gradients = (*gradients[:3], None, None)  # a union reads no summaries
    return *gradients, *[None] * 15


forward.register_autograd(_differentiate, setup_context=_keep)


def _flops(q, k, v, summary_q, summary_k, chosen, *rest, out_shape=None, backward=False) -> int:
    share, _, longest, union = rest[7:11]
    known = {"chunk_size": longest, "share": share, "union": union, "backward": backward}
    return cost(q, k, summary_q, summary_k, chosen[3], **known).flops


def _select_flops(summary_q, summary_k, *rest, out_shape) -> int:
    share, _, top_k, _, branching, _ = rest[5:]
    return select_cost(summary_q, summary_k, top_k, share=share, branching=branching or None).flops


OPERATORS = torch.ops.palimpsest
flop_formula(OPERATORS.chunk_select, _select_flops)
flop_formula(OPERATORS.chunk_attention, _flops)
flop_formula(
    OPERATORS.chunk_attention_backward,
    lambda grad, o, log_sum, weights, *args, out_shape: _flops(*args, backward=True),
)


def _select(
    summary_q: Tensor, summary_k: Tensor, layout: ChunkLayout, top_k: int, scale: float, branching: int | None, *,
    triton: bool,
) -> Tensor:  # fmt: skip
    tables = (layout.start, layout.end, layout.first, layout.last, layout.leader, layout.share, layout.blocks)
    return select_op(summary_q.detach(), summary_k.detach(), *tables, top_k, scale, branching or 0, triton)


def plain_way(q: Tensor, k: Tensor, summary_k: Tensor, chosen: Tensor, layout: ChunkLayout) -> str:
    """Which of the two plain paths a call takes, by its shapes."""
    group = group_of(q.shape[2], k.shape[2], chosen.shape[2])
    if not dense.fits(q, k, summary_k, chosen.shape[3], min(layout.share, q.shape[1]), layout.longest, group):
        return "gather"
    if not torch.compiler.is_compiling():
        log_once("chunk_attention: plain torch multiplies with all chunks, for the memory is short")
    return "dense"


def _attend(
    q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, summary_k: Tensor, chosen: Tensor, layout: ChunkLayout,
    union: bool, scale: float, summary_scale: float, *, triton: bool,
) -> Tensor:  # fmt: skip
    way = "triton" if triton else plain_way(q, k, summary_k, chosen, layout)
    sizes = (layout.share, layout.blocks, layout.longest)
    tensors = (q, k, v, summary_q, summary_k, chosen)
    return forward(*tensors, *layout.tensors, *sizes, union, scale, summary_scale, way)[0]


select, select_triton = partial(_select, triton=False), partial(_select, triton=True)
chunk_attention, chunk_attention_triton = partial(_attend, triton=False), partial(_attend, triton=True)
