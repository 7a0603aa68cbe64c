"""The Triton backward of neural memory: one program per memory, which walks segments of its steps in reverse order.

A segment begins where the forward kept [W; S]. Its states are replayed into a workspace, one per step; then its steps
are taken from the last to the first (``backward_step.py``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel
from .backward_step import step_backward
from .canary import backward_pairs
from .forward import by_layer, constants_of, inner_pass, named, outer_pass
from .gate_kernels import run_gates, run_gates_backward
from .spec import MemorySpec
from .tiles import clear, copy, fold, load_gates, sequence, step_slot, step_tokens


@triton.jit
def begin_segment(states, start, kept, from_start, COUNT: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr):
    """[W; S] of one layer where a segment begins, to the workspace: the call's own beginning, or what was kept."""
    start_w, start_s = start
    if from_start:
        copy(states, start_w, COUNT)
        if MOMENTUM:
            if STATE:
                copy(states + COUNT, start_s, COUNT)
            else:
                clear(states + COUNT, COUNT)
    else:
        copy(states, kept, COUNT)
        if MOMENTUM:
            copy(states + COUNT, kept + COUNT, COUNT)


@triton.jit(do_not_specialize=["T"])
def neural_memory_backward(
    q_ptr, k_ptr, v_ptr, d_o_ptr, write_ptr, vectors_ptr, ends_ptr, norm_ptr, start_w1, start_s1, start_u1, start_w2,
    start_s2, start_u2, position_ptr, cu_ptr, kept1_ptr, kept2_ptr, end_w1, end_s1, end_u1, end_w2, end_s2, end_u2,
    d_q_ptr, d_k_ptr, d_v_ptr, d_write_ptr, d_vectors_ptr, d_ends_ptr, d_norm_ptr, g_w1_ptr, g_s1_ptr, g_u1_ptr,
    g_w2_ptr, g_s2_ptr, g_u2_ptr, states1_ptr, states2_ptr, small_ptr, wide_ptr, T, zero, H: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr, DEEP: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr,
    PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """``end_*``: gradients of the state after the call; ``g_*``: those of the state before it, and the running ones in
    between; ``states*``: [W; S] of a segment's steps; ``small``, ``wide``: a step's tiles in DT and float32."""
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    SIZE: tl.constexpr = D * F
    COPIES: tl.constexpr = 2 if MOMENTUM else 1
    STEPS: tl.constexpr = EVERY * CHUNK // C
    begin, length, place = sequence(n, cu_ptr, position_ptr, T, PACKED, STATE)
    program = (n * H + h).to(tl.int64)
    own = program * SIZE
    origin = own if STATE else h * SIZE
    small = small_ptr + program * (3 * C * D + C * F)
    wide = wide_ptr + program * (2 * C * C + 2 * C * D + C * F)
    copy(g_w2_ptr + own, end_w2 + own, SIZE)
    copy(g_u2_ptr + own, end_u2 + own, SIZE)
    if MOMENTUM:
        copy(g_s2_ptr + own, end_s2 + own, SIZE)
    if DEEP:
        copy(g_w1_ptr + own, end_w1 + own, SIZE)
        copy(g_u1_ptr + own, end_u1 + own, SIZE)
        if MOMENTUM:
            copy(g_s1_ptr + own, end_s1 + own, SIZE)
    tl.debug_barrier()
    filled = place + length
    if (filled % CHUNK == 0) & ((length > 0) | (not STATE)):  # the anchor after the call is its weights
        fold(g_w2_ptr + own, g_u2_ptr + own, SIZE)
        if DEEP:
            fold(g_w1_ptr + own, g_u1_ptr + own, SIZE)
        tl.debug_barrier()
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    scale = tl.zeros([D], tl.float32)
    if NORM:
        scale = tl.load(norm_ptr + h * D + d).to(tl.float32)
    d_scale = tl.zeros([D], tl.float32)
    slots = (begin // (CHUNK * EVERY) + n).to(tl.int64)
    last_step = tl.where(length > 0, tl.cdiv(filled, C), 0)
    segments = tl.cdiv(last_step, STEPS)
    for segment_back in range(0, segments):
        segment = segments - 1 - segment_back
        first = tl.maximum(segment * STEPS, place // C)
        after = tl.minimum(segment * STEPS + STEPS, last_step)
        # Step j of the segment begins with the workspace's state j - segment * STEPS.
        states1 = states1_ptr + (program * STEPS - segment * STEPS) * (COPIES * SIZE)
        states2 = states2_ptr + (program * STEPS - segment * STEPS) * (COPIES * SIZE)
        kept = (tl.maximum(slots + segment - 1, 0) * H + h) * (COPIES * SIZE)
        opened = first * (COPIES * SIZE)
        begin_segment(states2 + opened, (start_w2 + origin, start_s2 + origin), kept2_ptr + kept, segment == 0, SIZE,
                      MOMENTUM, STATE)  # fmt: skip
        if DEEP:
            begin_segment(states1 + opened, (start_w1 + origin, start_s1 + origin), kept1_ptr + kept, segment == 0,
                          SIZE, MOMENTUM, STATE)  # fmt: skip
        tl.debug_barrier()
        for replayed in range(first, 2 * after - first - 1):
            # Forward to the last step's beginning, then backward: one loop, so that what both need is compiled once.
            forth = replayed < after - 1
            j = tl.where(forth, replayed, 2 * after - replayed - 2)
            base = j * C
            still = replayed * 16 * zero
            state1 = states1 + still + j * (COPIES * SIZE)
            state2 = states2 + still + j * (COPIES * SIZE)
            old = state1, state1 + SIZE, state2, state2 + SIZE
            # The anchor: the weights at the chunk's first step, or those of the state before the call.
            opener = (base // CHUNK) * (CHUNK // C) * (COPIES * SIZE)
            u1 = states1 + still + opener
            u2 = states2 + still + opener
            opens = base % CHUNK == 0
            if STATE:
                given = base < CHUNK
                u1 = tl.where(given, start_u1 + own, u1)
                u2 = tl.where(given, start_u2 + own, u2)
                opens = opens & (base > 0)
            anchor = u1, u2
            token, valid = step_tokens(j, begin, length, place, C)
            tok = (token * H + h) * D
            slot = step_slot(j, n, begin, place, C) * H + h
            gates = load_gates(vectors_ptr, ends_ptr, slot, C)
            write = write_ptr + slot * (C * C)
            if forth:
                _, _, _, delta = inner_pass(
                    k_ptr, v_ptr, tok, valid, anchor, scale, D, F, C, BF, DEEP, NORM, RESIDUAL, DOT, DT, PRECISION
                )
                new1 = state1 + COPIES * SIZE
                new2 = state2 + COPIES * SIZE
                new = new1, new1 + SIZE, new2, new2 + SIZE
                outer_pass(
                    q_ptr, k_ptr, tok, valid, delta, anchor, old, new, new, write + i[:, None] * C + i[None, :], gates,
                    small, D, F, C, BF, DEEP, MOMENTUM, False, True, False, DT, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
            else:
                g_w1, g_s1, g_u1 = g_w1_ptr + still + own, g_s1_ptr + still + own, g_u1_ptr + still + own
                g_w2, g_s2, g_u2 = g_w2_ptr + still + own, g_s2_ptr + still + own, g_u2_ptr + still + own
                whole = opens & (C == CHUNK)
                grads = g_w1, g_s1, g_u1, g_w2, g_s2, g_u2
                more, of_gates = step_backward(
                    (q_ptr, k_ptr, v_ptr, d_o_ptr), (d_q_ptr, d_k_ptr, d_v_ptr), tok, valid, anchor, old, grads, write,
                    d_write_ptr + slot * (C * C), gates, scale, small, wide, whole, D, F, C, BF, DEEP, NORM, RESIDUAL,
                    DOT, MOMENTUM, DT, PRECISION,
                )  # fmt: skip
                d_scale += more
                d_retain, d_carry, d_end_write, d_end_momentum, d_end_retain, d_end_carry, d_end_inertia = of_gates
                vectors = d_vectors_ptr + slot * (4 * C) + i
                tl.store(vectors, d_retain)
                tl.store(vectors + C, d_carry)
                tl.store(vectors + 2 * C, d_end_write)
                tl.store(vectors + 3 * C, d_end_momentum)
                tl.store(d_ends_ptr + slot * 4, d_end_retain)
                tl.store(d_ends_ptr + slot * 4 + 1, d_end_carry)
                tl.store(d_ends_ptr + slot * 4 + 2, d_end_inertia)
                if opens & ((C < CHUNK) | (base + CHUNK > filled)):
                    # Here the weights became an anchor that later steps, or the next call, held beside them.
                    fold(g_w2, g_u2, SIZE)
                    if DEEP:
                        fold(g_w1, g_u1, SIZE)
                    tl.debug_barrier()
    if NORM:
        tl.store(d_norm_ptr + program * D + d, d_scale)


def backward_configs(constants: Mapping[str, Any]) -> list[Config]:
    """Blocks of hidden units, and warps."""
    blocks = [b for b in (64, 32, 16) if b <= constants["F"]]
    return [Config((("BF", b),), warps, 1) for b in blocks for warps in (8, 4)]


BACKWARD = Kernel(neural_memory_backward, backward_configs, backward_pairs)


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
) -> list[Tensor | None]:
    """What the backward operator returns: gradients of q, k, v, the gates and norm (None where those are), then of the
    state or, without one, of the weights."""
    q, k, v, step, log_retain, log_momentum = (None if x is None else x.contiguous() for x in tokens)
    assert q is not None and k is not None and v is not None and step is not None
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    constants = constants_of(q, weights, bool(state), cu_seqlens is not None, True, spec)
    heads, d, f, c = (constants[name] for name in "HDFC")
    programs, parts = rows * heads, 3 if spec.has_momentum else 2
    gates = step, log_retain, log_momentum, position, cu_seqlens, rows, constants
    of_steps = run_gates(*gates, q.dtype)
    d_of_steps = [torch.empty_like(x) for x in of_steps]
    d_tokens = [torch.empty_like(x) for x in (q, k, v)]
    d_norm = None if norm is None else norm.new_empty((rows, heads, d), dtype=torch.float32)
    given = [w.new_empty((rows, *w.shape), dtype=torch.float32) for w in list(weights) * parts]
    steps = constants["EVERY"] * constants["CHUNK"] // c
    states = [
        q.new_empty((programs, steps, (parts - 1) * w.shape[1] * w.shape[2]), dtype=torch.float32) for w in weights
    ]
    start = [x.contiguous() for x in (state or [*weights, *([weights[0]] * (len(weights) * (parts - 1)))])]
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "d_o_ptr": grad_o.contiguous(),
        **dict(zip(("write_ptr", "vectors_ptr", "ends_ptr"), of_steps, strict=True)),
        "norm_ptr": step if norm is None else norm.contiguous(),
        **named("start_", "", by_layer(start, spec.layers, step)),
        "position_ptr": step if position is None else position,
        "cu_ptr": step if cu_seqlens is None else cu_seqlens,
        "kept1_ptr": kept[0],
        "kept2_ptr": kept[-1],
        **named("end_", "", by_layer([x.contiguous() for x in grad_state], spec.layers, step)),
        **dict(zip(("d_q_ptr", "d_k_ptr", "d_v_ptr"), d_tokens, strict=True)),
        **dict(zip(("d_write_ptr", "d_vectors_ptr", "d_ends_ptr"), d_of_steps, strict=True)),
        "d_norm_ptr": step if d_norm is None else d_norm,
        **named("g_", "_ptr", by_layer(given, spec.layers, step)),
        "states1_ptr": states[0],
        "states2_ptr": states[-1],
        "small_ptr": q.new_empty((programs, 3 * c * d + c * f)),
        "wide_ptr": step.new_empty((programs, 2 * c * c + 2 * c * d + c * f)),
        "T": q.shape[1],
        "zero": 0,
    }
    own = {name: value for name, value in constants.items() if name in BACKWARD.function.arg_names}
    BACKWARD(lambda x: (programs,), arguments, own)
    d_gates = run_gates_backward(d_of_steps, *gates)
    found = given if state else [x.sum(0).to(w.dtype) for x, w in zip(given, weights, strict=False)]
    return [*d_tokens, *d_gates, None if d_norm is None or norm is None else d_norm.sum(0).to(norm.dtype), *found]
