"""The states of neural memory, step by step, in Triton: one program per memory (sequence and head) walks a segment.

All else that a step computes needs only the state it begins with and is left to other kernels, which take all steps of
a segment at once: ``reads.py``, and in the backward ``backward_reads.py``. The state passes through a program in blocks
of BF hidden units, twice per step: for the keys' pass at the anchor, up to the error, and for the update.
docs/neural_memory.md has the algebra and what the design costs.

A linear memory is the last layer alone: its hidden vector is the key, or the query, itself (``LAYERS`` 1).
``hidden.py`` says what the hidden units of others are.
"""

import triton
import triton.language as tl

from .biases import error_of, load_thresholds
from .hidden import hidden_backward, hidden_of
from .logs import log_through, settle_logs, shifts_of, weights_at
from .orthogonal import APART, turn_all, work_of
from .parts import block_by_parts, keys_by_parts, update_block, update_by_parts
from .retentions import FACTORS, after_segment, keep_factors, scaled, scales_of, settle
from .tiles import (
    anchor_of,
    begin_state,
    clear,
    copy,
    deltas_of,
    load_gates,
    load_norm,
    normalised,
    product,
    project,
    segment_steps,
    sequence,
    step_offsets,
    step_slot,
    tall,
    token_columns,
    token_rows,
    wide_parts,
    workspace,
)


