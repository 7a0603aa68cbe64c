"""The backward of neural memory in Triton: segments of EVERY chunks in reverse order, four kernels each.

A segment begins where the forward kept [W; S]. ``neural_memory_states`` and ``neural_memory_reads``, those of the
forward, replay it; ``neural_memory_reads_backward`` (``backward_reads.py``) goes back through the reads of all its
steps at once; ``neural_memory_carry`` (``backward_carry.py``) walks them in reverse with the gradients of the state.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import Kernel
from .backward_carry import neural_memory_carry
from .backward_reads import neural_memory_reads_backward
from .canary import backward_pairs
from .duals import derives, enter, enter_backward, leave_backward, start, start_backward
from .forward import (
    READS,
    STATES,
    constants_of,
    held_order,
    launch,
    pack,
    segments,
    settled,
    unpack,
)
from .gate_kernels import run_all_gates_backward, run_gates
from .launch_plans import carry_plan, reads_backward_plan
from .orthogonal import turned_size
from .slots import Band
from .spec import MemorySpec
from .tiles import workspace_sizes

READS_BACKWARD = Kernel(neural_memory_reads_backward, reads_backward_plan, backward_pairs)
CARRY = Kernel(neural_memory_carry, carry_plan, backward_pairs)


def run_backward(
    grad_o: Tensor,
    grad_state: Sequence[Tensor],
    tokens: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    norm: Tensor | None,
    state: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Sequence[Tensor],
    spec: MemorySpec,
    band: Band | None = None,
) -> list[Tensor | None]:
    """What the backward operator returns: gradients of q, k, v, the gates and norm (None where those are), then of the
    state or, without one, of the weights. ``band``: see ``run_forward``."""
    q, k, v, step, log_retain, log_momentum, delta = (None if x is None else x.contiguous() for x in tokens)
    assert q is not None and k is not None and v is not None and step is not None
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    constants = constants_of(q, weights, bool(state), cu_seqlens is not None, True, spec, band)
    gates = step, log_retain, log_momentum, position, cu_seqlens, rows, constants
    of_steps = run_gates(*gates, q.dtype, None if band is None else band.gamma)
    d_of_steps = tuple(torch.empty_like(x) for x in of_steps)
    d_tokens = [torch.empty_like(x) for x in (q, k, v)]
    d_delta = None if delta is None else torch.empty_like(delta)
    entered = enter(state, spec)
    final = unpack(kept[1], weights, spec) if derives(spec) else []
    ends = settled(step, state, rows, constants, spec)
    # By the reads of a step and by its error; zero where there is no step.
    d_norms = step.new_zeros((0 if norm is None else of_steps[0].shape[0], q.shape[2], 2, q.shape[3]))
    arguments = {
        **dict(zip(("q_ptr", "k_ptr", "v_ptr"), (q, k, v), strict=True)),
        "threshold_ptr": step if delta is None else delta,
        "d_o_ptr": grad_o.contiguous(),
        **dict(zip(("write_ptr", "vectors_ptr", "ends_ptr"), of_steps, strict=True)),
        "norm_ptr": step if norm is None else norm.contiguous(),
        "start_ptr": pack(entered or start(weights, spec), spec),
        "settled_ptr": ends,
        "position_ptr": step if position is None else position,
        "cu_ptr": step if cu_seqlens is None else cu_seqlens,
        "kept_ptr": kept[0],
        "end_ptr": pack(leave_backward(grad_state, final, spec), spec),
        **dict.fromkeys(("o_ptr", "state_ptr"), step),  # of the forward alone
        **dict(zip(("d_q_ptr", "d_k_ptr", "d_v_ptr"), d_tokens, strict=True)),
        **dict(zip(("d_write_ptr", "d_vectors_ptr", "d_ends_ptr"), d_of_steps, strict=True)),
        "d_norm_ptr": d_norms,
        "d_threshold_ptr": step if d_delta is None else d_delta,
        "T": q.shape[1],
        "zero": 0,
    }
    d_state = walk_segments(arguments, constants, rows, spec, band)
    d_gates = run_all_gates_backward(d_of_steps, gates, q.dtype, band)
    if state:
        of_shifts = shift_gradients(ends, weights, spec)
        found = enter_backward(unpack(d_state, weights, spec), entered, of_shifts, spec)
    else:
        found = start_backward(unpack(d_state.sum(0), weights, spec)[: len(weights)], weights, spec)
        found = [x.to(w.dtype) for x, w in zip(found, weights, strict=True)]
    return [*d_tokens, *d_gates, d_delta, None if norm is None else d_norms.sum((0, 2)).to(norm.dtype), *found]


def shift_gradients(ends: Tensor, weights: Sequence[Tensor], spec: MemorySpec) -> list[Tensor]:
    """Of the shifts of every layer, where there are any, [N, H, out]."""
    if spec.retention != "kl":
        return []
    widths = [weights[i].shape[-1] for i in held_order(spec)]
    columns = sum(widths)
    found = ends[..., columns : 2 * columns].split(widths, -1)
    return [found[held_order(spec).index(i)] for i in range(len(weights))]


def walk_segments(
    arguments: dict[str, Any], constants: dict[str, Any], rows: int, spec: MemorySpec, band: Band | None
) -> Tensor:
    """Launches the kernels for every segment that a sequence of these shapes can have, the last first; returns the
    gradients of the state before the call, packed like ``end_ptr``."""
    q, end = arguments["q_ptr"], arguments["end_ptr"]
    heads, d, f, c, chunk, every = (constants[name] for name in ("H", "D", "F", "C", "CHUNK", "EVERY"))
    steps = every * chunk // c
    small, wide = workspace_sizes(c, d, f, spec.layers)
    size = end.shape[-1] // (3 if spec.has_momentum else 2)
    d_states = end.new_empty((2, *end.shape))
    arguments = arguments | {
        "states_ptr": end.new_empty((rows, heads, steps, end.shape[-1] - size)),
        "turned_ptr": end.new_empty((rows, heads, turned_size(constants))),
        "small_ptr": q.new_empty((rows, heads, steps, small)),
        "wide_ptr": end.new_empty((rows, heads, steps, wide)),
        "zero_ptr": q.new_zeros(1, dtype=torch.int32),
    }
    for segment in reversed(range(segments(q.shape[1], constants, band))):
        arguments["segment"] = segment
        arguments |= {"d_before_ptr": d_states[segment % 2], "d_after_ptr": d_states[1 - segment % 2]}
        launch(STATES, (rows * heads,), arguments, constants)
        launch(READS, (rows * heads, steps), arguments, constants)
        launch(READS_BACKWARD, (rows * heads, steps), arguments, constants)
        launch(CARRY, (rows * heads,), arguments, constants)
    return d_states[0]
