"""Passes of neural memory in Triton that take keys, queries and tokens by parts; ``states.py`` and ``reads.py`` have
the whole ones.

Muon's step is of float32 (``orthogonal.py`` says why), and a product of float32 holds each operand twice: as what tf32
can say of it, and the rest. A whole key of 128 numbers, or 64 tokens of three matrices, is then more than there are
registers for; so are whole keys and queries of wide heads in the reads of three matrices. Products run over 32 numbers
of a key at a time; ``zero``, in the number of a loop's rounds, keeps the compiler from holding more.
"""

import triton
import triton.language as tl

from .hidden import hidden_backward, hidden_of
from .logs import running, weights_at
from .orthogonal import APART, moment_product
from .retentions import scaled
from .tiles import product, step_offsets, tall, token_columns, token_rows


@triton.jit
def update_block(old, new, at, end_retain, end_carry, end_inertia, written, written_moment, SIZE: tl.constexpr,
                 MOMENTUM: tl.constexpr):  # fmt: skip
    """A block of W and S after the step, from those before and the rank-C terms that are taken off."""
    after = end_retain * tl.load(old + at)
    if MOMENTUM != APART:
        after -= written
    if MOMENTUM:
        moment = tl.load(old + SIZE + at)
        if MOMENTUM != APART:
            after += end_carry * moment
        tl.store(new + SIZE + at, end_inertia * moment - written_moment)
    tl.store(new + at, after)