@triton.jit
def inner_pass(k_ptr, v_ptr, tok, valid, anchor, shifts, factors, scale, thresholds, zero, D: tl.constexpr,
               F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr, NORM: tl.constexpr,
               RESIDUAL: tl.constexpr, BIAS: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """The keys' pass at the anchor: ẑ and 1/std of the last layer, the residual r, and Δ of the last layer. ``shifts``,
    here and below: those of kl, or None each."""
    u1, u2, u3 = anchor
    d = tl.arange(0, D)
    last = tl.zeros([C, D], tl.float32)
    if NORM or BIAS[0] != "dot":
        k = token_rows(k_ptr, tok, valid, d)
        for start in tl.range(0, F + zero, BF, disable_licm=True):
            f = start + tl.arange(0, BF)
            if LAYERS == 3 or (LAYERS > 1 and MOMENTUM == APART):
                before, above = keys_by_parts(
                    k_ptr, tok, valid, anchor, shifts, factors, f, zero, D, F, C, BF, LAYERS, DT, PRECISION
                )
                hidden = hidden_of(before, above, LAYERS)
            elif LAYERS > 1:
                at = d[:, None] * F + f[None, :]
                weight = weights_at(u1 + at, shifts[0], f[None, :], zero)
                before = scaled(product(k, weight, DT, PRECISION), factors[0])
                above = before
                if LAYERS == 3:
                    weight = weights_at(u3 + at, shifts[2], f[None, :], zero)
                    above = scaled(product(k, weight, DT, PRECISION), factors[2])
                hidden = hidden_of(before, above, LAYERS)
            else:
                hidden = token_rows(k_ptr, tok, valid, f)
            weight = weights_at(u2 + f[:, None] * D + d[None, :], shifts[1], d[None, :], zero)
            last += product(hidden, weight, DT, PRECISION)
        last = scaled(last, factors[1])
    residual = -token_rows(v_ptr, tok, valid, d).to(tl.float32)
    normed = last
    rstd = tl.zeros([C], tl.float32)
    if NORM:
        normed, rstd = normalised(last, D)
    if BIAS[0] != "dot":
        if NORM:
            residual += normed * scale[None, :]
        else:
            residual += last
        if RESIDUAL:
            residual += token_rows(k_ptr, tok, valid, d).to(tl.float32)
    delta = error_of(residual, thresholds[:, None], BIAS)
    if NORM:
        delta = project(delta * scale[None, :], normed, D) * rstd[:, None]
    return normed, rstd, residual, delta


@triton.jit
def anchor_block(anchor, shifts, f, d, at1, at2, zero, DT: tl.constexpr,
                 LAYERS: tl.constexpr):  # fmt: skip
    """A block of hidden units f of W1 [D, BF], W2 [BF, D] and W3 [D, BF] at the anchor."""
    first = weights_at(anchor[0] + at1, shifts[0], f[None, :], zero).to(DT)
    last = weights_at(anchor[1] + at2, shifts[1], d[None, :], zero).to(DT)
    above = first
    if LAYERS == 3:
        above = weights_at(anchor[2] + at1, shifts[2], f[None, :], zero).to(DT)
    return first, last, above


@triton.jit
def keys_block(k, kt, delta, block, factors, LAYERS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """Of a block of hidden units at the anchor: the keys' pre-activations, B, Δ of W1 and of W3, and the hidden keys
    transposed, by products of their own instead of a product's transpose."""
    first, last, third = block
    before = scaled(product(k, first, DT, PRECISION), factors[0])
    above = before
    if LAYERS == 3:
        above = scaled(product(k, third, DT, PRECISION), factors[2])
    back = scaled(product(delta, tl.trans(last), DT, PRECISION), factors[1])
    before_t = scaled(product(tl.trans(first), kt, DT, PRECISION), factors[0])
    above_t = before_t
    if LAYERS == 3:
        above_t = scaled(product(tl.trans(third), kt, DT, PRECISION), factors[2])
    hidden_t = hidden_of(before_t, above_t, LAYERS)
    delta1, delta3 = hidden_backward(back, before, above, LAYERS)
    return before, above, back, delta1, delta3, hidden_t


@triton.jit
def update_first(kt, delta, old, new, at, gates, SIZE: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """A block of a matrix that the keys meet first, W1 or W3, and of its S, after the step."""
    _, _, end_write, end_momentum, end_retain, end_carry, end_inertia = gates
    written = product(kt, delta * end_write[:, None], DT, PRECISION)
    inert = written
    if MOMENTUM:
        inert = product(kt, delta * end_momentum[:, None], DT, PRECISION)
    update_block(old, new, at, end_retain, end_carry, end_inertia, written, inert, SIZE, MOMENTUM)


@triton.jit
def update_pass(k_ptr, tok, valid, delta, deltas, anchor, shifts, factors, old, new, gates, zero, D: tl.constexpr,
                F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr, MOMENTUM: tl.constexpr,
                DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The state after the step. ``anchor``, ``old``, ``new``: where W1, W2 and W3 begin; S follows W; ``deltas``: where
    Δ of the last layer lies in DT. With muon of a linear memory alone: see :func:`update_by_parts`."""
    SIZE: tl.constexpr = D * F
    _, _, end_write, end_momentum, end_retain, end_carry, end_inertia = gates
    d = tl.arange(0, D)
    if LAYERS > 1:
        k = token_rows(k_ptr, tok, valid, d)
        kt = token_columns(k_ptr, tok, valid, d)
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at1 = d[:, None] * F + f[None, :]
        at2 = f[:, None] * D + d[None, :]
        if LAYERS > 1:
            if LAYERS == 3:  # too many operands to be held whole
                delta1, delta3, hidden_t = block_by_parts(
                    k_ptr, tok, valid, deltas, anchor, shifts, factors, f, zero, D, F, C, BF, LAYERS, DT, PRECISION
                )[3:]
            else:
                block = anchor_block(anchor, shifts, f, d, at1, at2, zero, DT, LAYERS)
                delta1, delta3, hidden_t = keys_block(k, kt, delta, block, factors, LAYERS, DT, PRECISION)[3:]
            update_first(kt, delta1, old[0], new[0], at1, gates, SIZE, MOMENTUM, DT, PRECISION)
            if LAYERS == 3:
                update_first(kt, delta3, old[2], new[2], at1, gates, SIZE, MOMENTUM, DT, PRECISION)
        else:
            hidden_t = token_columns(k_ptr, tok, valid, f).to(tl.float32)
        written2 = hidden_t
        if MOMENTUM != APART:
            written2 = product(hidden_t * end_write[None, :], delta, DT, PRECISION)
        inert2 = written2
        if MOMENTUM:
            inert2 = product(hidden_t * end_momentum[None, :], delta, DT, PRECISION)
        update_block(old[1], new[1], at2, end_retain, end_carry, end_inertia, written2, inert2, SIZE, MOMENTUM)


@triton.jit
def begin_segment(states, start_ptr, kept_ptr, segment, n, h, slots, zero, H: tl.constexpr, SIZE: tl.constexpr,
                  LAYERS: tl.constexpr, COPIES: tl.constexpr, STATE: tl.constexpr):  # fmt: skip
    """W and S where a segment begins: those of the call, or the kept ones."""
    if segment == 0:
        begin_state(states, start_ptr, n, h, zero, H, SIZE, LAYERS, COPIES, COPIES, STATE)
    else:
        kept = kept_ptr + ((slots + segment - 1) * H + h) * (LAYERS * COPIES * SIZE)
        copy(states, kept, zero, LAYERS * COPIES * SIZE)


@triton.jit(do_not_specialize=["T", "segment", "zero"])
def neural_memory_states(
    k_ptr, v_ptr, threshold_ptr, vectors_ptr, ends_ptr, norm_ptr, start_ptr, position_ptr, cu_ptr, kept_ptr, state_ptr,
    states_ptr, settled_ptr, turned_ptr, small_ptr, wide_ptr, T, segment, zero, H: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr, LAYERS: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SETTLE: tl.constexpr, MOMENTUM: tl.constexpr,
    TURN: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, GRAD: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr = 32,
):  # fmt: skip
    """W and S with which each step of a segment begins, ``states`` [N, H, steps, ·], and Δ of its last layer, in
    ``small``. ``start``: the state before the call, or W_0 of each layer [H, ·]; ``kept``: W and S every EVERY chunks,
    [slots, H, ·], where every segment but the first begins.

    Forward: also W and S after the segment, to ``kept`` or, after a sequence's last, to ``state`` [N, H, ·], which has
    W, S and the anchor of each layer. GRAD: instead what the backward needs of the error, in ``wide``, and of the ends
    of chunks that norm settles, in ``settled``.
    """
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    SIZE: tl.constexpr = D * F
    COPIES: tl.constexpr = 2 if MOMENTUM else 1
    PAIR: tl.constexpr = COPIES * SIZE
    WHOLE: tl.constexpr = PAIR + SIZE
    STEPS: tl.constexpr = EVERY * CHUNK // C
    ENDS: tl.constexpr = SETTLE[0] == "norm" or TURN[0] != "none"
    WALKS: tl.constexpr = (not GRAD) or SETTLE[0] == "kl" or ENDS
    RULE: tl.constexpr = APART if TURN[0] != "none" else MOMENTUM
    # What S is made of must be exact where muon makes its small singular values as large as all others.
    KIND: tl.constexpr = tl.float32 if TURN[0] != "none" else DT
    EXACT: tl.constexpr = TURN[3] if TURN[0] != "none" else PRECISION
    begin, length, place = sequence(n, cu_ptr, position_ptr, T, PACKED, STATE)
    first, after = segment_steps(segment, length, place, CHUNK, C, EVERY)
    filled = place + length
    program = (n * H + h).to(tl.int64)
    slots = (begin // (CHUNK * EVERY) + n).to(tl.int64)
    own = state_ptr + program * (LAYERS * WHOLE)
    given = start_ptr + program * (LAYERS * WHOLE)
    # Step j of the segment begins with the workspace's state j - segment * STEPS.
    states = states_ptr + (program * STEPS - segment * STEPS) * (LAYERS * PAIR)
    if first < after:
        begin_segment(
            states + first * (LAYERS * PAIR), start_ptr, kept_ptr, segment, n, h, slots, zero, H, SIZE, LAYERS, COPIES,
            STATE,
        )  # fmt: skip
        tl.debug_barrier()
    scale = load_norm(norm_ptr, h, D, NORM)
    ends = after * C >= filled
    for j in tl.range(first, after, disable_licm=True):
        old = states + j * (LAYERS * PAIR)
        new1 = old + LAYERS * PAIR
        new2, new3 = new1 + (LAYERS - 1) * PAIR, new1 + PAIR
        if not GRAD:
            through = j == after - 1
            kept = kept_ptr + ((slots + segment) * H + h) * (LAYERS * PAIR)
            new1 = tl.where(through, tl.where(ends, own, kept), new1)
            new2 = tl.where(through, tl.where(ends, own + (LAYERS - 1) * WHOLE, kept + (LAYERS - 1) * PAIR), new2)
            if LAYERS == 3:
                new3 = tl.where(through, tl.where(ends, own + WHOLE, kept + PAIR), new3)
        if GRAD and ENDS:
            through = after_segment(settled_ptr, turned_ptr, program, LAYERS, PAIR, EVERY, D, F, SETTLE, TURN)
            new1 = tl.where(j == after - 1, through, new1)
            new2 = tl.where(j == after - 1, through + (LAYERS - 1) * PAIR, new2)
            if LAYERS == 3:
                new3 = tl.where(j == after - 1, through + PAIR, new3)
        if GRAD and SETTLE[0] == "kl":
            through = log_through(settled_ptr, program, LAYERS, PAIR, D, F)
            new1 = tl.where(j == after - 1, through, new1)
            new2 = tl.where(j == after - 1, through + (LAYERS - 1) * PAIR, new2)
            if LAYERS == 3:
                new3 = tl.where(j == after - 1, through + PAIR, new3)
        anchor = anchor_of(states, given, j * C, CHUNK, C, SIZE, LAYERS, COPIES, STATE)
        at = program * STEPS + j - segment * STEPS
        shifts = (None, None, None)
        if SETTLE[0] == "kl":
            shifts = shifts_of(settled_ptr, program, j * C, CHUNK, LAYERS, PAIR, D, F, STATE)
        factors = (None, None, None)
        if SETTLE[0] == "lq":
            factors = keep_factors(settled_ptr + at * FACTORS, anchor, zero, SIZE, LAYERS, SETTLE[1])
        slot = step_slot(j, n, begin, place, C) * H + h
        gates = load_gates(vectors_ptr + slot * (4 * C), ends_ptr + slot * 4, C)
        tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
        normed, rstd, residual, delta = inner_pass(
            k_ptr, v_ptr, tok, valid, anchor, shifts, factors, scale,
            load_thresholds(threshold_ptr, tok, valid, D, BIAS), zero, D, F, C, BF, LAYERS, NORM, RESIDUAL, BIAS, RULE,
            KIND, EXACT,
        )  # fmt: skip
        deltas = deltas_of(small_ptr, at, C, D, F, LAYERS, GRAD)
        tl.store(tall(deltas, C, D)[0], delta.to(DT))
        if GRAD:
            wide = workspace(small_ptr, wide_ptr, at, C, D, F, LAYERS)[1]
            _, units, residuals, _, _, _, _, rstds = wide_parts(wide, C, D, F)
            tl.store(tall(units, C, D)[0], normed)
            tl.store(tall(residuals, C, D)[0], residual)
            tl.store(rstds + tl.arange(0, C), rstd)
        olds, news = (old, old + (LAYERS - 1) * PAIR, old + PAIR), (new1, new2, new3)
        if RULE == APART and LAYERS > 1:
            # Newton-Schulz's workspace is free until the step has ended, and no smaller than C D.
            exact = work_of(turned_ptr, program, D, F, LAYERS, TURN, GRAD)[1]
            tl.store(tall(exact, C, D)[0], delta)
            tl.debug_barrier()
            update_by_parts(
                k_ptr, j, begin, length, place, h, vectors_ptr + slot * (4 * C) + 3 * C, exact, anchor, factors, olds,
                news, gates, zero, H, D, F, C, ROWS if C > ROWS else C, BF, LAYERS, EXACT,
            )  # fmt: skip
        elif (j < after - 1) | WALKS:
            if LAYERS == 3:
                tl.debug_barrier()
            update_pass(
                k_ptr, tok, valid, delta.to(KIND), deltas, anchor, shifts, factors, olds, news, gates, zero, D, F, C,
                BF, LAYERS, RULE, KIND, EXACT,
            )  # fmt: skip
        tl.debug_barrier()
        if TURN[0] != "none":
            upto = (j + 1) * C
            # In the backward nobody reads W after a segment's last step, but for a norm that settles.
            wanted = (j < after - 1) | (not GRAD) | (SETTLE[0] == "norm")
            if (upto % TURN[1] == 0) & (upto <= filled) & wanted:
                leaves = (upto == filled) & (not GRAD) & (TURN[0] == "muon_gd")
                turn_all((new1, new2, new3), turned_ptr, program, leaves, zero, D, F, LAYERS, TURN, GRAD)
                tl.debug_barrier()
        if SETTLE[0] == "norm":
            upto = (j + 1) * C
            if (upto % CHUNK == 0) & (upto <= filled):
                chunk = j * C // CHUNK - segment * EVERY
                scales = scales_of(settled_ptr, program, chunk, LAYERS, PAIR, EVERY, D, F)
                settle(anchor[1], new2, scales, zero, F, D, BF, D, GRAD)
                if LAYERS > 1:
                    settle(anchor[0], new1, scales + D, zero, D, F, D, BF, GRAD)
                if LAYERS == 3:
                    settle(anchor[2], new3, scales + D + F, zero, D, F, D, BF, GRAD)
                tl.debug_barrier()
        if SETTLE[0] == "kl":
            upto = (j + 1) * C
            if (upto % CHUNK == 0) & (upto <= filled):
                settle_logs(new2, zero, F, D, BF, D)
                if LAYERS > 1:
                    settle_logs(new1, zero, D, F, D, BF)
                if LAYERS == 3:
                    settle_logs(new3, zero, D, F, D, BF)
                tl.debug_barrier()
    if not GRAD:
        finish(
            own, start_ptr, kept_ptr, states, given, segment, n, h, begin, length, filled, first, after, slots, zero,
            H, CHUNK, C, EVERY, SIZE, LAYERS, COPIES, STATE,
        )  # fmt: skip


@triton.jit
def finish(own, start_ptr, kept_ptr, states, given, segment, n, h, begin, length, filled, first, after, slots,
           zero, H: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr, SIZE: tl.constexpr,
           LAYERS: tl.constexpr, COPIES: tl.constexpr, STATE: tl.constexpr):  # fmt: skip
    """The anchor after a sequence's last segment; the whole state of a sequence without tokens; and zeros where no
    chunk reached the kept states, since an operator's results must repeat."""
    PAIR: tl.constexpr = COPIES * SIZE
    WHOLE: tl.constexpr = PAIR + SIZE
    empty = (segment == 0) & (length == 0)
    if empty:
        begin_state(own, start_ptr, n, h, zero, H, SIZE, LAYERS, COPIES, COPIES + 1, STATE)
        tl.debug_barrier()
    if empty | ((first < after) & (after * C >= filled)):
        u1, u2, u3 = anchor_of(states, given, filled - 1, CHUNK, C, SIZE, LAYERS, COPIES, STATE)
        weights = (filled % CHUNK == 0) & ((length > 0) | (not STATE))
        if STATE:
            u1 = tl.where(empty, given + PAIR, u1)
            u2 = tl.where(empty, given + (LAYERS - 1) * WHOLE + PAIR, u2)
            u3 = tl.where(empty, given + WHOLE + PAIR, u3)
        copy(own + PAIR, tl.where(weights, own, u1), zero, SIZE)
        if LAYERS > 1:
            last = own + (LAYERS - 1) * WHOLE
            copy(last + PAIR, tl.where(weights, last, u2), zero, SIZE)
        if LAYERS == 3:
            copy(own + WHOLE + PAIR, tl.where(weights, own + WHOLE, u3), zero, SIZE)
    if segment == 0:
        used = slots + tl.maximum(filled - 1, 0) // (CHUNK * EVERY)
        for spare in range(used, (begin + length) // (CHUNK * EVERY) + n + 1):
            clear(kept_ptr + (spare * H + h) * (LAYERS * PAIR), zero, LAYERS * PAIR)
