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
from .backward_step import replay, step_backward
from .canary import backward_pairs
from .forward import constants_of, pack, unpack
from .gate_kernels import run_gates, run_gates_backward
from .spec import MemorySpec
from .tiles import begin_state, copy, fold, sequence, step_slot


@triton.jit(do_not_specialize=["T"])
def neural_memory_backward(
    q_ptr, k_ptr, v_ptr, d_o_ptr, write_ptr, vectors_ptr, ends_ptr, norm_ptr, start_ptr, position_ptr, cu_ptr,
    kept_ptr, end_ptr, d_q_ptr, d_k_ptr, d_v_ptr, d_write_ptr, d_vectors_ptr, d_ends_ptr, d_norm_ptr, d_state_ptr,
    states_ptr, small_ptr, wide_ptr, T, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr,
    C: tl.constexpr, EVERY: tl.constexpr, DEEP: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    DOT: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """``end``: gradients of the state after the call; ``d_state``: those of the state before it, and the running ones
    in between; ``states``: W and S of a segment's steps; ``small``, ``wide``: a step's tiles in DT and float32. The
    rest as in ``forward.py``."""
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    SIZE: tl.constexpr = D * F
    LAYERS: tl.constexpr = 2 if DEEP else 1
    COPIES: tl.constexpr = 2 if MOMENTUM else 1
    PAIR: tl.constexpr = COPIES * SIZE
    WHOLE: tl.constexpr = (COPIES + 1) * SIZE
    STEPS: tl.constexpr = EVERY * CHUNK // C
    begin, length, place = sequence(n, cu_ptr, position_ptr, T, PACKED, STATE)
    program = (n * H + h).to(tl.int64)
    own = program * (LAYERS * WHOLE)
    small = small_ptr + program * (3 * C * D + C * F)
    wide = wide_ptr + program * (2 * C * C + 4 * C * D + 3 * C * F + C)
    copy(d_state_ptr + own, end_ptr + own, LAYERS * WHOLE)
    d_norm = d_norm_ptr + program * D
    if NORM:
        tl.store(d_norm + tl.arange(0, D), tl.zeros([D], tl.float32))
    tl.debug_barrier()
    filled = place + length
    if (filled % CHUNK == 0) & ((length > 0) | (not STATE)):  # the anchor after the call is its weights
        for layer in tl.static_range(LAYERS):
            fold(d_state_ptr + own + layer * WHOLE, d_state_ptr + own + layer * WHOLE + PAIR, SIZE)
        tl.debug_barrier()
    slots = (begin // (CHUNK * EVERY) + n).to(tl.int64)
    last_step = tl.where(length > 0, tl.cdiv(filled, C), 0)
    segments = tl.cdiv(last_step, STEPS)
    for segment_back in tl.range(0, segments, disable_licm=True):
        segment = segments - 1 - segment_back
        first = tl.maximum(segment * STEPS, place // C)
        after = tl.minimum(segment * STEPS + STEPS, last_step)
        # Step j of the segment begins with the workspace's state j - segment * STEPS.
        states = states_ptr + (program * STEPS - segment * STEPS) * (LAYERS * PAIR)
        if segment == 0:
            begin_state(states + first * (LAYERS * PAIR), start_ptr, n, h, H, SIZE, LAYERS, COPIES, COPIES, STATE)
        else:
            kept = kept_ptr + ((slots + segment - 1) * H + h) * (LAYERS * PAIR)
            copy(states + first * (LAYERS * PAIR), kept, LAYERS * PAIR)
        tl.debug_barrier()
        for visit in tl.range(first, 2 * after - first - 1, disable_licm=True):
            # Forward to where the last step begins, then backward: one loop, so that what both need is compiled once.
            forth = visit < after - 1
            j = tl.where(forth, visit, 2 * after - visit - 2)
            base = j * C
            state1 = states + j * (LAYERS * PAIR)
            state2 = state1 + (LAYERS - 1) * PAIR
            # The anchor: the weights at the chunk's first step, or those of the state before the call.
            u1 = states + (base // CHUNK) * (CHUNK // C) * (LAYERS * PAIR)
            u2 = u1 + (LAYERS - 1) * PAIR
            opens = base % CHUNK == 0
            if STATE:
                given = base < CHUNK
                u1 = tl.where(given, start_ptr + own + PAIR, u1)
                u2 = tl.where(given, start_ptr + own + (LAYERS - 1) * WHOLE + PAIR, u2)
                opens = opens & (base > 0)
            slot = step_slot(j, n, begin, place, C) * H + h
            vectors = vectors_ptr + slot * (4 * C)
            ends = ends_ptr + slot * 4
            write = write_ptr + slot * (C * C)
            if forth:
                replay(
                    q_ptr, k_ptr, v_ptr, j, begin, length, place, h, u1, u2, state1, state2, state1 + LAYERS * PAIR,
                    state2 + LAYERS * PAIR, write, vectors, ends, norm_ptr, H, D, F, C, BF, DEEP, NORM, RESIDUAL, DOT,
                    MOMENTUM, DT, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
            else:
                d_state1 = d_state_ptr + own
                d_state2 = d_state1 + (LAYERS - 1) * WHOLE
                step_backward(
                    q_ptr, k_ptr, v_ptr, d_o_ptr, d_q_ptr, d_k_ptr, d_v_ptr, j, begin, length, place, h, u1, u2,
                    state1, state2, d_state1, d_state2, write, d_write_ptr + slot * (C * C), vectors, ends,
                    d_vectors_ptr + slot * (4 * C), d_ends_ptr + slot * 4, norm_ptr, d_norm, small, wide,
                    opens & (C == CHUNK), H, D, F, C, BF, DEEP, NORM, RESIDUAL, DOT, MOMENTUM, DT, PRECISION,
                )  # fmt: skip
                if opens & ((C < CHUNK) | (base + CHUNK > filled)):
                    # Here the weights became an anchor that later steps, or the next call, held beside them.
                    for layer in tl.static_range(LAYERS):
                        fold(d_state1 + layer * WHOLE, d_state1 + layer * WHOLE + PAIR, SIZE)
                    tl.debug_barrier()


def backward_configs(constants: Mapping[str, Any]) -> list[Config]:
    """The narrowest blocks of hidden units, which spill least; eight warps hold the most registers."""
    return [Config((("BF", 16),), 8, 1)]


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
    size = sum(w[0].numel() for w in weights)
    d_state = step.new_empty((rows, heads, parts * size))
    steps = constants["EVERY"] * constants["CHUNK"] // c
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "d_o_ptr": grad_o.contiguous(),
        **dict(zip(("write_ptr", "vectors_ptr", "ends_ptr"), of_steps, strict=True)),
        "norm_ptr": step if norm is None else norm.contiguous(),
        "start_ptr": pack(state or weights, spec.layers),
        "position_ptr": step if position is None else position,
        "cu_ptr": step if cu_seqlens is None else cu_seqlens,
        "kept_ptr": kept[0],
        "end_ptr": pack(grad_state, spec.layers),
        **dict(zip(("d_q_ptr", "d_k_ptr", "d_v_ptr"), d_tokens, strict=True)),
        **dict(zip(("d_write_ptr", "d_vectors_ptr", "d_ends_ptr"), d_of_steps, strict=True)),
        "d_norm_ptr": step if d_norm is None else d_norm,
        "d_state_ptr": d_state,
        "states_ptr": step.new_empty((programs, steps, (parts - 1) * size)),
        "small_ptr": q.new_empty((programs, 3 * c * d + c * f)),
        "wide_ptr": step.new_empty((programs, 2 * c * c + 4 * c * d + 3 * c * f + c)),
        "T": q.shape[1],
    }
    own = {name: value for name, value in constants.items() if name in BACKWARD.function.arg_names}
    BACKWARD(lambda x: (programs,), arguments, own)
    d_gates = run_gates_backward(d_of_steps, *gates)
    found = unpack(d_state, weights) if state else unpack(d_state.sum(0), weights)[: len(weights)]
    if not state:
        found = [x.to(w.dtype) for x, w in zip(found, weights, strict=True)]
    return [*d_tokens, *d_gates, None if d_norm is None or norm is None else d_norm.sum(0).to(norm.dtype), *found]
