"""The passes that carry the gradients of neural memory's state back over one step; ``backward_carry.py`` calls them.

The gradients of W, S and the anchor lie in global memory, like the state itself; what the reads' backward left in the
workspace is added on the way. The hidden units are passed over for the last layer's update (``last_update``), the first
layer's (``first_update``), the second-order terms up to the error (``second_order``), and, after the error
(``error_down``), down along the keys' own pass (``keys_down``).

Each pass takes scalars alone and leaves nothing in registers for the next. The last layer's matrices are taken as
[D, BF], transposed.
"""

import triton
import triton.language as tl

from .biases import error_of, residual_backward
from .hidden import hidden_backward, hidden_curve, hidden_of, hidden_slopes, silu, silu_slope
from .logs import take_shift, through_logs, weights_at
from .orthogonal import APART, moment_product
from .parts import moments_by_parts
from .retentions import BY_ABOVE_KEYS, BY_BACKS, BY_ERROR, BY_KEYS, scaled
from .tiles import (
    above_parts,
    hidden_at,
    hidden_parts,
    load_gates,
    load_norm,
    pair_at,
    product,
    project,
    small_parts,
    tall,
    token_columns,
    token_rows,
    wide_parts,
)


@triton.jit
def carried(weights, grads, at, end_retain, end_carry, end_inertia, from_weight, from_moment, AXIS: tl.constexpr,
            SIZE: tl.constexpr, MOMENTUM: tl.constexpr):  # fmt: skip
    """A block of the gradients of W and S before a step, from those after it and those of the reads, in place; and what
    it adds to the gradients of A_c, f_c and E_c, summed along the axis in which the block is contiguous."""
    weight = tl.load(weights + at)
    g_weight = tl.load(grads + at)
    tl.store(grads + at, g_weight * end_retain + from_weight)
    d_retain = tl.sum(weight * g_weight, AXIS)
    d_carry = d_retain * 0.0
    d_inertia = d_retain * 0.0
    if MOMENTUM:
        moment = tl.load(weights + SIZE + at)
        g_moment = tl.load(grads + SIZE + at)
        if MOMENTUM == APART:
            tl.store(grads + SIZE + at, g_moment * end_inertia)
        else:
            tl.store(grads + SIZE + at, g_weight * end_carry + g_moment * end_inertia + from_moment)
            d_carry = tl.sum(moment * g_weight, AXIS)
        d_inertia = tl.sum(moment * g_moment, AXIS)
    return d_retain, d_carry, d_inertia


