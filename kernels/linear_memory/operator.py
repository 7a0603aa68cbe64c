"""The registered operator ``palimpsest::linear_memory`` of both linear memories, and its backward.

Memory: the forward keeps the state before every chunk (D·D_v / C numbers a token and head: as much as v for D = C),
the errors (as much as v) and the inverses (C), beside its inputs; the backward holds the states' gradients too.
The Triton kernels, which are imported when they first run, keep the same in the dtype of q.
"""

from functools import partial

import torch
from torch import Tensor

from ..check import compute_dtype
from ..op import flop_formula
from ..operator import absent, operator, present
from . import chunked
from .cost import matmul_flops
from .slots import Layout, slot_count


def kept_like(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int, delta: bool, keep: bool, triton: bool
) -> list[Tensor]:
    """What the forward keeps, uninitialised: N, the states before each chunk, and the errors; empty where not kept."""
    batch, length, heads, width = q.shape
    kind = q.dtype if triton else compute_dtype(q)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = slot_count(batch, length, chunk, rows, cu_seqlens is not None) * heads
    empty: tuple[int, ...] = (0,)
    inverse = (slots, chunk, chunk) if delta and keep else empty
    states = (slots, width, v.shape[3]) if keep else empty
    errors = (tuple(v.shape) if triton else (slots, chunk, v.shape[3])) if delta and keep else empty
    return [q.new_empty(shape, dtype=kind) for shape in (inverse, states, errors)]


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
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final memory, and with ``keep`` what the backward wants: N, states, errors (empty where there is none)."""
    kind, heads = compute_dtype(q), q.shape[2]
    if triton:
        from .decode import decode, is_short
        from .forward import forward

        inputs = (q, k, v, beta, log_decay, state, cu_seqlens, scale, chunk)
        if not keep and is_short(q, cu_seqlens):
            return *decode(*inputs), absent(q), absent(q), absent(q)
        o, final, *held = forward(*inputs)
        inverse, states, errors = (x if keep and x is not None else absent(q) for x in held)
        return o, final, inverse, states, errors
    layout, c = _lay(q, k, v, beta, log_decay, cu_seqlens, scale, chunk)
    if state is None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = q.new_zeros(rows, heads, q.shape[3], v.shape[3], dtype=kind)
    out, memory, kept = chunked.forward(c, layout.open(state), layout)
    of_chunks = (kept.inverse, kept.states, None if beta is None else kept.errors)
    inverse, states, errors = (x.flatten(0, 1) if keep and x is not None else absent(memory) for x in of_chunks)
    return layout.restore(out, v.dtype), layout.close(memory, heads), inverse, states, errors


@linear_memory_op.register_fake
def _(q, k, v, beta, log_decay, state, cu_seqlens, scale, chunk, keep, triton):
    kind = compute_dtype(q)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = q.new_empty((rows, q.shape[2], q.shape[3], v.shape[3]), dtype=kind)
    kept = kept_like(q, v, cu_seqlens, chunk, beta is not None, keep, triton)
    return torch.empty_like(v, memory_format=torch.contiguous_format), final, *kept


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
    triton: bool,
) -> list[Tensor]:
    """Gradients of q, k, v, beta, log_decay and state; empty for those that were None."""
    if triton:
        from .backward import backward

        held = [None if beta is None else x for x in (inverse, errors)]
        inputs = (q, k, v, beta, log_decay, state, cu_seqlens, held[0], states, held[1])
        return [absent(q) if x is None else x for x in backward(grad_o, grad_final, *inputs, scale, chunk)]
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
def _(grad_o, grad_final, q, k, v, beta, log_decay, state, cu_seqlens, inverse, states, errors, scale, chunk, triton):
    return [
        absent(q) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, beta, log_decay, state)
    ]


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.chunk, _, ctx.triton = inputs
    kept = output[2:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros for every kept tensor would double them
    ctx.final = (output[1].shape, output[1].dtype)
    ctx.save_for_backward(*tensors, *kept)


def _differentiate(ctx, d_o, d_final, *_):
    saved = ctx.saved_tensors  # asked for once: activation checkpointing hands out each tensor a single time
    inputs, kept = saved[:7], saved[7:]
    shape, kind = ctx.final
    d_o = torch.zeros_like(inputs[2]) if d_o is None else d_o
    d_final = d_o.new_zeros(shape, dtype=kind) if d_final is None else d_final
    found = linear_memory_backward_op(d_o, d_final, *inputs, *kept, ctx.scale, ctx.chunk, ctx.triton)
    return (*present(found, inputs[:6]), None, None, None, None, None)


linear_memory_op.register_autograd(_differentiate, setup_context=_setup)


def _flops(q, v, beta, chunk) -> int:
    return matmul_flops(q[0] * q[1], q[2], q[3], v[3], chunk, beta is not None)


flop_formula(
    torch.ops.palimpsest.linear_memory,
    lambda q, k, v, beta, log_decay, state, cu, scale, chunk, *_, out_shape=None: _flops(q, v, beta, chunk),
)
flop_formula(
    torch.ops.palimpsest.linear_memory_backward,
    lambda go, gf, q, k, v, beta, g, state, cu, n, s, e, scale, chunk, *_, out_shape=None: (
        2 * _flops(q, v, beta, chunk)
    ),
)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (q, k, v, beta, log_decay, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out = linear_memory_op(*inputs, cu_seqlens, scale, chunk if triton else min(chunk, q.shape[1]), keep, triton)
    return out[0], out[1]


#: o and the final memory, by the chunked torch path and by the Triton kernels.
linear_memory = partial(_call, triton=False)
linear_memory_triton = partial(_call, triton=True)


def unfit(q: Tensor, v: Tensor, chunk: int) -> tuple[str, object, str] | None:
    """Why the Triton kernels do not cover a call, as :meth:`palimpsest.kernels.op.Operation.choose` takes it."""
    if q.dtype == torch.float64:
        return "q.dtype", "float64", "be float32 or narrower"
    for name, x, most in (("q", q, 128), ("v", v, 256)):
        width = x.shape[3]
        if width & (width - 1) or not 16 <= width <= most:
            return f"{name}.shape[3]", width, f"be a power of 2 from 16 to {most}"
    return None if chunk in (16, 32, 64) else ("chunk_size", chunk, "be 16, 32 or 64")
