"""Forward and backward of the memories that ``generic.py`` computes: steps in a row, and a replay of them by segments.

The forward keeps what goes from step to step every G steps; the backward goes through one segment of G steps at a time
by autograd, from there. That is O(tokens) for inputs and gradients, one kept state every G steps, and one segment's
graph.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .call import Call
from .generic import Carry, Tokens, step_forward
from .schedule import Step
from .spec import MemorySpec
from .state import fresh_state, halo_shapes, matrix_names, state_names


def state_shapes(weights: Sequence[Tensor], spec: MemorySpec) -> list[tuple[int, ...]]:
    """Shapes of a state's tensors for one row, in the order of ``state_names``."""
    matrices = [tuple(weights[i % spec.layers].shape) for i in range(len(matrix_names(spec)))]
    return matrices + list(halo_shapes(weights, spec).values())


def kept_shapes(weights: Sequence[Tensor], spec: MemorySpec) -> list[tuple[int, ...]]:
    """The same as they go from step to step: heads first."""
    shapes, n = state_shapes(weights, spec), len(matrix_names(spec))
    return shapes[:n] + [(heads, tokens, *rest) for tokens, heads, *rest in shapes[n:]]


class GenericCall(Call):
    """A call: what goes from step to step is a flat list in the order of ``state_names``, tensors [N·H, ...]."""

    def enter(self, state: Sequence[Tensor]) -> list[Tensor]:
        """A state's tensors, as they go from step to step."""
        n = len(matrix_names(self.spec))
        return [self.ordered(x if i < n else x.movedim(2, 1)) for i, x in enumerate(state)]

    def leave(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of :meth:`enter`; every tensor its own."""
        n = len(matrix_names(self.spec))
        found = [self.restored(x) for x in flat]
        found = [x if i < n else x.movedim(1, 2) for i, x in enumerate(found)]
        return [x.clone(memory_format=torch.contiguous_format) for x in found]

    def fresh(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What a call without a state begins with, from W_0 [H, in, out]."""
        state = fresh_state([w.to(self.kind) for w in weights], self.rows, self.spec)
        n = len(matrix_names(self.spec))
        held = [state[name] for name in state_names(self.spec)]
        return [(x if i < n else x.movedim(2, 1)).flatten(0, 1) for i, x in enumerate(held)]

    def initial(self) -> list[Tensor]:
        """What the call begins with."""
        return self.enter(self.state) if self.state else self.fresh(self.weights)

    def take(self, step: Step) -> list[Tensor | None]:
        """The tokens of a step: q, k, v, step, log_retain, log_momentum, γ, δ."""
        return [self.layout.take(x, step) for x in self.tokens]

    def run(
        self, step: Step, given: Sequence[Tensor | None], flat: Sequence[Tensor], norm: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Reads of one step, and what goes on after it."""
        valid = None if step.valid is None else step.valid.repeat_interleave(self.heads, 0)
        flags = (self.turned(step), self.ended(step))
        tokens = Tokens(*given, valid, *flags)  # type: ignore[arg-type, call-arg]
        scale = None if norm is None else norm[: step.rows * self.heads]
        out, carry = step_forward(tokens, Carry.of(flat, self.spec), scale, self.spec)
        return out, carry.flat()


def forward(call: GenericCall, slots: int, keep: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Reads as laid out, the final state, and with ``keep`` what the backward starts its segments from."""
    v = call.tokens[2]
    assert v is not None
    flat = call.initial()
    final = [x.clone() for x in flat]
    o = torch.empty_like(v)
    # Zeros, because the count is only a bound for ragged rows and an operator's output must repeat.
    kept = [x.new_zeros((slots, call.heads, *x.shape[1:])) for x in flat] if keep else []
    filled = 0
    for i, steps in enumerate(call.segments):
        if keep and i:
            rows = steps[0].rows
            for slot, x in zip(kept, flat, strict=True):
                slot[filled : filled + rows] = x[: rows * call.heads].unflatten(0, (rows, call.heads))
            filled += rows
        for step in steps:
            out, flat = call.run(step, call.take(step), [x[: step.rows * call.heads] for x in flat], call.norm)
            call.layout.put(o, out, step)
            for whole, x in zip(final, flat, strict=True):  # rows may end at any step
                whole[: len(x)] = x
    return call.layout.restore(o), call.leave(final), kept


def _segments(call: GenericCall, kept: Sequence[Tensor]) -> Iterator[tuple[list[Step], list[Tensor]]]:
    """The segments from the last to the first, each with what it begins with."""
    end = sum(steps[0].rows for steps in call.segments[1:])
    for i, steps in reversed(list(enumerate(call.segments))):
        rows = steps[0].rows
        if i:
            end -= rows
            yield steps, [x[end : end + rows].flatten(0, 1) for x in kept]
        else:
            yield steps, [x[: rows * call.heads] for x in call.initial()]


def backward(
    call: GenericCall, grad_o: Tensor, grad_state: Sequence[Tensor], kept: Sequence[Tensor]
) -> tuple[list[Tensor | None], Tensor | None, list[Tensor]]:
    """Gradients of the tokens as laid out, of norm [H, out], and of the state or, without one, of the weights."""
    grads = [None if x is None else torch.empty_like(x) for x in call.tokens]
    d_reads = call.layout.lay(grad_o, call.kind)
    d_flat = [x.clone() for x in call.enter(grad_state)]
    d_norm = None if call.norm is None else torch.zeros_like(call.norm)
    for steps, held in _segments(call, kept):
        _segment_backward(call, steps, held, d_reads, d_flat, grads, d_norm)
    call.tokens.clear()  # not needed any more, and as large as the results that are laid out next
    of_norm = None if d_norm is None else d_norm.unflatten(0, (call.rows, call.heads)).sum((0, 2))
    if call.state:
        return grads, of_norm, call.leave(d_flat)
    with _autograd():
        weights = [w.detach().requires_grad_() for w in call.weights]
        return grads, of_norm, _gradients(zip(call.fresh(weights), d_flat, strict=True), weights)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside of a registered operator, where the dispatcher leaves it out."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield


def _gradients(ends: Iterable[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of ``leaves``, from pairs of what they give and its gradient."""
    outputs, gradients = zip(*((x, d) for x, d in ends if x.requires_grad), strict=True)
    return list(torch.autograd.grad(outputs, leaves, gradients, materialize_grads=True))


def _segment_backward(
    call: GenericCall,
    steps: Sequence[Step],
    held: Sequence[Tensor],
    d_reads: Tensor | None,
    d_flat: list[Tensor],
    grads: Sequence[Tensor | None],
    d_norm: Tensor | None,
) -> None:
    """Through one segment, from the gradients of what it ends with to those of what it begins with, in ``d_flat``."""
    ends: list[tuple[Tensor, Tensor]] = []  # what the segment gives, and the gradient of it
    with _autograd():
        start = [x.detach().requires_grad_() for x in held]
        norm = None if call.norm is None else call.norm.detach().requires_grad_()
        given = [[None if x is None else x.detach().requires_grad_() for x in call.take(step)] for step in steps]
        flat: list[Tensor] = start
        for step, tokens in zip(steps, given, strict=True):
            active = step.rows * call.heads
            if active < len(flat[0]):  # the rest ended before this step
                ends += [(x[active:], d[active : len(x)]) for x, d in zip(flat, d_flat, strict=True)]
                flat = [x[:active] for x in flat]
            out, flat = call.run(step, tokens, flat, norm)
            d_out = call.layout.take(d_reads, step)
            assert d_out is not None
            ends.append((out, d_out))
        ends += [(x, d[: len(x)]) for x, d in zip(flat, d_flat, strict=True)]
        leaves = [*start, *(x for tokens in given for x in tokens if x is not None), *([] if norm is None else [norm])]
        found = _gradients(ends, leaves)
    for d, new in zip(d_flat, found, strict=False):
        d[: len(new)] = new
    if d_norm is not None:
        d_norm += found.pop()
    rest = iter(found[len(start) :])
    for step, tokens in zip(steps, given, strict=True):
        for grad, x in zip(grads, tokens, strict=True):
            if grad is not None and x is not None:
                call.layout.put(grad, next(rest), step)