@triton.jit
def last_update(q_ptr, k_ptr, tok, valid, weights, grads, vectors, ends, d_vectors, d_ends, small, wide, zero,
                D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr,
                MOMENTUM: tl.constexpr, PARTS: tl.constexpr, SUM: tl.constexpr, BACK: tl.constexpr,
                CARRY: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Update of the last layer. SUM: adds to the gradient of Δ. BACK: adds to that of the hidden keys, writes those of
    Λ_c and P_c. CARRY: carries those of its W and S back, with what its reads add, and writes those of A_c, f_c and
    E_c; comes after the others, which want the gradients after the step. PARTS: muon's products with S's gradient go by
    parts of Δ."""
    SIZE: tl.constexpr = D * F
    retain, carry, end_write, end_momentum, end_retain, end_carry, end_inertia = load_gates(vectors, ends, C)
    deltas, reads, _, _, _, _, _ = small_parts(small, C, D)
    _, _, hiddens, _, _, d_hiddens = hidden_parts(small, C, D, F)
    _, _, _, d_deltas, _, befores, _, _ = wide_parts(wide, C, D, F)
    _, _, _, aboves, _ = above_parts(small, wide, C, D, F)
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    delta = tl.load(tall(deltas, C, D)[0])
    d_read_t = tl.load(tall(reads, C, D)[1])
    if SUM:
        d_delta = tl.load(tall(d_deltas, C, D)[0])
    d_write = tl.zeros([C], tl.float32)
    d_momentum = tl.zeros([C], tl.float32)
    d_retain = tl.zeros([BF], tl.float32)
    d_carry = tl.zeros([BF], tl.float32)
    d_inertia = tl.zeros([BF], tl.float32)
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at = f[None, :] * D + d[:, None]
        at_hidden = i[:, None] * F + f[None, :]
        if LAYERS > 1:
            hidden = hidden_at(befores, aboves, at_hidden, LAYERS)
        else:
            hidden = token_rows(k_ptr, tok, valid, f).to(tl.float32)
        g_weight = tl.load(grads + at).to(DT)
        g_moment = g_weight
        if SUM and MOMENTUM != APART:
            d_delta -= product(hidden * end_write[:, None], tl.trans(g_weight), DT, PRECISION)
        if MOMENTUM:
            g_moment = tl.load(grads + SIZE + at)
            if MOMENTUM != APART:
                g_moment = g_moment.to(DT)
            if SUM:
                d_delta -= moment_product(hidden * end_momentum[:, None], tl.trans(g_moment), MOMENTUM, DT, PRECISION)
        if BACK:
            if MOMENTUM == APART:
                d_hidden = tl.load(d_hiddens + at_hidden).to(tl.float32)
            else:
                by_g = product(delta, g_weight, DT, PRECISION)
                d_write -= tl.sum(hidden * by_g, 1)
                d_hidden = tl.load(d_hiddens + at_hidden) - by_g * end_write[:, None]
            if MOMENTUM:
                if PARTS:
                    by_g = moments_by_parts(deltas, i * D, i >= 0, grads + SIZE, f, zero, 1, D, C, BF, PRECISION)
                else:
                    by_g = moment_product(delta, g_moment, MOMENTUM, DT, PRECISION)
                d_momentum -= tl.sum(hidden * by_g, 1)
                d_hidden -= by_g * end_momentum[:, None]
            tl.store(d_hiddens + at_hidden, d_hidden.to(DT))
        if CARRY:
            if LAYERS > 1:
                read = tl.load(hiddens + at_hidden).to(tl.float32)
            else:
                read = token_rows(q_ptr, tok, valid, f).to(tl.float32)
            from_weight = product(d_read_t, read * retain[:, None], DT, PRECISION)
            from_moment = from_weight
            if MOMENTUM and MOMENTUM != APART:
                from_moment = product(d_read_t, read * carry[:, None], DT, PRECISION)
            more = carried(
                weights, grads, at, end_retain, end_carry, end_inertia, from_weight, from_moment, 0, SIZE, MOMENTUM
            )
            d_retain += more[0]
            d_carry += more[1]
            d_inertia += more[2]
    if SUM:
        tl.store(tall(d_deltas, C, D)[0], d_delta)
    if BACK:
        tl.store(d_vectors + 2 * C + i, d_write)
        tl.store(d_vectors + 3 * C + i, d_momentum)
    if CARRY:
        tl.store(d_ends, tl.sum(d_retain))
        tl.store(d_ends + 1, tl.sum(d_carry))
        tl.store(d_ends + 2, tl.sum(d_inertia))


@triton.jit
def first_update(q_ptr, k_ptr, tok, valid, weights, grads, vectors, ends, d_vectors, d_ends, small, wide, zero,
                 D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, ABOVE: tl.constexpr,
                 MOMENTUM: tl.constexpr, PARTS: tl.constexpr, SUM: tl.constexpr, BACK: tl.constexpr,
                 CARRY: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Update of the first layer, or of W3 (ABOVE), as :func:`last_update`; adds to the gradients of K (SUM) and of its
    Δ (BACK)."""
    SIZE: tl.constexpr = D * F
    retain, carry, end_write, end_momentum, end_retain, end_carry, end_inertia = load_gates(vectors, ends, C)
    if ABOVE:
        delta1s, d_pres, d_delta1s, _, _ = above_parts(small, wide, C, D, F)
    else:
        delta1s, _, _, d_pres, d_delta1s, _ = hidden_parts(small, C, D, F)
    _, _, _, _, d_keys, _, _, _ = wide_parts(wide, C, D, F)
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    k = token_rows(k_ptr, tok, valid, d)
    qt = token_columns(q_ptr, tok, valid, d)
    if SUM:
        d_k = tl.load(tall(d_keys, C, D)[0])
    d_write = tl.zeros([C], tl.float32)
    d_momentum = tl.zeros([C], tl.float32)
    d_retain = tl.zeros([D], tl.float32)
    d_carry = tl.zeros([D], tl.float32)
    d_inertia = tl.zeros([D], tl.float32)
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at = d[:, None] * F + f[None, :]
        at_hidden = i[:, None] * F + f[None, :]
        delta1 = tl.load(delta1s + at_hidden).to(tl.float32)
        g_weight = tl.load(grads + at).to(DT)
        g_moment = g_weight
        if SUM and MOMENTUM != APART:
            d_k -= product(delta1 * end_write[:, None], tl.trans(g_weight), DT, PRECISION)
        if MOMENTUM:
            g_moment = tl.load(grads + SIZE + at)
            if MOMENTUM != APART:
                g_moment = g_moment.to(DT)
            if SUM:
                d_k -= moment_product(delta1 * end_momentum[:, None], tl.trans(g_moment), MOMENTUM, DT, PRECISION)
        if BACK:
            if MOMENTUM == APART:
                d_delta1 = tl.load(d_delta1s + at_hidden).to(tl.float32)
            else:
                by_g = product(k, g_weight, DT, PRECISION)
                d_write -= tl.sum(delta1 * by_g, 1)
                d_delta1 = tl.load(d_delta1s + at_hidden) - by_g * end_write[:, None]
            if MOMENTUM:
                if PARTS:
                    by_g = moments_by_parts(k_ptr, tok, valid, grads + SIZE, f, zero, F, D, C, BF, PRECISION)
                else:
                    by_g = moment_product(k, g_moment, MOMENTUM, DT, PRECISION)
                d_momentum -= tl.sum(delta1 * by_g, 1)
                d_delta1 -= by_g * end_momentum[:, None]
            tl.store(d_delta1s + at_hidden, d_delta1.to(DT))
        if CARRY:
            d_pre = tl.load(d_pres + at_hidden).to(tl.float32)
            from_weight = product(qt, d_pre * retain[:, None], DT, PRECISION)
            from_moment = from_weight
            if MOMENTUM and MOMENTUM != APART:
                from_moment = product(qt, d_pre * carry[:, None], DT, PRECISION)
            more = carried(
                weights, grads, at, end_retain, end_carry, end_inertia, from_weight, from_moment, 1, SIZE, MOMENTUM
            )
            d_retain += more[0]
            d_carry += more[1]
            d_inertia += more[2]
    if SUM:
        tl.store(tall(d_keys, C, D)[0], d_k)
    if BACK:
        tl.store(d_vectors + 2 * C + i, tl.load(d_vectors + 2 * C + i) + d_write)
        tl.store(d_vectors + 3 * C + i, tl.load(d_vectors + 3 * C + i) + d_momentum)
    if CARRY:
        tl.store(d_ends, tl.load(d_ends) + tl.sum(d_retain))
        tl.store(d_ends + 1, tl.load(d_ends + 1) + tl.sum(d_carry))
        tl.store(d_ends + 2, tl.load(d_ends + 2) + tl.sum(d_inertia))


@triton.jit
def second_order(u2, shift, kept, small, wide, zero, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
                 BF: tl.constexpr, LAYERS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Δ of the first matrices from B = Δ2 U2ᵀ: adds to the gradient of Δ2; leaves those of B and of the keys'
    pre-activations.
    ``kept``, here and below: where the factors of lq lie, or None; B's gradient is left times the last layer's.
    ``shift``, ``shifts``: of kl, or None each."""
    _, backs, _, _, d_delta1s, d_hiddens = hidden_parts(small, C, D, F)
    _, _, _, d_deltas, _, befores, _, _ = wide_parts(wide, C, D, F)
    _, _, d_delta3s, aboves, _ = above_parts(small, wide, C, D, F)
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    d_delta = tl.load(tall(d_deltas, C, D)[0])
    factor = None
    if kept is not None:
        factor = tl.load(kept)
        d_factor = tl.zeros([C], tl.float32)
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at_hidden = i[:, None] * F + f[None, :]
        before, above = pair_at(befores, aboves, at_hidden, LAYERS)
        slope, slope_above = hidden_slopes(before, above, LAYERS)
        d_delta1 = tl.load(d_delta1s + at_hidden).to(tl.float32)
        d_back = d_delta1 * slope
        if LAYERS == 3:
            d_delta3 = tl.load(d_delta3s + at_hidden).to(tl.float32)
            d_back += d_delta3 * slope_above
        if factor is not None:
            d_factor += tl.sum(d_back * tl.load(backs + at_hidden).to(tl.float32), 1)
        d_back = scaled(d_back, factor).to(DT)
        tl.store(d_delta1s + at_hidden, d_back)
        d_before = tl.load(d_hiddens + at_hidden) * slope
        d_before += d_delta1 * tl.load(backs + at_hidden) * hidden_curve(before, above, LAYERS)
        if LAYERS == 3:
            mixed = tl.load(backs + at_hidden) * silu_slope(before, silu(before)[1])  # B ∂²h/∂before ∂above
            d_before += d_delta3 * mixed
            d_above = tl.load(d_hiddens + at_hidden) * slope_above + d_delta1 * mixed
            tl.store(d_delta3s + at_hidden, d_above.to(DT))
        tl.store(d_hiddens + at_hidden, d_before.to(DT))
        weight = weights_at(u2 + f[:, None] * D + d[None, :], shift, d[None, :], zero)
        d_delta += product(d_back, weight, DT, PRECISION)
    tl.store(tall(d_deltas, C, D)[0], d_delta)
    if factor is not None:
        tl.store(kept + BY_BACKS, tl.sum(d_factor))


@triton.jit
def error_backward(d_delta, normed, rstd, residual, scale, threshold, D: tl.constexpr, NORM: tl.constexpr,
                   BIAS: tl.constexpr):  # fmt: skip
    """From the gradient of Δ of the last layer to those of the residual, of the last layer's output, of the norm, and
    of huber's threshold."""
    if NORM:
        error = error_of(residual, threshold, BIAS)
        scaled = error * scale[None, :]
        delta = project(scaled, normed, D) * rstd[:, None]
        d_scaled = project(d_delta, normed, D) * rstd[:, None]
        along = (tl.sum(scaled * normed, 1) / D)[:, None]
        d_along = (tl.sum(d_delta * normed, 1) / D)[:, None]
        d_normed = -rstd[:, None] * (d_delta * along + scaled * d_along)
        d_rstd = -rstd * tl.sum(d_delta * delta, 1) / D
        d_error = d_scaled * scale[None, :]
        d_scale = tl.sum(d_scaled * error, 0)
        d_residual, d_threshold = residual_backward(d_error, residual, threshold, BIAS)
        if BIAS[0] != "dot":
            d_normed += d_residual * scale[None, :]
            d_scale += tl.sum(d_residual * normed, 0)
        d_last = project(d_normed, normed, D) * rstd[:, None] + normed * d_rstd[:, None]
        return d_residual, d_last, d_scale, d_threshold
    else:
        d_residual, d_threshold = residual_backward(d_delta, residual, threshold, BIAS)
        return d_residual, d_residual, tl.zeros([D], tl.float32), d_threshold


@triton.jit
def error_down(d_v_ptr, threshold_ptr, d_threshold_ptr, j, begin, length, place, h, norm_ptr, d_norm, kept, small,
               wide, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr,
               RESIDUAL: tl.constexpr, BIAS: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    """From the gradient of Δ of the last layer to those of V, of the last layer's output, of the norm and of huber's
    thresholds, and to what the error adds to that of K; 16 tokens at a time, for it takes many tiles at once."""
    _, _, lasts, _, _, _, _ = small_parts(small, C, D)
    _, units, residuals, d_deltas, d_keys, _, _, rstds = wide_parts(wide, C, D, F)
    d = tl.arange(0, D)
    scale = load_norm(norm_ptr, h, D, NORM)
    d_norms = tl.zeros([D], tl.float32)
    factor = None
    if kept is not None:
        factor = tl.load(kept)
        d_factor = tl.zeros([16], tl.float32)
    for start in tl.range(0, C, 16, disable_licm=True):
        i = start + tl.arange(0, 16)
        at = i[:, None] * D + d[None, :]
        thresholds = tl.zeros([16], tl.float32)
        if BIAS[0] == "huber":
            t = j * C + i - place
            gate = (begin + t).to(tl.int64) * H + h
            thresholds = tl.load(threshold_ptr + gate, mask=(t >= 0) & (t < length), other=0.0)
        d_residual, d_last, d_scale, d_threshold = error_backward(
            tl.load(d_deltas + at), tl.load(units + at), tl.load(rstds + i), tl.load(residuals + at), scale,
            thresholds[:, None], D, NORM, BIAS,
        )  # fmt: skip
        d_norms += d_scale
        if factor is not None:
            along = tl.sum(d_last * tl.load(units + at), 1)  # with the output: what of it is not ẑ has no gradient
            if NORM:
                along = along / tl.load(rstds + i)
            d_factor += along
        tl.store(lasts + at, scaled(d_last, factor).to(DT))
        t = j * C + i - place
        tok = ((begin + t).to(tl.int64) * H + h) * D
        valid = (t >= 0) & (t < length)
        tl.store(d_v_ptr + tok[:, None] + d[None, :], (-d_residual).to(DT), mask=valid[:, None])
        if BIAS[0] == "huber":
            tl.store(d_threshold_ptr + (tok // D)[:, None], d_threshold, mask=valid[:, None])
        if RESIDUAL and BIAS[0] != "dot":
            tl.store(d_keys + at, tl.load(d_keys + at) + d_residual)
    if NORM:
        tl.store(d_norm + d, d_norms)
    if factor is not None:
        tl.store(kept + BY_ERROR, tl.sum(d_factor))


@triton.jit
def keys_first(kt, d_k, d_before, before, factor, weights, shift, qt, d_pres, at_hidden, f, zero, grads, at,
               COLUMNS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Through a block of W1 or W3: the gradient of K with what it adds, and its share of the factor's, [C]; adds to the
    gradient of the anchor."""
    d_factor = d_before
    if factor is not None:
        d_factor = tl.sum(d_before * before, 1)
    d_before = scaled(d_before, factor)
    d_k += product(d_before, tl.trans(weights_at(weights + at, shift, f[None, :], zero).to(DT)), DT, PRECISION)
    d_weight = product(kt, d_before, DT, PRECISION)
    if shift is not None:
        d_offset = product(qt, tl.load(d_pres + at_hidden), DT, PRECISION)
        d_weight, taken = through_logs(weights + at, shift, f[None, :], d_weight, d_offset)
        take_shift(shift + COLUMNS + f, tl.sum(taken, 0))
    tl.store(grads + at, tl.load(grads + at) + d_weight)
    return d_k, d_factor


@triton.jit
def keys_down(q_ptr, k_ptr, d_k_ptr, tok, valid, row, anchor, shifts, grads, kept, small, wide, zero, D: tl.constexpr,
              F: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr,
              LAST: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Down along the keys' own pass, from the gradient of the last layer's output (LAST: there is one): writes that of
    K, and adds to those of the anchor, ``grads``; of both where W1, W2 and W3 begin. Of kl also what reads add by O.
    Of ROWS tokens, at ``tok``, from ``row`` of the step on."""
    COLUMNS: tl.constexpr = D + (LAYERS - 1) * F
    deltas, reads, lasts, _, _, _, _ = small_parts(small, C, D)
    _, _, hiddens, d_pres, d_backs, d_befores = hidden_parts(small, C, D, F)
    _, _, _, _, d_keys, befores, _, _ = wide_parts(wide, C, D, F)
    _, d_above_pres, d_aboves, aboves, _ = above_parts(small, wide, C, D, F)
    d = tl.arange(0, D)
    i = row + tl.arange(0, ROWS)
    kt = token_columns(k_ptr, tok, valid, d)
    d_last = tl.load(tall(lasts + row * D, ROWS, D)[0])
    d_last_t = tl.load(tall(lasts + row * D, ROWS, D)[1])
    delta_t = tl.load(tall(deltas + row * D, ROWS, D)[1])
    d_k = tl.load(tall(d_keys + row * D, ROWS, D)[0])
    qt = kt
    if shifts[1] is not None:
        qt = token_columns(q_ptr, tok, valid, d)
        d_read_t = tl.load(tall(reads + row * D, ROWS, D)[1])
        taken = tl.zeros([D], tl.float32)
    factor = None
    above_factor = None
    if LAYERS > 1 and kept is not None:
        factor = tl.load(kept + 2)
        d_factor = tl.zeros([ROWS], tl.float32)
        if LAYERS == 3:
            above_factor = tl.load(kept + 4)
            d_above_factor = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, F + zero, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at = d[:, None] * F + f[None, :]
        at2 = f[None, :] * D + d[:, None]
        at_hidden = i[:, None] * F + f[None, :]
        d_before = tl.load(d_befores + at_hidden).to(tl.float32)
        anchor2 = tl.zeros([D, BF], tl.float32)
        if LAYERS > 1:
            before, above = pair_at(befores, aboves, at_hidden, LAYERS)
            hidden = hidden_of(before, above, LAYERS)
            anchor2 += product(delta_t, tl.load(d_backs + at_hidden), DT, PRECISION)
        else:
            hidden = token_rows(k_ptr, tok, valid, f)
        if LAYERS == 3:
            d_above = tl.load(d_aboves + at_hidden).to(tl.float32)
        if LAST:
            d_hidden = product(d_last, weights_at(anchor[1] + at2, shifts[1], d[:, None], zero), DT, PRECISION)
            more_above = d_hidden
            if LAYERS > 1:
                d_hidden, more_above = hidden_backward(d_hidden, before, above, LAYERS)
            d_before += d_hidden
            if LAYERS == 3:
                d_above += more_above
            anchor2 += product(d_last_t, hidden, DT, PRECISION)
        if shifts[1] is not None:
            read = tl.load(hiddens + at_hidden) if LAYERS > 1 else token_rows(q_ptr, tok, valid, f)
            d_offset = product(d_read_t, read, DT, PRECISION)
            anchor2, more = through_logs(anchor[1] + at2, shifts[1], d[:, None], anchor2, d_offset)
            taken += tl.sum(more, 1)
        if LAYERS > 1 or LAST or shifts[1] is not None:
            tl.store(grads[1] + at2, tl.load(grads[1] + at2) + anchor2)
        if LAYERS > 1:
            d_k, more = keys_first(
                kt, d_k, d_before, before, factor, anchor[0], shifts[0], qt, d_pres, at_hidden, f, zero, grads[0], at,
                COLUMNS, DT, PRECISION,
            )  # fmt: skip
            if factor is not None:
                d_factor += more
            if LAYERS == 3:
                d_k, more = keys_first(
                    kt, d_k, d_above, above, above_factor, anchor[2], shifts[2], qt, d_above_pres, at_hidden, f, zero,
                    grads[2], at, COLUMNS, DT, PRECISION,
                )  # fmt: skip
                if factor is not None:
                    d_above_factor += more
        else:
            d_hidden = d_before + tl.load(d_keys + at_hidden)
            tl.store(d_k_ptr + tok[:, None] + f[None, :], d_hidden.to(DT), mask=valid[:, None])
    if LAYERS > 1:
        tl.store(d_k_ptr + tok[:, None] + d[None, :], d_k.to(DT), mask=valid[:, None])
    if shifts[1] is not None:
        take_shift(shifts[1] + COLUMNS + d, taken)
    if factor is not None:
        share = tl.sum(d_factor)
        if row > 0:
            share += tl.load(kept + BY_KEYS)
        tl.store(kept + BY_KEYS, share)
        if LAYERS == 3:
            share = tl.sum(d_above_factor)
            if row > 0:
                share += tl.load(kept + BY_ABOVE_KEYS)
            tl.store(kept + BY_ABOVE_KEYS, share)
