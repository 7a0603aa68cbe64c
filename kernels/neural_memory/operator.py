"""The registered operator ``palimpsest::neural_memory``: forward with kept states, backward by replay of segments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..check import compute_dtype
from ..op import flop_formula, recording
from .chunked import Carry, Tokens, segment
from .cost import matmul_flops
from .schedule import make_schedule
from .spec import MemorySpec


def segment_chunks(spec: MemorySpec, shapes: Sequence[Sequence[int]]) -> int:
    """G, the chunks between two kept states.

    Chosen so that the kept states cost about as much as q, k, v and o do (4 D floats a token and head), and not more
    than the replay of one segment needs. Shapes are those of the weights, [..., in, out].
    """
    state = sum(a * b for *_, a, b in shapes) * (2 if spec.has_momentum else 1)
    return max(1, -(-state // (4 * shapes[0][-2] * spec.chunk_size)))


def checkpoint_rows(batch: int, length: int, rows: int, chunk: int, every: int, ragged: bool) -> int:
    """How many states [H, in, out] a forward keeps: exact for dense rows that start a chunk, else a bound."""
    if ragged:
        return (batch * length + rows * chunk) // (chunk * every)
    return batch * max(0, (-(-length // chunk) - 1) // every)


def _initial(
    weights: Sequence[Tensor], state: Sequence[Tensor], rows: int, spec: MemorySpec, kind: torch.dtype
) -> Carry:
    """W, S and anchor as [rows·H, in, out], in the caller's order of rows."""
    n = spec.layers
    if state:
        flat = [x.to(kind).flatten(0, 1) for x in state]
        return flat[:n], flat[n:-n], flat[-n:]
    start = [w.to(kind).repeat(rows, 1, 1) for w in weights]
    return start, [torch.zeros_like(w) for w in start] if spec.has_momentum else [], start


def _reorder(x: Tensor, order: Tensor | None, heads: int, back: bool = False) -> Tensor:
    """[N·H, ·, ·] with its rows taken in ``order``, or put back from it."""
    if order is None:
        return x
    own = x.unflatten(0, (-1, heads))
    return (torch.empty_like(own).index_copy(0, order, own) if back else own[order]).flatten(0, 1)


class _Call:
    """What forward and backward both need of one call: the schedule, the laid-out tokens, the segments."""

    def __init__(
        self,
        tokens: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        position: Tensor | None,
        cu_seqlens: Tensor | None,
        spec: MemorySpec,
    ) -> None:
        q = tokens[0]
        assert q is not None
        self.batch, self.length, self.heads = q.shape[:3]
        self.rows = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.schedule = make_schedule(self.batch, self.length, spec.chunk_size, position, cu_seqlens, q.device)
        dense = all(step.span is not None for step in self.schedule.steps)
        self.tokens = Tokens(tokens, self.heads, dense)
        every = segment_chunks(spec, [w.shape for w in weights])
        steps = self.schedule.steps
        self.segments = [steps[i : i + every] for i in range(0, len(steps), every)]

    def active(self, x: list[Tensor], steps: Sequence) -> list[Tensor]:
        """The part of [N·H, ·, ·] tensors that takes part in ``steps``."""
        return [y[: steps[0].rows * self.heads] for y in x]


def _update(whole: list[Tensor], part: list[Tensor]) -> list[Tensor]:
    """``whole`` with its first rows replaced by ``part``."""
    return [
        new if len(new) == len(old) else torch.cat([new, old[len(new) :]]) for old, new in zip(whole, part, strict=True)
    ]


