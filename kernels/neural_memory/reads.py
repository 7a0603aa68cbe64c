"""The reads of neural memory in Triton, of all steps of a segment at once: a program per memory and step.

It needs the state with which the step begins and Δ of its last layer (``states.py``). In the backward the same kernel
(GRAD) leaves its tiles in a workspace, whose parts ``tiles.py`` names, and the gradient of the last layer's reads.
"""

import triton
import triton.language as tl

from .hidden import hidden_of
from .logs import running, shifts_of
from .orthogonal import APART
from .parts import block_by_parts, read_by_parts
from .retentions import BY_READS, FACTORS, load_factors, scaled
from .states import anchor_block, keys_block
from .tiles import (
    above_parts,
    anchor_of,
    deltas_of,
    found_anew,
    hidden_parts,
    load_gates,
    load_norm,
    normalised,
    product,
    project,
    segment_steps,
    sequence,
    shared,
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
def first_read(q, scores, delta, weights, anchor, shift, f, at, zero, retain, carry, factor, SIZE: tl.constexpr,
               MOMENTUM: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The queries' pre-activations of a block of W1 or W3."""
    weight, offset = running(weights + at, anchor, at, shift, f[None, :], zero)
    pre = product(q, weight, DT, PRECISION) * retain[:, None]
    if shift is not None:
        pre += product(q, offset, DT, PRECISION) * (1.0 - retain)[:, None]
    if MOMENTUM != APART:
        pre -= product(scores, delta, DT, PRECISION)
    if MOMENTUM and MOMENTUM != APART:
        pre += product(q, tl.load(weights + SIZE + at), DT, PRECISION) * carry[:, None]
    return scaled(pre, factor)


@triton.jit
def apart_reads(q, at, states, retain, factors, LAYERS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """The queries' pre-activations of a block of W1, and of W3, where reads see A_t W alone."""
    pre = scaled(product(q, tl.load(states[0] + at), DT, PRECISION) * retain[:, None], factors[0])
    above = pre
    if LAYERS == 3:
        above = scaled(product(q, tl.load(states[2] + at), DT, PRECISION) * retain[:, None], factors[2])
    return pre, above


@triton.jit
def reads_pass(q_ptr, k_ptr, tok, valid, deltas, anchor, shifts, factors, states, write, gates, reads, hiddens, zero,
               D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr,
               MOMENTUM: tl.constexpr, GRAD: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The reads up to the LayerNorm, but for the term of the last layer's scores; with h h_Kᵀ of that layer. The hidden
    queries go through ``reads``. GRAD: Δ of the first layer, B, both pre-activations, and for heads of at most 64 the
    hidden keys (where the gradient of Δ will lie) to ``hiddens``, and the scores by Λ; then Δ and both pre-activations
    of W3. ``anchor``, ``states``: where W1, W2 and W3 begin.

    The transposed keys are loaded for every block anew (``zero`` is 0, which the compiler does not know): where matrix
    instructions take operands from registers, they would fill a quarter of them. Of three matrices, or with
    wide heads, many hidden units and no momentum (PARTS), keys and queries are taken by parts, which are loaded anew,
    and blocks of the last matrix are held once.
    """
    SIZE: tl.constexpr = D * F
    PARTS: tl.constexpr = LAYERS == 3 or (D > 64 and F > 256 and GRAD and not MOMENTUM)
    retain, carry, _, _, _, _, _ = gates
    d = tl.arange(0, D)
    k = token_rows(k_ptr, tok, valid, d)
    q = token_rows(q_ptr, tok, valid, d)
    delta = tl.load(tall(deltas, C, D)[0])
    scores = k
    if LAYERS > 1 and MOMENTUM != APART:
        scores = (product(q, token_columns(k_ptr, tok, valid, d), DT, PRECISION) * tl.load(write).to(tl.float32)).to(DT)
        if GRAD:
            tl.store(square(hiddens[5], C)[0], scores)
    products = tl.zeros([C, C], tl.float32)
    i = tl.arange(0, C)
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at1 = d[:, None] * F + f[None, :]
        at2 = f[:, None] * D + d[None, :]
        at_hidden = i[:, None] * F + f[None, :]
        if LAYERS > 1 and MOMENTUM == APART and not GRAD:
            # What the step writes is not read in it.
            pre, pre_above = apart_reads(q, at1, states, retain, factors, LAYERS, DT, PRECISION)
            read = hidden_of(pre, pre_above, LAYERS)
            tl.store(reads + at_hidden, read.to(DT))
        elif LAYERS > 1:
            if PARTS:
                before, above, back, delta1, delta3, hidden_t = block_by_parts(
                    k_ptr, tok, valid, deltas, anchor, shifts, factors, f, zero, D, F, C, BF, LAYERS, DT, PRECISION
                )
                pre = read_by_parts(
                    q_ptr, tok, valid, scores, delta1, states[0], anchor[0], shifts[0], f, zero, retain, carry,
                    factors[0], D, F, C, BF, MOMENTUM, DT, PRECISION,
                )  # fmt: skip
            else:
                kt = token_columns(k_ptr, tok + start * zero, valid, d)
                block = anchor_block(anchor, shifts, f, d, at1, at2, zero, DT, LAYERS)
                before, above, back, delta1, delta3, hidden_t = keys_block(
                    k, kt, delta, block, factors, LAYERS, DT, PRECISION
                )
                pre = first_read(
                    q, scores, delta1, states[0], anchor[0], shifts[0], f, at1, zero, retain, carry, factors[0], SIZE,
                    MOMENTUM, DT, PRECISION,
                )  # fmt: skip
            pre_above = pre
            if LAYERS == 3 and PARTS:
                pre_above = read_by_parts(
                    q_ptr, tok, valid, scores, delta3, states[2], anchor[2], shifts[2], f, zero, retain, carry,
                    factors[2], D, F, C, BF, MOMENTUM, DT, PRECISION,
                )  # fmt: skip
            elif LAYERS == 3:
                pre_above = first_read(
                    q, scores, delta3, states[2], anchor[2], shifts[2], f, at1, zero, retain, carry, factors[2], SIZE,
                    MOMENTUM, DT, PRECISION,
                )  # fmt: skip
            read = hidden_of(pre, pre_above, LAYERS)
            tl.store(reads + at_hidden, read.to(DT))
            if GRAD:
                tl.store(hiddens[0] + at_hidden, delta1.to(DT))
                tl.store(hiddens[1] + at_hidden, back.to(DT))
                tl.store(hiddens[2] + at_hidden, before)
                tl.store(hiddens[3] + at_hidden, pre)
                if D <= 64 and MOMENTUM != APART:
                    tl.store(hiddens[4] + at_hidden, hidden_of(before, above, LAYERS).to(DT))
            if GRAD and LAYERS == 3:
                tl.store(hiddens[6] + at_hidden, delta3.to(DT))
                tl.store(hiddens[7] + at_hidden, above)
                tl.store(hiddens[8] + at_hidden, pre_above)
        else:
            hidden_t = token_columns(k_ptr, tok, valid, f)
            read = token_rows(q_ptr, tok, valid, f).to(tl.float32)
        if MOMENTUM != APART:
            products += product(read, hidden_t, DT, PRECISION)
    if LAYERS > 1:
        tl.debug_barrier()
    out = tl.zeros([C, D], tl.float32)
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at2 = f[:, None] * D + d[None, :]
        if LAYERS > 1:
            hidden = tl.load(reads + i[:, None] * F + f[None, :]).to(tl.float32)
        else:
            hidden = token_rows(q_ptr, tok, valid, f).to(tl.float32)
        weight, offset = running(states[1] + at2, anchor[1], at2, shifts[1], d[None, :], zero, PARTS)
        out += product(hidden * retain[:, None], weight, DT, PRECISION)
        if shifts[1] is not None:
            out += product(hidden * (1.0 - retain)[:, None], offset, DT, PRECISION)
        if MOMENTUM and MOMENTUM != APART:
            moment = shared(tl.load(states[1] + SIZE + at2), zero, PARTS)
            out += product(hidden * carry[:, None], moment, DT, PRECISION)
    return products, out


@triton.jit(do_not_specialize=["T", "segment", "zero"])
def neural_memory_reads(
    q_ptr, k_ptr, write_ptr, vectors_ptr, ends_ptr, norm_ptr, start_ptr, position_ptr, cu_ptr, states_ptr, o_ptr,
    d_o_ptr, d_norm_ptr, settled_ptr, small_ptr, wide_ptr, zero_ptr, T, segment, zero, H: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr, LAYERS: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SETTLE: tl.constexpr, MOMENTUM: tl.constexpr,
    TURN: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, GRAD: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Forward: ``o`` of one step. GRAD: its tiles to the workspace, with the gradient of the last layer's reads, and
    what the reads add to that of the norm's scale: ``d_norm`` [slots, H, 2, D], by the reads of a step and by its
    error."""
    SIZE: tl.constexpr = D * F
    COPIES: tl.constexpr = 2 if MOMENTUM else 1
    PAIR: tl.constexpr = COPIES * SIZE
    STEPS: tl.constexpr = EVERY * CHUNK // C
    RULE: tl.constexpr = APART if TURN[0] != "none" else MOMENTUM
    d = tl.arange(0, D)
    j = segment * STEPS + tl.program_id(1)
    _, length, place = sequence(tl.program_id(0) // H, cu_ptr, position_ptr, T, PACKED, STATE)
    first, after = segment_steps(segment, length, place, CHUNK, C, EVERY)
    if (j >= first) & (j < after):
        program, h, slot, begin, length, place = found_anew(zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE)
        at = program * STEPS + tl.program_id(1)
        states = states_ptr + (program * STEPS - segment * STEPS) * (LAYERS * PAIR)
        given = start_ptr + program * (LAYERS * (PAIR + SIZE))
        anchor = anchor_of(states, given, j * C, CHUNK, C, SIZE, LAYERS, COPIES, STATE)
        begun = states + j * (LAYERS * PAIR)
        now = begun, begun + (LAYERS - 1) * PAIR, begun + PAIR
        deltas = deltas_of(small_ptr, at, C, D, F, LAYERS, GRAD)
        shifts = (None, None, None)
        if SETTLE[0] == "kl":
            shifts = shifts_of(settled_ptr, program, j * C, CHUNK, LAYERS, PAIR, D, F, STATE)
        factors = (None, None, None)
        if SETTLE[0] == "lq":
            factors = load_factors(settled_ptr + at * FACTORS, LAYERS)
        gates = load_gates(vectors_ptr + slot * (4 * C), ends_ptr + slot * 4, C)
        tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
        hidden = deltas + C * D
        tiles = deltas, deltas, deltas, deltas, deltas, deltas, deltas, deltas, deltas
        if GRAD:
            small, wide = workspace(small_ptr, wide_ptr, at, C, D, F, LAYERS)
            parts, wides = hidden_parts(small, C, D, F), wide_parts(wide, C, D, F)
            hidden = parts[2]
            more, scores = above_parts(small, wide, C, D, F), small_parts(small, C, D)[6]
            tiles = parts[0], parts[1], wides[5], wides[6], parts[4], scores, more[0], more[3], more[4]
        found, out = reads_pass(
            q_ptr, k_ptr, tok, valid, deltas, anchor, shifts, factors, now,
            square(write_ptr + slot * (C * C), C)[0], gates, hidden, tiles, zero, D, F, C, BF, LAYERS, RULE, GRAD, DT,
            PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        program, h, slot, begin, length, place = found_anew(zero_ptr, cu_ptr, position_ptr, T, j, H, C, PACKED, STATE)
        at = program * STEPS + tl.program_id(1)
        tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
        if GRAD and RULE != APART:
            tl.store(square(workspace(small_ptr, wide_ptr, at, C, D, F, LAYERS)[1], C)[0], found)
        if RULE == APART:
            out = scaled(out, factors[1])
        elif NORM or not GRAD or SETTLE[0] == "lq":
            delta = tl.load(tall(deltas_of(small_ptr, at, C, D, F, LAYERS, GRAD), C, D)[0])
            written = tl.load(square(write_ptr + slot * (C * C), C)[0]).to(tl.float32)
            out = scaled(out - product(found * written, delta, DT, PRECISION), factors[1])
        if GRAD:
            d_out = token_rows(d_o_ptr, tok, valid, d).to(tl.float32)
            if NORM:
                normed, rstd = normalised(out, D)
                tl.store(d_norm_ptr + slot * (2 * D) + d, tl.sum(d_out * normed, 0))
                d_out = project(d_out * load_norm(norm_ptr, h, D, NORM)[None, :], normed, D) * rstd[:, None]
            if SETTLE[0] == "lq":
                tl.store(settled_ptr + at * FACTORS + BY_READS, tl.sum(d_out * out))
                d_out = scaled(d_out, factors[1])
            reads = small_parts(workspace(small_ptr, wide_ptr, at, C, D, F, LAYERS)[0], C, D)[1]
            tl.store(tall(reads, C, D)[0], d_out.to(DT))
        else:
            if NORM:
                out = normalised(out, D)[0] * load_norm(norm_ptr, h, D, NORM)[None, :]
            if RESIDUAL:
                out += token_rows(q_ptr, tok, valid, d).to(tl.float32)
            tl.store(o_ptr + tok[:, None] + d[None, :], out.to(o_ptr.dtype.element_ty), mask=valid[:, None])
