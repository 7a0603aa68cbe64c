"""Backward through the reads of neural memory, in Triton, of all steps of a segment at once: a program per memory and
step.

None of it depends on the gradients that later steps send back. It takes up the tiles that ``neural_memory_reads`` left
in the workspace; what the walk in reverse order (``backward_carry.py``) takes from here goes through the same.

A tile that is needed transposed is loaded so from there: the transpose of a product's result is never an operand of
another. The last layer's matrices are taken as [D, BF], transposed.
"""

import triton
import triton.language as tl

from .hidden import hidden_backward, hidden_of
from .logs import running, shifts_of
from .orthogonal import APART
from .retentions import BY_ABOVE_READS, BY_FIRST_READS, FACTORS, scaled
from .tiles import (
    above_parts,
    anchor_of,
    clear,
    found_anew,
    hidden_at,
    hidden_parts,
    load_gates,
    pair_at,
    product,
    segment_steps,
    sequence,
    small_parts,
    square,
    step_offsets,
    tall,
    token_columns,
    token_rows,
    wide_parts,
    workspace,
)


@triton.jit
def flows(write, small, wide, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FLOW: tl.constexpr,
          TURNED: tl.constexpr, DELTA: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """To the workspace the last layer's R ⊙ Λ (FLOW), its transpose (TURNED), or what its reads add to the gradient of
    Δ (DELTA)."""
    deltas, reads, _, flow, flow_t, _, _ = small_parts(small, C, D)
    products, _, _, d_deltas, _, _, _, _ = wide_parts(wide, C, D, F)
    if FLOW:
        found = -product(tl.load(tall(reads, C, D)[0]), tl.load(tall(deltas, C, D)[1]), DT, PRECISION)
        tl.store(square(flow, C)[0], (found * tl.load(square(write, C)[0]).to(tl.float32)).to(DT))
    else:
        written_t = tl.load(square(write, C)[1]).to(tl.float32)
        if TURNED:
            found = -product(tl.load(tall(deltas, C, D)[0]), tl.load(tall(reads, C, D)[1]), DT, PRECISION)
            tl.store(square(flow_t, C)[0], (found * written_t).to(DT))
        if DELTA:
            d_read = tl.load(tall(reads, C, D)[0])
            d_delta = -product(tl.load(square(products, C)[1]) * written_t, d_read, DT, PRECISION)
            tl.store(tall(d_deltas, C, D)[0], d_delta)


@triton.jit
def last_reads(q_ptr, k_ptr, d_o_ptr, d_q_ptr, tok, valid, weights, anchor, shift, gates, kept, d_vectors, small,
               wide, zero, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr,
               RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Backward through the last layer's reads: the gradients of the queries' pre-activations, of the hidden keys and of
    the first layer's Δ, by its reads, to the workspace; those of A and f. A linear memory's query is its hidden
    vector. ``kept``: where the factors of lq lie, or None; ``anchor``, ``shift``: of kl, or None."""
    SIZE: tl.constexpr = D * F
    retain, carry, _, _, _, _, _ = gates
    _, reads, _, flows, flows_t, _, _ = small_parts(small, C, D)
    _, _, read_hiddens, d_pres, hiddens, d_hiddens = hidden_parts(small, C, D, F)
    _, _, _, _, _, befores, pres, _ = wide_parts(wide, C, D, F)
    _, d_above_pres, _, aboves, above_pres = above_parts(small, wide, C, D, F)
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    d_read = tl.load(tall(reads, C, D)[0])
    if MOMENTUM != APART:
        flow = tl.load(square(flows, C)[0])
        flow_t = tl.load(square(flows_t, C)[0])
    d_retain = tl.zeros([C], tl.float32)
    d_carry = tl.zeros([C], tl.float32)
    factor = None
    if LAYERS > 1 and kept is not None:
        factor = tl.load(kept + 2)
        d_factor = tl.zeros([C], tl.float32)
        if LAYERS == 3:
            above_factor = tl.load(kept + 4)
            d_above_factor = tl.zeros([C], tl.float32)
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at = f[None, :] * D + d[:, None]
        at_hidden = i[:, None] * F + f[None, :]
        if LAYERS > 1:
            # Operands are loaded and not computed: every warp would compute all of them. Wide heads have the registers
            # here, but not where the hidden keys would be stored.
            if MOMENTUM != APART:
                hidden = tl.load(hiddens + at_hidden) if D <= 64 else hidden_at(befores, aboves, at_hidden, LAYERS)
            read_hidden = tl.load(read_hiddens + at_hidden)
            pre, above_pre = pair_at(pres, above_pres, at_hidden, LAYERS)
            read = hidden_of(pre, above_pre, LAYERS)
        else:
            hidden = token_rows(k_ptr, tok, valid, f)
            read_hidden = token_rows(q_ptr, tok, valid, f)
            read = read_hidden.to(tl.float32)
        weight, offset = running(weights + at, anchor, at, shift, d[:, None], zero)
        to_weight = product(d_read, weight, DT, PRECISION)
        d_retain += tl.sum(read * to_weight, 1)
        d_read_hidden = to_weight * retain[:, None]
        if MOMENTUM != APART:
            d_read_hidden += product(flow, hidden, DT, PRECISION)
        if shift is not None:
            to_offset = product(d_read, offset, DT, PRECISION)
            d_retain -= tl.sum(read * to_offset, 1)
            d_read_hidden += to_offset * (1.0 - retain)[:, None]
        if MOMENTUM and MOMENTUM != APART:
            to_moment = product(d_read, tl.load(weights + SIZE + at), DT, PRECISION)
            d_carry += tl.sum(read * to_moment, 1)
            d_read_hidden += to_moment * carry[:, None]
        if MOMENTUM != APART:
            tl.store(d_hiddens + at_hidden, product(flow_t, read_hidden, DT, PRECISION).to(DT))
        if LAYERS > 1:
            d_pre, d_above_pre = hidden_backward(d_read_hidden, pre, above_pre, LAYERS)
            if factor is not None:
                d_factor += tl.sum(d_pre * pre, 1)
            tl.store(d_pres + at_hidden, scaled(d_pre, factor).to(DT))
            if LAYERS == 3:
                if factor is not None:
                    d_above_factor += tl.sum(d_above_pre * above_pre, 1)
                    d_above_pre = d_above_pre * above_factor
                tl.store(d_above_pres + at_hidden, d_above_pre.to(DT))
        else:
            if RESIDUAL:
                d_read_hidden += token_rows(d_o_ptr, tok, valid, f).to(tl.float32)
            tl.store(d_q_ptr + tok[:, None] + f[None, :], d_read_hidden.to(DT), mask=valid[:, None])
    if factor is not None:
        tl.store(kept + BY_FIRST_READS, tl.sum(d_factor))
        if LAYERS == 3:
            tl.store(kept + BY_ABOVE_READS, tl.sum(d_above_factor))
    tl.store(d_vectors + i, d_retain)
    tl.store(d_vectors + C + i, d_carry)


@triton.jit
def first_scores(write, small, wide, zero, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
                 LAYERS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Backward through the scores of the first layer's reads: the gradient of its Δ, and of that of W3, to the
    workspace; of the scores, by Λ, in place of these, and returned without."""
    _, _, _, _, _, scores, as_read = small_parts(small, C, D)
    delta1s, _, _, d_pres, d_delta1s, _ = hidden_parts(small, C, D, F)
    delta3s, d_above_pres, d_delta3s, _, _ = above_parts(small, wide, C, D, F)
    i = tl.arange(0, C)
    scores_t = tl.load(square(as_read, C)[1])
    d_scores = tl.zeros([C, C], tl.float32)
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at_hidden = i[:, None] * F + f[None, :]
        d_pre = tl.load(d_pres + at_hidden)
        tl.store(d_delta1s + at_hidden, (-product(scores_t, d_pre, DT, PRECISION)).to(DT))
        d_scores -= product(d_pre, tl.load(delta1s + i[None, :] * F + f[:, None]), DT, PRECISION)
        if LAYERS == 3:
            d_pre = tl.load(d_above_pres + at_hidden)
            tl.store(d_delta3s + at_hidden, (-product(scores_t, d_pre, DT, PRECISION)).to(DT))
            d_scores -= product(d_pre, tl.load(delta3s + i[None, :] * F + f[:, None]), DT, PRECISION)
    tl.store(square(scores, C)[0], (d_scores * tl.load(square(write, C)[0]).to(tl.float32)).to(DT))
    return d_scores


@triton.jit
def last_scores(small, wide, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DT: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """What the last layer's scores give to the gradient of Λ, [C, C]."""
    deltas, reads, _, _, _, _, _ = small_parts(small, C, D)
    products = wide_parts(wide, C, D, F)[0]
    d_written = -product(tl.load(tall(reads, C, D)[0]), tl.load(tall(deltas, C, D)[1]), DT, PRECISION)
    return d_written * tl.load(square(products, C)[0])


@triton.jit
def scores_backward(q_ptr, k_ptr, tok, valid, write, d_write, small, wide, zero, D: tl.constexpr, F: tl.constexpr,
                    C: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr, WAITS: tl.constexpr, DT: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """Backward through the scores of both layers' reads: the gradient of Λ, and what the first layer's add to that of
    K. WAITS: that of :func:`last_scores` lies in place of h h_Kᵀ."""
    _, _, _, _, _, scores, _ = small_parts(small, C, D)
    products, _, _, _, d_keys, _, _, _ = wide_parts(wide, C, D, F)
    d = tl.arange(0, D)
    if LAYERS > 1:
        d_scores = first_scores(write, small, wide, zero, D, F, C, BF, LAYERS, DT, PRECISION)
        tl.debug_barrier()
    d_written = tl.load(square(products, C)[0]) if WAITS else last_scores(small, wide, C, D, F, DT, PRECISION)
    d_k = tl.zeros([C, D], tl.float32)
    if LAYERS > 1:
        q = token_rows(q_ptr, tok, valid, d)
        d_written += d_scores * product(q, token_columns(k_ptr, tok, valid, d), DT, PRECISION)
        d_k = product(tl.load(square(scores, C)[1]), q, DT, PRECISION)
    tl.store(square(d_write, C)[0], d_written.to(d_write.dtype.element_ty))
    tl.store(tall(d_keys, C, D)[0], d_k)


@triton.jit
def no_scores(small, wide, zero, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, LAYERS: tl.constexpr):
    """Where reads do not see what the step writes: they add nothing to the gradients of Δ, of the hidden keys and of
    K."""
    _, _, _, _, d_delta1s, d_hiddens = hidden_parts(small, C, D, F)
    _, _, _, d_deltas, d_keys, _, _, _ = wide_parts(wide, C, D, F)
    clear(d_deltas, zero, C * D)
    clear(d_keys, zero, C * D)
    clear(d_hiddens, zero, C * F)
    if LAYERS > 1:
        clear(d_delta1s, zero, C * F)
    if LAYERS == 3:
        clear(above_parts(small, wide, C, D, F)[2], zero, C * F)


@triton.jit
def first_reads(q_ptr, k_ptr, d_o_ptr, d_q_ptr, tok, valid, weights, anchor, shifts, gates, d_vectors, small, wide,
                zero, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr,
                RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Backward through the first layer's reads, and those of W3: writes the gradient of Q; adds to those of A and f."""
    SIZE: tl.constexpr = D * F
    PAIR: tl.constexpr = (2 if MOMENTUM else 1) * SIZE
    retain, carry, _, _, _, _, _ = gates
    _, _, _, _, _, scores, _ = small_parts(small, C, D)
    _, _, _, d_pres, _, _ = hidden_parts(small, C, D, F)
    _, d_above_pres, _, _, _ = above_parts(small, wide, C, D, F)
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    by_weight = tl.zeros([C, D], tl.float32)
    by_moment = tl.zeros([C, D], tl.float32)
    by_offset = by_moment
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at = d[:, None] * F + f[None, :]
        d_pre = tl.load(d_pres + i[:, None] * F + f[None, :])
        weight, offset = running(weights + at, anchor[0], at, shifts[0], f[None, :], zero)
        by_weight += product(d_pre, tl.trans(weight.to(DT)), DT, PRECISION)
        if shifts[0] is not None:
            by_offset += product(d_pre, tl.trans(offset.to(DT)), DT, PRECISION)
        if MOMENTUM and MOMENTUM != APART:
            by_moment += product(d_pre, tl.trans(tl.load(weights + SIZE + at).to(DT)), DT, PRECISION)
        if LAYERS == 3:
            d_pre = tl.load(d_above_pres + i[:, None] * F + f[None, :])
            weight, offset = running(weights + PAIR + at, anchor[2], at, shifts[2], f[None, :], zero)
            by_weight += product(d_pre, tl.trans(weight.to(DT)), DT, PRECISION)
            if shifts[2] is not None:
                by_offset += product(d_pre, tl.trans(offset.to(DT)), DT, PRECISION)
            if MOMENTUM and MOMENTUM != APART:
                by_moment += product(d_pre, tl.trans(tl.load(weights + PAIR + SIZE + at).to(DT)), DT, PRECISION)
    q = token_rows(q_ptr, tok, valid, d).to(tl.float32)
    k = token_rows(k_ptr, tok, valid, d)
    d_q = by_weight * retain[:, None]
    if MOMENTUM != APART:
        d_q += product(tl.load(square(scores, C)[0]), k, DT, PRECISION)
    if shifts[0] is not None:
        d_q += by_offset * (1.0 - retain)[:, None]
        by_weight -= by_offset
    tl.store(d_vectors + i, tl.load(d_vectors + i) + tl.sum(q * by_weight, 1))
    if MOMENTUM and MOMENTUM != APART:
        d_q += by_moment * carry[:, None]
        tl.store(d_vectors + C + i, tl.load(d_vectors + C + i) + tl.sum(q * by_moment, 1))
    if RESIDUAL:
        d_q += token_rows(d_o_ptr, tok, valid, d).to(tl.float32)
    tl.store(d_q_ptr + tok[:, None] + d[None, :], d_q.to(DT), mask=valid[:, None])


@triton.jit(do_not_specialize=["T", "segment", "zero"])
def neural_memory_reads_backward(
    q_ptr, k_ptr, d_o_ptr, write_ptr, vectors_ptr, ends_ptr, start_ptr, position_ptr, cu_ptr, states_ptr, d_q_ptr,
    d_write_ptr, d_vectors_ptr, settled_ptr, small_ptr, wide_ptr, zero_ptr, T, segment, zero, H: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr, LAYERS: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SETTLE: tl.constexpr, MOMENTUM: tl.constexpr,
    TURN: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    """Backward through the reads of one step: writes the gradients of Q, Λ, A and f, and to the workspace what reads
    add to those of Δ, of the hidden keys and of K."""
    n = tl.program_id(0) // H
    COPIES: tl.constexpr = 2 if MOMENTUM else 1
    PAIR: tl.constexpr = COPIES * D * F
    STEPS: tl.constexpr = EVERY * CHUNK // C
    RULE: tl.constexpr = APART if TURN[0] != "none" else MOMENTUM
    # lq and kl have more to hold; on Ampere both layers' scores at once are too many.
    WAITS: tl.constexpr = SETTLE[0] == "lq" or SETTLE[0] == "kl"
    _, length, place = sequence(n, cu_ptr, position_ptr, T, PACKED, STATE)
    first, after = segment_steps(segment, length, place, CHUNK, C, EVERY)
    j = segment * STEPS + tl.program_id(1)
    if (j >= first) & (j < after):
        for part in tl.static_range(3 if RULE != APART else 0):
            program, h, slot, begin, length, place = found_anew(
                zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE
            )  # fmt: skip
            small, wide = workspace(small_ptr, wide_ptr, program * STEPS + tl.program_id(1), C, D, F, LAYERS)
            flows(
                write_ptr + slot * (C * C), small, wide, C, D, F, part == 0, part == 1, part == 2, DT, PRECISION
            )  # fmt: skip
            tl.debug_barrier()
        program, h, slot, begin, length, place = found_anew(
            zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE
        )  # fmt: skip
        small, wide = workspace(small_ptr, wide_ptr, program * STEPS + tl.program_id(1), C, D, F, LAYERS)
        weights = states_ptr + (program * STEPS + tl.program_id(1)) * (LAYERS * PAIR)
        gates = load_gates(vectors_ptr + slot * (4 * C), ends_ptr + slot * 4, C)
        tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
        anchor = (None, None, None)
        shifts = (None, None, None)
        if SETTLE[0] == "kl":
            anchor = anchor_of(
                states_ptr + (program - segment) * STEPS * (LAYERS * PAIR),
                start_ptr + program * (LAYERS * (PAIR + D * F)), j * C, CHUNK, C, D * F, LAYERS, COPIES, STATE,
            )  # fmt: skip
            shifts = shifts_of(settled_ptr, program, j * C, CHUNK, LAYERS, PAIR, D, F, STATE)
        kept = None
        if SETTLE[0] == "lq":
            kept = settled_ptr + (program * STEPS + tl.program_id(1)) * FACTORS
        last_reads(
            q_ptr, k_ptr, d_o_ptr, d_q_ptr, tok, valid, weights + (LAYERS - 1) * PAIR, anchor[1], shifts[1], gates,
            kept, d_vectors_ptr + slot * (4 * C), small, wide, zero, D, F, C, BF, LAYERS, RESIDUAL, RULE, DT, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        program, h, slot, begin, length, place = found_anew(
            zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE
        )  # fmt: skip
        small, wide = workspace(small_ptr, wide_ptr, program * STEPS + tl.program_id(1), C, D, F, LAYERS)
        tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
        if RULE == APART:
            no_scores(small, wide, zero, D, F, C, LAYERS)
        else:
            if WAITS:
                tl.store(square(wide_parts(wide, C, D, F)[0], C)[0], last_scores(small, wide, C, D, F, DT, PRECISION))
                tl.debug_barrier()
                program, h, slot, begin, length, place = found_anew(
                    zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE
                )
                small, wide = workspace(small_ptr, wide_ptr, program * STEPS + tl.program_id(1), C, D, F, LAYERS)
                tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
            scores_backward(
                q_ptr, k_ptr, tok, valid, write_ptr + slot * (C * C), d_write_ptr + slot * (C * C), small, wide, zero,
                D, F, C, BF, LAYERS, WAITS, DT, PRECISION,
            )  # fmt: skip
        if LAYERS > 1:
            program, h, slot, begin, length, place = found_anew(
                zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE
            )  # fmt: skip
            small, wide = workspace(small_ptr, wide_ptr, program * STEPS + tl.program_id(1), C, D, F, LAYERS)
            weights = states_ptr + (program * STEPS + tl.program_id(1)) * (LAYERS * PAIR)
            gates = load_gates(vectors_ptr + slot * (4 * C), ends_ptr + slot * 4, C)
            tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
            anchor = (None, None, None)
            shifts = (None, None, None)
            if SETTLE[0] == "kl":
                anchor = anchor_of(
                    states_ptr + (program - segment) * STEPS * (LAYERS * PAIR),
                    start_ptr + program * (LAYERS * (PAIR + D * F)), j * C, CHUNK, C, D * F, LAYERS, COPIES, STATE,
                )  # fmt: skip
                shifts = shifts_of(settled_ptr, program, j * C, CHUNK, LAYERS, PAIR, D, F, STATE)
            first_reads(
                q_ptr, k_ptr, d_o_ptr, d_q_ptr, tok, valid, weights, anchor, shifts, gates,
                d_vectors_ptr + slot * (4 * C), small, wide, zero, D, F, C, BF, LAYERS, RESIDUAL, RULE, DT, PRECISION,
            )  # fmt: skip