@torch.library.custom_op("palimpsest::neural_memory", mutates_args=())
def neural_memory_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_retain: Tensor | None,
    log_momentum: Tensor | None,
    weights: Sequence[Tensor],
    norm: Tensor | None,
    state: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: str,
    keep: bool,
) -> list[Tensor]:
    """[o, final W, S and anchor of each layer, position, and with ``keep`` the kept W and S of each layer]."""
    what = MemorySpec.decode(spec)
    kind = compute_dtype(q)
    call = _Call((q, k, v, step, log_retain, log_momentum), weights, position, cu_seqlens, what)
    order, heads = call.schedule.order, call.heads
    start = _initial(weights, state, call.rows, what, kind)
    carry: Carry = tuple([_reorder(x, order, heads) for x in part] for part in start)  # type: ignore[assignment]
    laid_v = call.tokens.tensors[2]
    assert laid_v is not None
    o = torch.empty_like(laid_v)
    slots = _checkpoint_slots(q, weights, position, cu_seqlens, what) if keep else 0
    copies = 2 if what.has_momentum else 1
    # Zeros, because the count is only a bound for ragged rows and an operator's output must repeat.
    saved = [w.new_zeros((slots, *w.shape), dtype=kind) for w in list(weights) * copies]
    filled = 0
    scale = None if norm is None else norm.to(kind)
    for i, steps in enumerate(call.segments):
        entering = [call.active(part, steps) for part in carry]
        if keep and i:
            for slot, x in zip(saved, entering[0] + entering[1], strict=True):
                slot[filled : filled + steps[0].rows] = x.unflatten(0, (-1, heads))
            filled += steps[0].rows
        chunks = [[call.tokens.take(x, s) for x in call.tokens.tensors] for s in steps]
        outputs, leaving = segment(chunks, (entering[0], entering[1], entering[2]), scale, steps, what, heads)
        for s, out in zip(steps, outputs, strict=True):
            call.tokens.put(o, out, s)
        carry = tuple(_update(old, new) for old, new in zip(carry, leaving, strict=True))  # type: ignore[assignment]
    final = [_reorder(x, order, heads, back=True).unflatten(0, (-1, heads)) for part in carry for x in part]
    out = call.tokens.restore(o, call.batch).to(v.dtype).contiguous()
    # A tensor returned must be no other's alias, and no input's.
    owned = [x.clone(memory_format=torch.contiguous_format) for x in final]
    return [out, *owned, call.schedule.position, *saved]


def _checkpoint_slots(
    q: Tensor, weights: Sequence[Tensor], position: Tensor | None, cu_seqlens: Tensor | None, spec: MemorySpec
) -> int:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    every = segment_chunks(spec, [w.shape for w in weights])
    ragged = position is not None or cu_seqlens is not None
    return checkpoint_rows(q.shape[0], q.shape[1], rows, spec.chunk_size, every, ragged)


@neural_memory_op.register_fake
def _(q, k, v, step, log_retain, log_momentum, weights, norm, state, position, cu_seqlens, spec, keep):  # type: ignore[no-untyped-def]
    what = MemorySpec.decode(spec)
    kind = compute_dtype(q)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    parts = 3 if what.has_momentum else 2
    final = [w.new_empty((rows, *w.shape), dtype=kind) for w in list(weights) * parts]
    slots = _checkpoint_slots(q, weights, position, cu_seqlens, what) if keep else 0
    saved = [w.new_empty((slots, *w.shape), dtype=kind) for w in list(weights) * (parts - 1)]
    return [
        torch.empty_like(v, memory_format=torch.contiguous_format),
        *final,
        q.new_empty(rows, dtype=torch.int32),
        *saved,
    ]


@torch.library.custom_op("palimpsest::neural_memory_backward", mutates_args=())
def neural_memory_backward_op(
    grad_o: Tensor,
    grad_state: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_retain: Tensor | None,
    log_momentum: Tensor | None,
    weights: Sequence[Tensor],
    norm: Tensor | None,
    state: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Sequence[Tensor],
    spec: str,
) -> list[Tensor]:
    """Gradients of q, k, v, step, log_retain, log_momentum, norm (empty where None), then of weights or of the state."""
    what = MemorySpec.decode(spec)
    kind = compute_dtype(q)
    n, inputs = what.layers, (q, k, v, step, log_retain, log_momentum)
    call = _Call(inputs, weights, position, cu_seqlens, what)
    order, heads, take = call.schedule.order, call.heads, call.tokens.take
    laid = call.tokens.tensors
    grads = [None if x is None else torch.empty_like(x) for x in laid]
    laid_o = Tokens([grad_o.to(kind)], heads, call.tokens.dense).tensors[0]
    d_carry = [_reorder(x.to(kind).flatten(0, 1), order, heads) for x in grad_state]
    d_norm = None if norm is None else torch.zeros_like(norm, dtype=kind)
    start = _initial(weights, state, call.rows, what, kind)
    first: Carry = tuple([_reorder(x, order, heads) for x in part] for part in start)  # type: ignore[assignment]
    end = sum(steps[0].rows for steps in call.segments[1:])
    for i, steps in reversed(list(enumerate(call.segments))):
        if i:
            begin = end - steps[0].rows
            both = [x[begin:end].flatten(0, 1) for x in kept]
            end = begin
            entering: Carry = (both[:n], both[n:], both[:n])
        else:
            entering = tuple(call.active(part, steps) for part in first)  # type: ignore[assignment]
        leaves: list = [[_leaf(x) for x in part] for part in entering]
        chunks = [[_leaf(take(x, s)) for x in laid] for s in steps]
        scale = None if norm is None else _leaf(norm.to(kind))
        with recording():
            outputs, leaving = segment(chunks, (leaves[0], leaves[1], leaves[2]), scale, steps, what, heads)
        flat_leaves = [x for part in leaves for x in part]
        wanted = (
            [x for chunk in chunks for x in chunk if x is not None] + flat_leaves + ([] if scale is None else [scale])
        )
        d_leaving = call.active(d_carry, steps)
        found = iter(
            torch.autograd.grad(
                outputs + [x for part in leaving for x in part],
                wanted,
                [take(laid_o, s) for s in steps] + d_leaving,
                allow_unused=True,
                materialize_grads=True,
            )
        )
        for s, chunk in zip(steps, chunks, strict=True):
            for grad, x in zip(grads, chunk, strict=True):
                if x is not None:
                    assert grad is not None
                    call.tokens.put(grad, next(found), s)
        d_carry = _update(d_carry, [next(found) for _ in flat_leaves])
        if d_norm is not None:
            d_norm += next(found)
    return _return_gradients(call, inputs, grads, d_norm, norm, d_carry, weights, state, n)


