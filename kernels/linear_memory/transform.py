"""The UT transform of the delta rule: N = (I + A)⁻¹ with A = tril(K Kᵀ ⊙ Γ, −1) diag β, and N times values and keys.

N is made from 16 × 16 blocks: those on the diagonal by forward substitution in float32, those below by products,
N_ij = −N_ii Σ_{j ≤ m < i} A_im N_mj.
"""

import triton
import triton.language as tl

from .tiles import chunk_of, cumulative, gate, put, tile, turned

SIDE = tl.constexpr(16)


@triton.jit
def system(
    k, beta, log_decay, first, stop, head, ROW: tl.constexpr, COL: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    STRIDE: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block (ROW, COL) of A, [16, 16], of the chunk that begins at ``first``."""
    row, column, d = first + ROW * SIDE, first + COL * SIDE, tl.arange(0, D)
    keys = tile(k + head * D, row, stop, d, STRIDE, SIDE)
    others = turned(k + head * D, column, stop, d, STRIDE, SIDE)
    a = tl.dot(keys, others, input_precision=PRECISION) * gate(beta, column, stop, head, H, SIDE)[None, :]
    i = tl.arange(0, SIDE)
    inside = i[:, None] > i[None, :] if ROW == COL else (i[:, None] + i[None, :]) >= 0
    if DECAY:
        # G_i − G_j: from the end of block COL on to i, and from j to that end.
        of_row, _ = cumulative(log_decay, row, stop, head, H, SIDE, DECAY)
        of_column, whole = cumulative(log_decay, column, stop, head, H, SIDE, DECAY)
        if ROW == COL:
            between = of_row[:, None] - of_column[None, :]
        else:
            between = of_row[:, None] + (whole - of_column)[None, :]
            for b in tl.static_range(COL + 1, ROW):
                between += tl.sum(gate(log_decay, first + b * SIDE, stop, head, H, SIDE), 0)
        return a * tl.exp(tl.where(inside, between, float("-inf")))
    else:
        return tl.where(inside, a, 0.0)


@triton.jit
def invert(a):
    """(I + a)⁻¹ of a strictly lower triangular [16, 16], row by row: X_i = −a_i − a_i X for X = (I + a)⁻¹ − I."""
    i = tl.arange(0, SIDE)
    x = -a
    for r in range(1, SIDE):
        row = tl.sum(tl.where((i == r)[:, None], x, 0.0), 0)
        row += tl.sum(row[:, None] * x, 0)
        x = tl.where((i == r)[:, None], row[None, :], x)
    return x + tl.where(i[:, None] == i[None, :], 1.0, 0.0)


@triton.jit
def keep(out, block, ROW: tl.constexpr, COL: tl.constexpr, C: tl.constexpr):
    """Write block (ROW, COL) of a matrix [C, C]."""
    i = tl.arange(0, SIDE)
    at = out + (i + ROW * SIDE)[:, None] * C + (i + COL * SIDE)[None, :]
    tl.store(at, block.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "count"])
def delta_inverse(
    k, beta, log_decay, table, inverse, length, count,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    DELTA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """N of one chunk and head, [slots, H, C, C]; the identity where a slot is not used."""
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, stop = chunk_of(slot, table, length, count, C, PACKED)
    out = inverse + (slot * H + head).to(tl.int64) * (C * C)
    MERGE: tl.constexpr = "ieee" if DTYPE == "float32" else "tf32"
    zero = tl.zeros([SIDE, SIDE], tl.float32)
    n00 = invert(system(k, beta, log_decay, first, stop, head, 0, 0, H, D, K_STRIDE, DECAY, PRECISION))
    keep(out, n00, 0, 0, C)
    if C >= 32:
        n11 = invert(system(k, beta, log_decay, first, stop, head, 1, 1, H, D, K_STRIDE, DECAY, PRECISION))
        a10 = system(k, beta, log_decay, first, stop, head, 1, 0, H, D, K_STRIDE, DECAY, PRECISION)
        n10 = -tl.dot(n11, tl.dot(a10, n00, input_precision=MERGE), input_precision=MERGE)
        keep(out, n11, 1, 1, C)
        keep(out, n10, 1, 0, C)
        keep(out, zero, 0, 1, C)
    if C == 64:
        n22 = invert(system(k, beta, log_decay, first, stop, head, 2, 2, H, D, K_STRIDE, DECAY, PRECISION))
        a20 = system(k, beta, log_decay, first, stop, head, 2, 0, H, D, K_STRIDE, DECAY, PRECISION)
        a21 = system(k, beta, log_decay, first, stop, head, 2, 1, H, D, K_STRIDE, DECAY, PRECISION)
        under = tl.dot(a20, n00, input_precision=MERGE) + tl.dot(a21, n10, input_precision=MERGE)
        n20 = -tl.dot(n22, under, input_precision=MERGE)
        n21 = -tl.dot(n22, tl.dot(a21, n11, input_precision=MERGE), input_precision=MERGE)
        keep(out, n22, 2, 2, C)
        keep(out, n20, 2, 0, C)
        keep(out, n21, 2, 1, C)
        n33 = invert(system(k, beta, log_decay, first, stop, head, 3, 3, H, D, K_STRIDE, DECAY, PRECISION))
        a30 = system(k, beta, log_decay, first, stop, head, 3, 0, H, D, K_STRIDE, DECAY, PRECISION)
        a31 = system(k, beta, log_decay, first, stop, head, 3, 1, H, D, K_STRIDE, DECAY, PRECISION)
        a32 = system(k, beta, log_decay, first, stop, head, 3, 2, H, D, K_STRIDE, DECAY, PRECISION)
        under = tl.dot(a30, n00, input_precision=MERGE) + tl.dot(a31, n10, input_precision=MERGE)
        under += tl.dot(a32, n20, input_precision=MERGE)
        n30 = -tl.dot(n33, under, input_precision=MERGE)
        under = tl.dot(a31, n11, input_precision=MERGE) + tl.dot(a32, n21, input_precision=MERGE)
        n31 = -tl.dot(n33, under, input_precision=MERGE)
        n32 = -tl.dot(n33, tl.dot(a32, n22, input_precision=MERGE), input_precision=MERGE)
        keep(out, n33, 3, 3, C)
        keep(out, n30, 3, 0, C)
        keep(out, n31, 3, 1, C)
        keep(out, n32, 3, 2, C)
        for j in tl.static_range(2, 4):
            keep(out, zero, 0, j, C)
            keep(out, zero, 1, j, C)
        keep(out, zero, 2, 3, C)


@triton.jit(do_not_specialize=["length", "count"])
def delta_transform(
    k, v, log_decay, inverse, table, towards, errors, length, count,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    DELTA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, VALUES: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """N (K ⊙ exp G) [B, T, H, D] and with VALUES N V [B, T, H, D_v] of one chunk and head."""
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, stop = chunk_of(slot, table, length, count, C, PACKED)
    if first >= stop:
        return
    i, d = tl.arange(0, C), tl.arange(0, D)
    n = tl.load(inverse + (slot * H + head).to(tl.int64) * (C * C) + i[:, None] * C + i[None, :])
    total, _ = cumulative(log_decay, first, stop, head, H, C, DECAY)
    keys = tile(k + head * D, first, stop, d, K_STRIDE, C)
    if DECAY:
        keys = (keys.to(tl.float32) * tl.exp(total)[:, None]).to(keys.dtype)
    put(towards + head * D, tl.dot(n, keys, input_precision=PRECISION), first, stop, d, H * D, C)
    if VALUES:
        for start in range(0, DV, BV):
            e = start + tl.arange(0, BV)
            values = tile(v + head * DV, first, stop, e, V_STRIDE, C)
            put(errors + head * DV, tl.dot(n, values, input_precision=PRECISION), first, stop, e, H * DV, C)