@triton.jit
def keys_by_parts(k_ptr, tok, valid, anchor, shifts, factors, f, zero, D: tl.constexpr, F: tl.constexpr,
                  C: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr, DT: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """The keys' pre-activations of a block of hidden units f at the anchor, [C, BF], by W1 and by W3."""
    PART: tl.constexpr = D if D < 32 else 32
    before = tl.zeros([C, BF], tl.float32)
    above = before
    for start in tl.range(0, D + zero, PART, disable_licm=True):
        d = start + tl.arange(0, PART)
        at = d[:, None] * F + f[None, :]
        k = token_rows(k_ptr, tok, valid, d)
        before += product(k, weights_at(anchor[0] + at, shifts[0], f[None, :], zero), DT, PRECISION)
        if LAYERS == 3:
            above += product(k, weights_at(anchor[2] + at, shifts[2], f[None, :], zero), DT, PRECISION)
    return scaled(before, factors[0]), scaled(above, factors[2])


@triton.jit
def block_by_parts(k_ptr, tok, valid, deltas, anchor, shifts, factors, f, zero, D: tl.constexpr, F: tl.constexpr,
                   C: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr, DT: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """What ``states.keys_block`` returns. ``deltas``: where Δ of the last layer lies, [C, D]."""
    PART: tl.constexpr = D if D < 32 else 32
    before, above = keys_by_parts(
        k_ptr, tok, valid, anchor, shifts, factors, f, zero, D, F, C, BF, LAYERS, DT, PRECISION
    )
    back = tl.zeros([C, BF], tl.float32)
    before_t = tl.zeros([BF, C], tl.float32)
    above_t = before_t
    i = tl.arange(0, C)
    for start in tl.range(0, D + zero, PART, disable_licm=True):
        d = start + tl.arange(0, PART)
        at = d[:, None] * F + f[None, :]
        last = weights_at(anchor[1] + f[:, None] * D + d[None, :], shifts[1], d[None, :], zero)
        back += product(tl.load(deltas + i[:, None] * D + d[None, :]), tl.trans(last.to(DT)), DT, PRECISION)
        kt = token_columns(k_ptr, tok, valid, d)
        first = weights_at(anchor[0] + at, shifts[0], f[None, :], zero)
        before_t += product(tl.trans(first.to(DT)), kt, DT, PRECISION)
        if LAYERS == 3:
            third = weights_at(anchor[2] + at, shifts[2], f[None, :], zero)
            above_t += product(tl.trans(third.to(DT)), kt, DT, PRECISION)
    back = scaled(back, factors[1])
    hidden_t = hidden_of(scaled(before_t, factors[0]), scaled(above_t, factors[2]), LAYERS)
    delta1, delta3 = hidden_backward(back, before, above, LAYERS)
    return before, above, back, delta1, delta3, hidden_t


@triton.jit
def read_by_parts(q_ptr, tok, valid, scores, delta, weights, anchor, shift, f, zero, retain, carry, factor,
                  D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, MOMENTUM: tl.constexpr,
                  DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What ``reads.first_read`` returns: the queries' pre-activations of a block of W1 or W3."""
    PART: tl.constexpr = D if D < 32 else 32
    by_weight = tl.zeros([C, BF], tl.float32)
    by_moment = by_weight
    by_offset = by_weight
    for start in tl.range(0, D + zero, PART, disable_licm=True):
        d = start + tl.arange(0, PART)
        at = d[:, None] * F + f[None, :]
        q = token_rows(q_ptr, tok, valid, d)
        weight, offset = running(weights + at, anchor, at, shift, f[None, :], zero)
        by_weight += product(q, weight, DT, PRECISION)
        if shift is not None:
            by_offset += product(q, offset, DT, PRECISION)
        if MOMENTUM and MOMENTUM != APART:
            by_moment += product(q, tl.load(weights + D * F + at), DT, PRECISION)
    pre = by_weight * retain[:, None]
    if shift is not None:
        pre += by_offset * (1.0 - retain)[:, None]
    if MOMENTUM != APART:
        pre -= product(scores, delta, DT, PRECISION)
    if MOMENTUM and MOMENTUM != APART:
        pre += by_moment * carry[:, None]
    return scaled(pre, factor)


@triton.jit
def update_by_parts(k_ptr, j, begin, length, place, h, momenta, deltas, anchor, factors, old, new, gates, zero,
                    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
                    BF: tl.constexpr, LAYERS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``states.update_pass`` with muon, of more than one matrix, ROWS tokens at a time. ``momenta``: where P_c of the
    step lies, [C]; ``deltas``: where Δ of its last layer does, [C, D]."""
    SIZE: tl.constexpr = D * F
    d = tl.arange(0, D)
    i = tl.arange(0, ROWS)
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        inert1 = tl.zeros([D, BF], tl.float32)
        inert2 = tl.zeros([BF, D], tl.float32)
        inert3 = inert1
        for part in tl.range(0, C // ROWS + zero, disable_licm=True):
            tok, valid = step_offsets(j * (C // ROWS) + part, begin, length, place, h, H, D, ROWS)
            momentum = tl.load(momenta + part * ROWS + i)
            own = deltas + part * (ROWS * D)
            delta1, delta3, hidden_t = block_by_parts(
                k_ptr, tok, valid, own, anchor, (None, None, None), factors, f, zero, D, F, ROWS, BF, LAYERS,
                tl.float32, PRECISION,
            )[3:]  # fmt: skip
            kt = token_columns(k_ptr, tok, valid, d)
            inert1 += product(kt, delta1 * momentum[:, None], tl.float32, PRECISION)
            if LAYERS == 3:
                inert3 += product(kt, delta3 * momentum[:, None], tl.float32, PRECISION)
            delta = tl.load(tall(own, ROWS, D)[0])
            inert2 += product(hidden_t * momentum[None, :], delta, tl.float32, PRECISION)
        at1 = d[:, None] * F + f[None, :]
        at2 = f[:, None] * D + d[None, :]
        update_block(old[0], new[0], at1, gates[4], gates[5], gates[6], inert1, inert1, SIZE, APART)
        update_block(old[1], new[1], at2, gates[4], gates[5], gates[6], inert2, inert2, SIZE, APART)
        if LAYERS == 3:
            update_block(old[2], new[2], at1, gates[4], gates[5], gates[6], inert3, inert3, SIZE, APART)


@triton.jit
def moments_by_parts(rows, tok, valid, moments, f, zero, OUT: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
                     BF: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows [C, D] at ``tok`` by a block of the gradient of S, [D, BF], as ``orthogonal.moment_product`` has it for
    muon. OUT: numbers from one row of the block to the next, columns being beside each other; 1 if rows are, and
    columns lie D apart."""
    by_moment = tl.zeros([C, BF], tl.float32)
    for start in tl.range(0, D + zero, 32, disable_licm=True):
        d = start + tl.arange(0, 32)
        at = d[:, None] + f[None, :] * D if OUT == 1 else d[:, None] * OUT + f[None, :]
        left = token_rows(rows, tok, valid, d)
        by_moment += moment_product(left, tl.load(moments + at), APART, tl.float32, PRECISION)
    return by_moment
