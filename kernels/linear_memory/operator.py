"""The registered operator ``palimpsest::linear_memory`` of both linear memories, and its backward.

Memory: the forward keeps the state before every chunk (D·D_v / C numbers a token and head: as much as v for D = C),
the errors (as much as v) and the inverses (C), beside its inputs; the backward holds the states' gradients too.
"""

import torch
from torch import Tensor

from ..check import compute_dtype
from ..op import flop_formula
from ..operator import absent, operator, present
from . import chunked
from .cost import matmul_flops
from .slots import Layout, slot_count


def kept_shapes(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int, delta: bool) -> list[tuple[int, ...]]:
    """Shapes of what the forward keeps: N, the states before each chunk, and the errors, by slot and head."""
    batch, length, heads, width = q.shape
    packed = cu_seqlens is not None
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = slot_count(batch, length, chunk, rows, packed) * heads
    states = (slots, width, v.shape[3])
    return [(slots, chunk, chunk), states, (slots, chunk, v.shape[3])] if delta else [(0,), states, (0,)]


def _lay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Layout, chunked.Chunks]:
    kind = compute_dtype(q)
    layout = Layout(q.shape[0], q.shape[1], chunk, cu_seqlens)
    keys = layout.lay(k, kind)
    decay = chunked.make_decay(None if log_decay is None else layout.lay(log_decay, kind), keys)
    held = None if beta is None else layout.lay(beta, kind)
    return layout, chunked.Chunks(layout.lay(q, kind) * scale, keys, layout.lay(v, kind), held, decay)


@operator("linear_memory")
def linear_memory_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    keep: bool,
) -> list[Tensor]:
    """[o, final memory] and with ``keep`` what the backward wants: N, states, errors (empty where there is none)."""
    kind, heads = compute_dtype(q), q.shape[2]
    layout, c = _lay(q, k, v, beta, log_decay, cu_seqlens, scale, chunk)
    if state is None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = q.new_zeros(rows, heads, q.shape[3], v.shape[3], dtype=kind)
    out, memory, kept = chunked.forward(c, layout.open(state), layout)
    result = [layout.restore(out, v.dtype), layout.close(memory, heads)]
    if not keep:
        return result + [absent(state) for _ in range(3)]
    inverse, errors = kept.inverse, kept.errors
    if inverse is None:
        return [*result, absent(state), kept.states.flatten(0, 1), absent(state)]
    return [*result, *(x.flatten(0, 1) for x in (inverse, kept.states, errors))]


@linear_memory_op.register_fake
def _(q, k, v, beta, log_decay, state, cu_seqlens, scale, chunk, keep):
    kind = compute_dtype(q)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = q.new_empty((rows, q.shape[2], q.shape[3], v.shape[3]), dtype=kind)
    shapes = kept_shapes(q, v, cu_seqlens, chunk, beta is not None) if keep else [(0,)] * 3
    kept = [q.new_empty(shape, dtype=kind) for shape in shapes]
    return [torch.empty_like(v, memory_format=torch.contiguous_format), final, *kept]


@operator("linear_memory_backward")
def linear_memory_backward_op(
    grad_o: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    inverse: Tensor,
    states: Tensor,
    errors: Tensor,
    scale: float,
    chunk: int,
) -> list[Tensor]:
    """Gradients of q, k, v, beta, log_decay and state; empty for those that were None."""
    layout, c = _lay(q, k, v, beta, log_decay, cu_seqlens, scale, chunk)
    of_chunks = (layout.count, -1)
    kept = chunked.Kept(
        None if beta is None else inverse.unflatten(0, of_chunks),
        states.unflatten(0, of_chunks),
        c.v if beta is None else errors.unflatten(0, of_chunks),
    )
    d = chunked.backward(c, kept, layout.lay(grad_o, compute_dtype(q)), layout.open(grad_final), layout)
    pairs = [(q, d.q * scale), (k, d.k), (v, d.v), (beta, d.beta), (log_decay, d.log_decay)]
    out = [absent(q) if x is None or grad is None else layout.restore(grad, x.dtype) for x, grad in pairs]
    return [*out, absent(q) if state is None else layout.close(d.memory, q.shape[2])]


@linear_memory_backward_op.register_fake
def _(grad_o, grad_final, q, k, v, beta, log_decay, state, cu_seqlens, inverse, states, errors, scale, chunk):
    return [
        absent(q) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, beta, log_decay, state)
    ]


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.chunk, _ = inputs
    kept = output[2:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros for every kept tensor would double them
    ctx.final = (output[1].shape, output[1].dtype)
    ctx.save_for_backward(*tensors, *kept)


def _differentiate(ctx, grads):
    saved = ctx.saved_tensors  # asked for once: activation checkpointing hands out each tensor a single time
    inputs, kept = saved[:7], saved[7:]
    shape, kind = ctx.final
    d_o = torch.zeros_like(inputs[2]) if grads[0] is None else grads[0]
    d_final = d_o.new_zeros(shape, dtype=kind) if grads[1] is None else grads[1]
    found = linear_memory_backward_op(d_o, d_final, *inputs, *kept, ctx.scale, ctx.chunk)
    return (*present(found, inputs[:6]), None, None, None, None)


linear_memory_op.register_autograd(_differentiate, setup_context=_setup)


def _flops(q, v, beta, chunk) -> int:
    return matmul_flops(q[0] * q[1], q[2], q[3], v[3], chunk, beta is not None)


flop_formula(
    torch.ops.palimpsest.linear_memory,
    lambda q, k, v, beta, log_decay, state, cu, scale, chunk, keep, out_shape=None: _flops(q, v, beta, chunk),
)
flop_formula(
    torch.ops.palimpsest.linear_memory_backward,
    lambda go, gf, q, k, v, beta, g, state, cu, n, s, e, scale, chunk, out_shape=None: 2 * _flops(q, v, beta, chunk),
)


def linear_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """o and the final memory by the chunked torch path."""
    inputs = (q, k, v, beta, log_decay, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out = linear_memory_op(*inputs, cu_seqlens, scale, min(chunk, q.shape[1]), keep)
    return out[0], out[1]
