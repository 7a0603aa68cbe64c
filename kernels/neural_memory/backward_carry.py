"""The part of neural memory's backward that must wait: the gradients of the state, carried from later steps to earlier.

One program per memory walks a segment's steps in reverse order, each in the passes of ``backward_passes.py``.
"""

import triton
import triton.language as tl

from .backward_passes import error_down, first_update, keys_down, last_update, second_order
from .logs import clear_shifts, log_through, settle_logs_backward, shifts_of
from .orthogonal import APART, turn_all_backward
from .retentions import FACTORS, after_segment, factors_backward, scales_of, settle_backward
from .tiles import anchor_of, copy, fold, found_anew, segment_steps, sequence, step_offsets, workspace


@triton.jit
def unsettle(j, segment, program, weights, start_ptr, states_ptr, settled_ptr, d_before_ptr, zero, D: tl.constexpr,
             F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr, LAYERS: tl.constexpr,
             COPIES: tl.constexpr, STATE: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """Back through the end of the chunk that step j completes; ``weights``: where W after it begins."""
    SIZE: tl.constexpr = D * F
    PAIR: tl.constexpr = COPIES * SIZE
    STEPS: tl.constexpr = EVERY * CHUNK // C
    states = states_ptr + (program - segment) * STEPS * (LAYERS * PAIR)
    u1, u2, u3 = anchor_of(
        states, start_ptr + program * (LAYERS * (PAIR + SIZE)), j * C, CHUNK, C, SIZE, LAYERS, COPIES, STATE
    )
    scales = scales_of(settled_ptr, program, j * C // CHUNK - segment * EVERY, LAYERS, PAIR, EVERY, D, F)
    grads = d_before_ptr + program * (LAYERS * (PAIR + SIZE))
    last = grads + (LAYERS - 1) * (PAIR + SIZE)
    settle_backward(u2, weights + (LAYERS - 1) * PAIR, scales, last, last + PAIR, zero, F, D, BF, D)
    if LAYERS > 1:
        settle_backward(u1, weights, scales + D, grads, grads + PAIR, zero, D, F, D, BF)
    if LAYERS == 3:
        above = grads + PAIR + SIZE
        settle_backward(u3, weights + PAIR, scales + D + F, above, above + PAIR, zero, D, F, D, BF)


@triton.jit
def unsettle_logs(j, segment, program, length, place, states_ptr, settled_ptr, d_before_ptr, zero, D: tl.constexpr,
                  F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr, LAYERS: tl.constexpr,
                  COPIES: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """The same of kl."""
    SIZE: tl.constexpr = D * F
    PAIR: tl.constexpr = COPIES * SIZE
    STEPS: tl.constexpr = EVERY * CHUNK // C
    _, after = segment_steps(segment, length, place, CHUNK, C, EVERY)
    own = states_ptr + ((program - segment) * STEPS + j + 1) * (LAYERS * PAIR)
    dual = tl.where(j == after - 1, log_through(settled_ptr, program, LAYERS, PAIR, D, F), own)
    grads = d_before_ptr + program * (LAYERS * (PAIR + SIZE))
    settle_logs_backward(dual + (LAYERS - 1) * PAIR, grads + (LAYERS - 1) * (PAIR + SIZE), zero, F, D, BF, D)
    if LAYERS > 1:
        settle_logs_backward(dual, grads, zero, D, F, D, BF)
    if LAYERS == 3:
        settle_logs_backward(dual + PAIR, grads + PAIR + SIZE, zero, D, F, D, BF)


@triton.jit
def step_end(j, segment, T, zero, start_ptr, position_ptr, cu_ptr, states_ptr, settled_ptr, turned_ptr, d_before_ptr,
             zero_ptr, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr,
             EVERY: tl.constexpr, LAYERS: tl.constexpr, COPIES: tl.constexpr, SETTLE: tl.constexpr, TURN: tl.constexpr,
             STATE: tl.constexpr, PACKED: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """Back through what followed the last token of step j: the end of a chunk, before it muon's of a step."""
    SIZE: tl.constexpr = D * F
    PAIR: tl.constexpr = COPIES * SIZE
    STEPS: tl.constexpr = EVERY * CHUNK // C
    program, _, _, _, length, place = found_anew(zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE)
    _, after = segment_steps(segment, length, place, CHUNK, C, EVERY)
    through = after_segment(settled_ptr, turned_ptr, program, LAYERS, PAIR, EVERY, D, F, SETTLE, TURN)
    states = states_ptr + (program - segment) * STEPS * (LAYERS * PAIR)
    now = tl.where(j == after - 1, through, states + (j + 1) * (LAYERS * PAIR))
    upto = (j + 1) * C
    complete = upto <= place + length
    if SETTLE[0] == "norm":
        ended = (upto % CHUNK == 0) & complete
        if ended:
            unsettle(
                j, segment, program, now, start_ptr, states_ptr, settled_ptr, d_before_ptr, zero, D, F, CHUNK, C, EVERY,
                LAYERS, COPIES, STATE, BF,
            )  # fmt: skip
            tl.debug_barrier()
    if TURN[0] != "none":
        grads = d_before_ptr + program * (LAYERS * (PAIR + SIZE))
        if (upto % TURN[1] == 0) & complete:
            turn_all_backward(now, grads, turned_ptr, program, zero, D, F, LAYERS, TURN)


@triton.jit
def carry_step(j, segment, T, zero, q_ptr, k_ptr, threshold_ptr, vectors_ptr, ends_ptr, norm_ptr, start_ptr,
               position_ptr, cu_ptr, states_ptr, settled_ptr, turned_ptr, d_k_ptr, d_v_ptr, d_threshold_ptr,
               d_vectors_ptr, d_ends_ptr, d_norm_ptr, d_before_ptr, small_ptr, wide_ptr, zero_ptr, H: tl.constexpr,
               D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr,
               LAYERS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
               SETTLE: tl.constexpr, MOMENTUM: tl.constexpr, TURN: tl.constexpr, STATE: tl.constexpr,
               PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, BF: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    """One step: its passes, one after the other."""
    SIZE: tl.constexpr = D * F
    COPIES: tl.constexpr = 2 if MOMENTUM else 1
    PAIR: tl.constexpr = COPIES * SIZE
    WHOLE: tl.constexpr = PAIR + SIZE
    STEPS: tl.constexpr = EVERY * CHUNK // C
    HOLDS: tl.constexpr = C < CHUNK or SETTLE[0] == "norm"
    RULE: tl.constexpr = APART if TURN[0] != "none" else MOMENTUM
    PARTS: tl.constexpr = RULE == APART and (D > 64 or (D > 32 and ROWS < C))
    kept = None
    shifts = (None, None, None)
    if SETTLE[0] == "norm" or TURN[0] != "none":
        step_end(
            j, segment, T, zero, start_ptr, position_ptr, cu_ptr, states_ptr, settled_ptr, turned_ptr, d_before_ptr,
            zero_ptr, H, D, F, CHUNK, C, EVERY, LAYERS, COPIES, SETTLE, TURN, STATE, PACKED, BF,
        )  # fmt: skip
        tl.debug_barrier()
    if SETTLE[0] == "kl":
        program, h, slot, begin, length, place = found_anew(zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE)
        if ((j + 1) * C % CHUNK == 0) & ((j + 1) * C <= place + length):
            unsettle_logs(
                j, segment, program, length, place, states_ptr, settled_ptr, d_before_ptr, zero, D, F, CHUNK, C, EVERY,
                LAYERS, COPIES, BF,
            )  # fmt: skip
            tl.debug_barrier()
    for part in tl.static_range(3):
        program, h, slot, begin, length, place = found_anew(zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE)
        tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
        at = program * STEPS + j - segment * STEPS
        small, wide = workspace(small_ptr, wide_ptr, at, C, D, F, LAYERS)
        last_update(
            q_ptr, k_ptr, tok, valid, states_ptr + at * (LAYERS * PAIR) + (LAYERS - 1) * PAIR,
            d_before_ptr + program * (LAYERS * WHOLE) + (LAYERS - 1) * WHOLE, vectors_ptr + slot * (4 * C),
            ends_ptr + slot * 4, d_vectors_ptr + slot * (4 * C), d_ends_ptr + slot * 4, small, wide, zero, D, F, C, BF,
            LAYERS, RULE, PARTS, part == 0, part == 1, part == 2, DT, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
    if LAYERS > 1:
        # Of W1, and where there is one of W3, which follows it.
        for part in tl.static_range(3 * (LAYERS - 1)):
            program, h, slot, begin, length, place = found_anew(
                zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE
            )
            tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
            at = program * STEPS + j - segment * STEPS
            small, wide = workspace(small_ptr, wide_ptr, at, C, D, F, LAYERS)
            first_update(
                q_ptr, k_ptr, tok, valid, states_ptr + at * (LAYERS * PAIR) + part // 3 * PAIR,
                d_before_ptr + program * (LAYERS * WHOLE) + part // 3 * WHOLE, vectors_ptr + slot * (4 * C),
                ends_ptr + slot * 4, d_vectors_ptr + slot * (4 * C), d_ends_ptr + slot * 4, small, wide, zero, D, F, C,
                BF, part // 3 == 1, RULE, PARTS, part % 3 == 0, part % 3 == 1, part % 3 == 2, DT, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
        program, h, slot, begin, length, place = found_anew(zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE)
        small, wide = workspace(small_ptr, wide_ptr, program * STEPS + j - segment * STEPS, C, D, F, LAYERS)
        anchor = anchor_of(
            states_ptr + (program - segment) * STEPS * (LAYERS * PAIR), start_ptr + program * (LAYERS * WHOLE),
            j * C, CHUNK, C, SIZE, LAYERS, COPIES, STATE,
        )  # fmt: skip
        if SETTLE[0] == "lq":
            kept = settled_ptr + (program * STEPS + j - segment * STEPS) * FACTORS
        if SETTLE[0] == "kl":
            shifts = shifts_of(settled_ptr, program, j * C, CHUNK, LAYERS, PAIR, D, F, STATE)
        second_order(anchor[1], shifts[1], kept, small, wide, zero, D, F, C, BF, LAYERS, DT, PRECISION)
        tl.debug_barrier()
    program, h, slot, begin, length, place = found_anew(zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE)
    small, wide = workspace(small_ptr, wide_ptr, program * STEPS + j - segment * STEPS, C, D, F, LAYERS)
    if SETTLE[0] == "lq":
        kept = settled_ptr + (program * STEPS + j - segment * STEPS) * FACTORS
    error_down(
        d_v_ptr, threshold_ptr, d_threshold_ptr, j, begin, length, place, h, norm_ptr, d_norm_ptr + slot * (2 * D) + D,
        kept, small, wide, H, D, F, C, NORM, RESIDUAL, BIAS, DT,
    )  # fmt: skip
    tl.debug_barrier()
    program, h, slot, begin, length, place = found_anew(zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE)
    tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
    small, wide = workspace(small_ptr, wide_ptr, program * STEPS + j - segment * STEPS, C, D, F, LAYERS)
    anchor = anchor_of(
        states_ptr + (program - segment) * STEPS * (LAYERS * PAIR), start_ptr + program * (LAYERS * WHOLE), j * C,
        CHUNK, C, SIZE, LAYERS, COPIES, STATE,
    )  # fmt: skip
    opens = ((j * C) % CHUNK == 0) & ((j > 0) | (not STATE))
    # Where a step is a whole chunk, the anchor is the weights it begins with.
    g1 = d_before_ptr + program * (LAYERS * WHOLE) + tl.where(opens & (C == CHUNK), 0, PAIR)
    grads = g1, g1 + (LAYERS - 1) * WHOLE, g1 + WHOLE
    if SETTLE[0] == "lq":
        kept = settled_ptr + (program * STEPS + j - segment * STEPS) * FACTORS
    if SETTLE[0] == "kl":
        shifts = shifts_of(settled_ptr, program, j * C, CHUNK, LAYERS, PAIR, D, F, STATE)
    if SETTLE[0] == "kl" or (RULE == APART and LAYERS > 1):
        # With what reads give by O, and in muon's kernel, Ampere has no registers for 64 tokens at once.
        OWN: tl.constexpr = C if C < ROWS else ROWS
        for part in tl.range(0, C // OWN + zero, disable_licm=True):
            of_part, there = step_offsets(j * (C // OWN) + part, begin, length, place, h, H, D, OWN)
            keys_down(
                q_ptr, k_ptr, d_k_ptr, of_part, there, part * OWN, anchor, shifts, grads, kept, small, wide, zero, D, F,
                C, OWN, BF, LAYERS, NORM or BIAS[0] != "dot", DT, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
    else:
        keys_down(
            q_ptr, k_ptr, d_k_ptr, tok, valid, 0, anchor, shifts, grads, kept, small, wide, zero, D, F, C, C, BF,
            LAYERS, NORM or BIAS[0] != "dot", DT, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
    if SETTLE[0] == "lq":
        factors_backward(kept, anchor, grads, zero, SIZE, LAYERS, SETTLE[1])
        tl.debug_barrier()
    program, h, slot, begin, length, place = found_anew(zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE)
    opens = ((j * C) % CHUNK == 0) & ((j > 0) | (not STATE))
    if opens & (HOLDS | (j * C + CHUNK > place + length)):
        # Here the weights became an anchor that later steps, or the next call, held beside them.
        for layer in tl.static_range(LAYERS):
            running = d_before_ptr + program * (LAYERS * WHOLE) + layer * WHOLE
            fold(running, running + PAIR, zero, SIZE)
        tl.debug_barrier()


@triton.jit
def begin_carry(segment, T, position_ptr, cu_ptr, end_ptr, d_before_ptr, d_after_ptr, zero, H: tl.constexpr,
                D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr,
                LAYERS: tl.constexpr, COPIES: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """The gradients of the state after the segment, to where they are carried on."""
    n = tl.program_id(0) // H
    SIZE: tl.constexpr = D * F
    PAIR: tl.constexpr = COPIES * SIZE
    WHOLE: tl.constexpr = PAIR + SIZE
    _, length, place = sequence(n, cu_ptr, position_ptr, T, PACKED, STATE)
    first, after = segment_steps(segment, length, place, CHUNK, C, EVERY)
    own = tl.program_id(0).to(tl.int64) * (LAYERS * WHOLE)
    filled = place + length
    d_state1 = d_before_ptr + own
    if (first < after) | ((segment == 0) & (length == 0)):
        ends_here = (length == 0) | (after * C >= filled)
        if ends_here:
            copy(d_state1, end_ptr + own, zero, LAYERS * WHOLE)
        else:
            copy(d_state1, d_after_ptr + own, zero, LAYERS * WHOLE)
        tl.debug_barrier()
        if ends_here & (filled % CHUNK == 0) & ((length > 0) | (not STATE)):
            # The anchor after the call is its weights.
            for layer in tl.static_range(LAYERS):
                fold(d_state1 + layer * WHOLE, d_state1 + layer * WHOLE + PAIR, zero, SIZE)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "segment", "zero"])
def neural_memory_carry(
    q_ptr, k_ptr, threshold_ptr, write_ptr, vectors_ptr, ends_ptr, norm_ptr, start_ptr, position_ptr, cu_ptr, end_ptr,
    states_ptr, settled_ptr, turned_ptr, d_k_ptr, d_v_ptr, d_threshold_ptr, d_vectors_ptr, d_ends_ptr, d_norm_ptr,
    d_before_ptr, d_after_ptr, small_ptr, wide_ptr, zero_ptr, T, segment, zero, H: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr, LAYERS: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SETTLE: tl.constexpr, MOMENTUM: tl.constexpr,
    TURN: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    BF: tl.constexpr, ROWS: tl.constexpr = 32,
):  # fmt: skip
    """The steps of a segment, last to first. ``end``: gradients of the state after the call, with which a sequence's
    last segment begins; ``d_after``: those after any other; ``d_before``: those before the segment, and the running
    ones in between; [N, H, ·] with W, S and the anchor of each layer. Segment 0 of a sequence without tokens hands
    ``end`` through."""
    if SETTLE[0] == "kl" and STATE:
        clear_shifts(settled_ptr, segment, LAYERS, (2 if MOMENTUM else 1) * D * F, D, F)
    begin_carry(
        segment, T, position_ptr, cu_ptr, end_ptr, d_before_ptr, d_after_ptr, zero, H, D, F, CHUNK, C, EVERY,
        LAYERS, 2 if MOMENTUM else 1, STATE, PACKED,
    )  # fmt: skip
    for back in tl.range(0, EVERY * CHUNK // C, disable_licm=True):
        _, _, _, _, length, place = found_anew(zero_ptr, cu_ptr, position_ptr, T, 0, H, C, PACKED, STATE)
        first, after = segment_steps(segment, length, place, CHUNK, C, EVERY)
        j = after - 1 - back
        if j >= first:
            carry_step(
                j, segment, T, zero, q_ptr, k_ptr, threshold_ptr, vectors_ptr, ends_ptr, norm_ptr, start_ptr,
                position_ptr, cu_ptr, states_ptr, settled_ptr, turned_ptr, d_k_ptr, d_v_ptr, d_threshold_ptr,
                d_vectors_ptr, d_ends_ptr, d_norm_ptr, d_before_ptr, small_ptr, wide_ptr, zero_ptr, H, D, F, CHUNK, C,
                EVERY, LAYERS, NORM, RESIDUAL, BIAS, SETTLE, MOMENTUM, TURN, STATE, PACKED, DT, PRECISION,
                BF, ROWS,
            )  # fmt: skip