def _leaf(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().requires_grad_()


def _return_gradients(call, inputs, grads, d_norm, norm, d_carry, weights, state, n):  # type: ignore[no-untyped-def]
    """Lay the gradients out as the inputs were, in the order the backward operator documents."""
    none = inputs[0].new_empty(0)
    out = [
        none.clone() if x is None else call.tokens.restore(g, call.batch).to(x.dtype).contiguous()
        for x, g in zip(inputs, grads, strict=True)
    ]
    out.append(none.clone() if norm is None else d_norm.to(norm.dtype))
    final = [_reorder(x, call.schedule.order, call.heads, back=True).unflatten(0, (-1, call.heads)) for x in d_carry]
    if state:
        return out + [
            x.to(s.dtype).clone(memory_format=torch.contiguous_format) for x, s in zip(final, state, strict=True)
        ]
    return out + [(a + b).sum(0).to(w.dtype) for a, b, w in zip(final[:n], final[-n:], weights, strict=True)]


@neural_memory_backward_op.register_fake
def _(
    grad_o, grad_state, q, k, v, step, log_retain, log_momentum, weights, norm, state, position, cu_seqlens, kept, spec
):  # type: ignore[no-untyped-def]
    shaped = [q, k, v, step, log_retain, log_momentum, norm, *(state or weights)]
    return [q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in shaped]


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, step, log_retain, log_momentum, weights, norm, state, position, cu_seqlens, spec, keep = inputs
    what = MemorySpec.decode(spec)
    finals = what.layers * (3 if what.has_momentum else 2)
    kept = output[2 + finals :]
    ctx.mark_non_differentiable(output[1 + finals], *kept)
    ctx.counts = (len(weights), len(state), finals, len(kept))
    ctx.spec = spec
    ctx.save_for_backward(q, k, v, step, log_retain, log_momentum, norm, position, cu_seqlens, *weights, *state, *kept)


def _backward(ctx, grads):  # type: ignore[no-untyped-def]
    q, k, v, step, log_retain, log_momentum, norm, position, cu_seqlens, *rest = ctx.saved_tensors
    n_weights, n_state, finals, n_kept = ctx.counts
    weights, state, kept = rest[:n_weights], rest[n_weights : n_weights + n_state], rest[n_weights + n_state :]
    found = neural_memory_backward_op(
        grads[0],
        list(grads[1 : 1 + finals]),
        q,
        k,
        v,
        step,
        log_retain,
        log_momentum,
        weights,
        norm,
        state,
        position,
        cu_seqlens,
        kept,
        ctx.spec,
    )
    tokens = [
        None if x is None else g for x, g in zip((q, k, v, step, log_retain, log_momentum), found[:6], strict=True)
    ]
    d_norm = None if norm is None else found[6]
    d_weights = [None] * n_weights if n_state else found[7:]
    d_state = found[7:] if n_state else []
    return (*tokens, d_weights, d_norm, d_state, None, None, None, None)


neural_memory_op.register_autograd(_backward, setup_context=_setup)


def _forward_flops(
    q, k, v, step, log_retain, log_momentum, weights, norm, state, position, cu, spec, keep, out_shape=None
):  # type: ignore[no-untyped-def]
    return matmul_flops(q[0] * q[1], q[2], [w[-2:] for w in weights], MemorySpec.decode(spec))


def _backward_flops(
    grad_o, grad_state, q, k, v, step, lr, lm, weights, norm, state, position, cu, kept, spec, out_shape=None
):  # type: ignore[no-untyped-def]
    return 2 * matmul_flops(q[0] * q[1], q[2], [w[-2:] for w in weights], MemorySpec.decode(spec))


flop_formula(torch.ops.palimpsest.neural_memory, _forward_flops)
flop_formula(torch.ops.palimpsest.neural_memory_backward, _backward_flops)
