"""The registered operator ``palimpsest::neural_memory``: forward with kept states, backward by replay of segments.

One operator for plain torch and for Triton (``triton``): both keep [W; S] every G chunks, each in places of its own.
Memories that have no backward derived by hand go through autograd, step by step: ``replay.py``.

Memory: the forward keeps W and S every G chunks, and nothing else but its inputs; the backward replays G chunks at a
time. That is O(tokens) for the inputs and their gradients, plus one state every G chunks.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..check import compute_dtype
from ..op import flop_formula
from ..operator import absent, operator, present
from . import replay
from .call import Call
from .chunked import Chunk, chunk_backward, chunk_forward
from .cost import kept_every, kept_slots, matmul_flops, segment_chunks
from .duals import derives
from .gates import gates_backward, make_gates
from .schedule import Step
from .slots import inner_of, slots_of
from .spec import MemorySpec
from .state import state_names


def checkpoint_rows(batch: int, length: int, rows: int, chunk: int, every: int, ragged: bool) -> int:
    """How many states [H, in, out] a forward keeps: exact for dense rows that start a chunk, else a bound."""
    if ragged:
        return (batch * length + rows * chunk) // (chunk * every)
    return batch * max(0, (-(-length // chunk) - 1) // every)


def _checkpoint_slots(
    q: Tensor,
    weights: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: MemorySpec,
    triton: bool,
) -> int:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens, widths = q.shape[0] * q.shape[1], [(w.shape[-2], w.shape[-1]) for w in weights]
    if triton and spec.window > 1:
        tokens = slots_of(q.shape[0], q.shape[1], rows, position is not None, cu_seqlens is not None, spec, q.shape[3])
        spec = inner_of(spec, q.shape[3])
    if triton:
        return kept_slots(tokens, rows, spec.chunk_size, kept_every(spec, widths))
    every = segment_chunks(spec, widths)
    ragged = position is not None or cu_seqlens is not None
    return checkpoint_rows(q.shape[0], q.shape[1], rows, spec.step_size, every, ragged)


class _Call(Call):
    """A call of a memory that ``chunked.py`` covers: W and S of a layer are one matrix [W; S]."""

    def split(self, state: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """A state's tensors (W, S if any, anchor of every layer; [N, H, ·, ·]) as [W; S] and anchor, [N·H, ·, ·]."""
        n = self.spec.layers
        flat = [self.ordered(x) for x in state]
        if not self.spec.has_momentum:
            return flat[:n], flat[n:]
        return [torch.cat([w, s], 1) for w, s in zip(flat[:n], flat[n : 2 * n], strict=True)], flat[2 * n :]

    def join(self, states: Sequence[Tensor], anchor: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of :meth:`split`; every tensor its own."""
        n, widths = self.spec.layers, [w.shape[-2] for w in self.weights]
        parts = [x[:, :a] for x, a in zip(states, widths, strict=True)]
        if self.spec.has_momentum:
            parts += [x[:, a:] for x, a in zip(states, widths, strict=True)]
        assert len(parts) % n == 0
        return [self.restored(x).clone(memory_format=torch.contiguous_format) for x in [*parts, *anchor]]

    def initial(self) -> tuple[list[Tensor], list[Tensor]]:
        """[W; S] and anchor where the call begins."""
        if self.state:
            return self.split(self.state)
        start = [w.to(self.kind).repeat(self.rows, 1, 1) for w in self.weights]
        if not self.spec.has_momentum:
            return start, start
        return [torch.cat([w, torch.zeros_like(w)], 1) for w in start], start

    def run(
        self, steps: Sequence[Step], states: list[Tensor], anchor: list[Tensor]
    ) -> Iterator[tuple[Step, Tensor, list[Tensor], list[Tensor], Chunk]]:
        """Run ``steps``; after each, yields it, its reads, and [W; S] and anchor of its active rows."""
        for step in steps:
            active = step.rows * self.heads
            states, anchor = [x[:active] for x in states], [x[:active] for x in anchor]
            q, k, v, theta, log_retain, log_momentum = (self.layout.take(x, step) for x in self.tokens)
            assert q is not None and k is not None and v is not None and theta is not None
            valid = None if step.valid is None else step.valid.repeat_interleave(self.heads, 0)
            gates = make_gates(theta, log_retain, log_momentum, valid, shift=not self.spec.read_after_write)
            scale = None if self.norm is None else self.norm[:active]
            out, states, chunk = chunk_forward(q, k, v, gates, states, anchor, scale, self.spec)
            ended = self.ended(step)
            now = [x[:, : w.shape[-2]] for x, w in zip(states, self.weights, strict=True)]
            if ended is True:
                anchor = now
            elif ended is not False:
                anchor = [torch.where(ended, w, x) for w, x in zip(now, anchor, strict=True)]
            yield step, out, states, anchor, chunk


@operator("neural_memory")
def neural_memory_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_retain: Tensor | None,
    log_momentum: Tensor | None,
    gamma: Tensor | None,
    delta: Tensor | None,
    weights: Sequence[Tensor],
    norm: Tensor | None,
    state: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: str,
    keep: bool,
    triton: bool,
) -> list[Tensor]:
    """[o, the final state's tensors, position, and with ``keep`` what is kept]: [W; S], by layer or, with Triton, as
    one; or all that ``replay.py`` carries from step to step."""
    what = MemorySpec.decode(spec)
    if triton:
        from .decode import run_decode
        from .forward import run_forward
        from .windows import run_forward_window

        tokens = q, k, v, step, log_retain, log_momentum
        rest = weights, norm, state, position, cu_seqlens, what, keep
        if q.shape[1] == 1 and position is not None and cu_seqlens is None and not keep:
            return run_decode((*tokens, delta), weights, norm, state, position, what, gamma)
        if what.window > 1:
            return run_forward_window((*tokens, gamma, delta), *rest)
        return run_forward((*tokens, delta), *rest)
    slots = _checkpoint_slots(q, weights, position, cu_seqlens, what, triton) if keep else 0
    if not what.derived_by_hand:
        given = q, k, v, step, log_retain, log_momentum, gamma, delta
        generic = replay.GenericCall(given, weights, norm, state, position, cu_seqlens, what)
        reads, after, kept = replay.forward(generic, slots, keep)
        return [reads.to(v.dtype), *after, generic.schedule.position, *kept]
    call = _Call((q, k, v, step, log_retain, log_momentum), weights, norm, state, position, cu_seqlens, what)
    states, anchor = call.initial()
    final, final_anchor = [x.clone() for x in states], [x.clone() for x in anchor]
    laid_v = call.tokens[2]
    assert laid_v is not None
    o = torch.empty_like(laid_v)
    # Zeros, because the count is only a bound for ragged rows and an operator's output must repeat.
    kept = [x.new_zeros((slots, call.heads, *x.shape[1:])) for x in states]
    filled = 0
    for i, steps in enumerate(call.segments):
        if keep and i:
            rows = steps[0].rows
            for slot, x in zip(kept, states, strict=True):
                slot[filled : filled + rows] = x[: rows * call.heads].unflatten(0, (rows, call.heads))
            filled += rows
        for s, out, new_states, new_anchor, _ in call.run(steps, states, anchor):
            states, anchor = new_states, new_anchor
            call.layout.put(o, out, s)
            if call.schedule.order is not None:  # rows may end at any step
                for whole, x in zip(final + final_anchor, states + anchor, strict=True):
                    whole[: len(x)] = x
    if call.schedule.order is None:
        final, final_anchor = states, anchor
    return [call.layout.restore(o).to(v.dtype), *call.join(final, final_anchor), call.schedule.position, *kept]


@neural_memory_op.register_fake
def _(
    q, k, v, step, log_retain, log_momentum, gamma, delta, weights, norm, state, position, cu_seqlens, spec, keep,
    triton,
):  # fmt: skip
    what = MemorySpec.decode(spec)
    kind = compute_dtype(q)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    parts = 3 if what.has_momentum else 2
    final = [q.new_empty((rows, *shape), dtype=kind) for shape in replay.state_shapes(weights, what)]
    slots = _checkpoint_slots(q, weights, position, cu_seqlens, what, triton) if keep else 0
    if triton:
        size = sum(w.shape[1] * w.shape[2] for w in weights)
        saved = [q.new_empty((slots, q.shape[2], (parts - 1) * size), dtype=kind)] if keep else []
        if keep and derives(what):
            saved.append(q.new_empty((rows, q.shape[2], parts * size), dtype=kind))
    elif not what.derived_by_hand:
        shapes = replay.kept_shapes(weights, what) if keep else []
        saved = [q.new_empty((slots, *shape), dtype=kind) for shape in shapes]
    else:
        saved = [w.new_empty((slots, w.shape[0], w.shape[1] * (parts - 1), w.shape[2]), dtype=kind) for w in weights]
    return [
        torch.empty_like(v, memory_format=torch.contiguous_format),
        *final,
        q.new_empty(rows, dtype=torch.int32),
        *saved,
    ]


@operator("neural_memory_backward")
def neural_memory_backward_op(
    grad_o: Tensor,
    grad_state: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_retain: Tensor | None,
    log_momentum: Tensor | None,
    gamma: Tensor | None,
    delta: Tensor | None,
    weights: Sequence[Tensor],
    norm: Tensor | None,
    state: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Sequence[Tensor],
    spec: str,
    triton: bool,
) -> list[Tensor]:
    """Gradients of q, k, v, step, log_retain, log_momentum, gamma, delta, norm (empty where None), then of the state
    or, without one, of the weights."""
    what = MemorySpec.decode(spec)
    inputs = (q, k, v, step, log_retain, log_momentum)
    if triton:
        from .backward import run_backward
        from .windows import run_backward_window

        rest = weights, norm, state, position, cu_seqlens, kept, what
        if what.window > 1:
            found = run_backward_window(grad_o, grad_state, (*inputs, gamma, delta), *rest)
        else:
            found = run_backward(grad_o, grad_state, (*inputs, delta), *rest)
        return [absent(weights[0]) if x is None else x for x in found]
    if not what.derived_by_hand:
        generic = replay.GenericCall((*inputs, gamma, delta), weights, norm, state, position, cu_seqlens, what)
        of_tokens, of_norm, of_start = replay.backward(generic, grad_o, grad_state, kept)
        return _lay_out(generic, (*inputs, gamma, delta), of_tokens, of_norm, norm) + [
            x.to(old.dtype) for x, old in zip(of_start, state or weights, strict=True)
        ]
    call = _Call(inputs, weights, norm, state, position, cu_seqlens, what)
    grads = [None if x is None else torch.empty_like(x) for x in call.tokens]
    d_reads = call.layout.lay(grad_o, call.kind)
    d_states, d_anchor = call.split([x.clone() for x in grad_state])  # carried back in place
    d_norm = None if norm is None else torch.zeros_like(norm, dtype=call.kind)
    states, anchor = call.initial()
    widths = [w.shape[-2] for w in weights]
    end = sum(steps[0].rows for steps in call.segments[1:])
    for i, steps in reversed(list(enumerate(call.segments))):
        if i:
            begin, end = end - steps[0].rows, end - steps[0].rows
            held = [x[begin : begin + steps[0].rows].flatten(0, 1) for x in kept]
            replayed = list(call.run(steps, held, [x[:, :a] for x, a in zip(held, widths, strict=True)]))
        else:
            replayed = list(call.run(steps, states, anchor))
        while replayed:
            s, _, _, _, chunk = replayed.pop()
            more = _step_backward(call, s, chunk, d_reads, d_states, d_anchor, grads)
            if d_norm is not None and more is not None:
                d_norm += more
    del states, anchor, d_reads
    call.tokens.clear()  # not needed any more, and as large as the results that are laid out next
    out = _lay_out(call, (*inputs, None, None), [*grads, None, None], d_norm, norm)
    if state:
        return out + [x.to(s.dtype) for x, s in zip(call.join(d_states, d_anchor), state, strict=True)]
    for d_state, d_held, w in zip(d_states, d_anchor, weights, strict=True):
        both = d_state[:, : w.shape[-2]] + d_held
        out.append(both.unflatten(0, (call.rows, call.heads)).sum(0).to(w.dtype))
    return out


def _step_backward(
    call: _Call,
    step: Step,
    chunk: Chunk,
    d_reads: Tensor | None,
    d_states: list[Tensor],
    d_anchor: list[Tensor],
    grads: Sequence[Tensor | None],
) -> Tensor | None:
    """The backward of one step: writes the tokens' gradients, carries ``d_states`` and ``d_anchor`` back, and
    returns the gradient of norm [H, out]."""
    active, ended = step.rows * call.heads, call.ended(step)
    now, before = [x[:active] for x in d_states], []
    for d_state, whole, weight in zip(now, d_anchor, call.weights, strict=True):
        d_held = whole[:active]
        if ended is not False:  # a completed chunk's weights became the anchor
            d_state[:, : weight.shape[-2]] += d_held if ended is True else d_held * ended
        before.append(None if ended is True else d_held if ended is False else d_held * ~ended)
    q, _, _, theta, log_retain, log_momentum = (call.layout.take(x, step) for x in call.tokens)
    d_out = call.layout.take(d_reads, step)
    assert q is not None and theta is not None and d_out is not None
    scale = None if call.norm is None else call.norm[:active]
    d = chunk_backward(chunk, d_out, now, q, scale, call.spec)
    of_gates = gates_backward(chunk.gates, d.gates, theta, log_retain, log_momentum)
    for grad, part in zip(grads, (d.q, d.k, d.v, *of_gates), strict=True):
        if grad is not None and part is not None:
            call.layout.put(grad, part, step)
    anchors = [new if old is None else new.add_(old) for new, old in zip(d.anchor, before, strict=True)]
    for carried, changed in ((d_states, d.states), (d_anchor, anchors)):
        for i, new in enumerate(changed):
            if active == len(carried[i]):
                carried[i] = new
            else:
                carried[i][:active] = new
    return None if d.norm is None else d.norm.unflatten(0, (step.rows, call.heads)).sum((0, 2))


def _lay_out(
    call: Call,
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    d_norm: Tensor | None,
    norm: Tensor | None,
) -> list[Tensor]:
    """The gradients of tokens and norm in the layouts and dtypes of the inputs, empty where there are none."""
    out = []
    for x, grad in zip(inputs, grads, strict=True):
        out.append(absent(call.weights[0]) if x is None or grad is None else call.layout.restore(grad).to(x.dtype))
    out.append(absent(call.weights[0]) if norm is None or d_norm is None else d_norm.to(norm.dtype))
    return out


@neural_memory_backward_op.register_fake
def _(
    grad_o, grad_state, q, k, v, step, log_retain, log_momentum, gamma, delta, weights, norm, state, position,
    cu_seqlens, kept, spec, triton,
):  # fmt: skip
    shaped = [q, k, v, step, log_retain, log_momentum, gamma, delta, norm, *(state or weights)]
    return [
        absent(weights[0]) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in shaped
    ]


def _setup(ctx, inputs, output):
    *tokens, weights, norm, state, position, cu_seqlens, spec, _, triton = inputs
    finals = len(state_names(MemorySpec.decode(spec)))
    kept = output[2 + finals :]
    ctx.mark_non_differentiable(output[1 + finals], *kept)
    ctx.set_materialize_grads(False)  # zeros for every kept state would double them
    ctx.final_shapes = [x.shape for x in output[1 : 1 + finals]]
    ctx.counts = (len(weights), len(state))
    ctx.spec, ctx.triton = spec, triton
    ctx.save_for_backward(*tokens, norm, position, cu_seqlens, *weights, *state, *kept)


def _backward(ctx, grads):
    saved = ctx.saved_tensors  # asked for once: activation checkpointing hands out each tensor a single time
    tokens, (norm, position, cu_seqlens), rest = saved[:8], saved[8:11], saved[11:]
    n_weights, n_state = ctx.counts
    weights, state, kept = rest[:n_weights], rest[n_weights : n_weights + n_state], rest[n_weights + n_state :]
    q, _, v = tokens[:3]
    d_o = torch.zeros_like(v) if grads[0] is None else grads[0]
    kind = compute_dtype(q)
    d_final = [
        q.new_zeros(shape, dtype=kind) if grad is None else grad
        for grad, shape in zip(grads[1:], ctx.final_shapes, strict=False)
    ]
    found = neural_memory_backward_op(
        d_o, d_final, *tokens, weights, norm, state, position, cu_seqlens, kept, ctx.spec, ctx.triton
    )
    d_tokens = present(found[:8], tokens)
    d_norm = None if norm is None else found[8]
    d_weights = [None] * n_weights if n_state else found[9:]
    return (*d_tokens, d_weights, d_norm, found[9:] if n_state else [], None, None, None, None, None)


neural_memory_op.register_autograd(_backward, setup_context=_setup)


def _forward_flops(q, k, v, step, log_retain, log_momentum, gamma, delta, weights, *rest, out_shape=None):
    spec = MemorySpec.decode(rest[4])
    return matmul_flops(q[0] * q[1], q[2], [w[-2:] for w in weights], spec)


def _backward_flops(grad_o, grad_state, q, k, v, step, lr, lm, gamma, delta, weights, *rest, out_shape=None):
    spec = MemorySpec.decode(rest[5])
    return 2 * matmul_flops(q[0] * q[1], q[2], [w[-2:] for w in weights], spec)


flop_formula(torch.ops.palimpsest.neural_memory, _forward_flops)
flop_formula(torch.ops.palimpsest.neural_memory_backward, _backward_flops)
