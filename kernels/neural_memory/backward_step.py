"""The backward of one step of neural memory, in Triton; backward.py walks the steps.

The gradients of W, S and the anchor lie in global memory, like the state itself. A step passes over the hidden units
six times: the error, and the reads, as in the forward; then backward through the last layer's reads and update
(``last_layer``), the first layer's reads (``first_reads``), its update and the second-order terms up to the error
(``first_update``), and down along the keys' own pass (``keys_down``). What one pass leaves for another goes through a
workspace: ``small`` holds operands of products in DT, ``wide`` the rest in float32.

Each pass takes scalars alone and leaves nothing in registers for the next.

A tile that is needed transposed is loaded so from there: the transpose of a product's result is never an operand of
another. The last layer's matrices are taken as [D, BF], transposed, throughout.
"""

import triton
import triton.language as tl

from .forward import inner_pass, outer_pass
from .tiles import (
    gelu,
    gelu_curve,
    gelu_slope,
    load_gates,
    load_norm,
    normalised,
    product,
    project,
    step_offsets,
    token_columns,
    token_rows,
)


@triton.jit
def square(start, C: tl.constexpr):
    """Pointers to a [C, C] tile, and to its transpose."""
    i = tl.arange(0, C)
    return start + i[:, None] * C + i[None, :], start + i[None, :] * C + i[:, None]


@triton.jit
def tall(start, C: tl.constexpr, D: tl.constexpr):
    """Pointers to a [C, D] tile, and to its transpose."""
    i = tl.arange(0, C)
    d = tl.arange(0, D)
    return start + i[:, None] * D + d[None, :], start + i[None, :] * D + d[:, None]


@triton.jit
def small_parts(small, C: tl.constexpr, D: tl.constexpr):
    """In DT: Δ of the last layer, its reads' gradient, its output's gradient [C, D]; Δ of the first layer [C, F]."""
    return small, small + C * D, small + 2 * C * D, small + 3 * C * D


@triton.jit
def wide_parts(wide, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """In float32: h h_Kᵀ of the last layer, the gradient of the first's scores [C, C]; ẑ, the error, the gradient of Δ
    and that of K [C, D]; the keys' pre-activations, the queries' and then their gradient, and that of the keys'
    [C, F]."""
    tiles = wide + 2 * C * C
    hidden = tiles + 4 * C * D
    return (wide, wide + C * C, tiles, tiles + C * D, tiles + 2 * C * D, tiles + 3 * C * D, hidden, hidden + C * F,
            hidden + 2 * C * F)  # fmt: skip


@triton.jit
def last_layer(q_ptr, k_ptr, d_o_ptr, d_q_ptr, j, begin, length, place, h, weights, grads, write, vectors, ends,
               d_vectors, d_ends, small, wide, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
               BF: tl.constexpr, DEEP: tl.constexpr, RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Reads and update of the last layer: carries the gradients of its W and S back, in place; those of Δ, and of both
    hidden vectors, to the workspace (a linear memory's query is its hidden vector). Writes those of
    the gates."""
    SIZE: tl.constexpr = D * F
    tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
    retain, carry, end_write, end_momentum, end_retain, end_carry, end_inertia = load_gates(vectors, ends, C)
    deltas, reads, _, _ = small_parts(small, C, D)
    products, _, _, _, d_deltas, _, befores, pres, d_befores = wide_parts(wide, C, D, F)
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    delta = tl.load(tall(deltas, C, D)[0])
    d_read = tl.load(tall(reads, C, D)[0])
    d_read_t = tl.load(tall(reads, C, D)[1])
    written = tl.load(square(write, C)[0]).to(tl.float32)
    written_t = tl.load(square(write, C)[1]).to(tl.float32)
    flow = (-product(d_read, tl.load(tall(deltas, C, D)[1]), DT, PRECISION) * written).to(DT)
    flow_t = (-product(delta, d_read_t, DT, PRECISION) * written_t).to(DT)
    d_delta = -product(tl.load(square(products, C)[1]) * written_t, d_read, DT, PRECISION)
    # Sums over the hidden units are taken once, after the loop.
    d_retain = tl.zeros([C, BF], tl.float32)
    d_carry = tl.zeros([C, BF], tl.float32)
    d_end_write = tl.zeros([C, BF], tl.float32)
    d_end_momentum = tl.zeros([C, BF], tl.float32)
    d_end_retain = tl.zeros([D], tl.float32)
    d_end_carry = tl.zeros([D], tl.float32)
    d_end_inertia = tl.zeros([D], tl.float32)
    for start in tl.range(0, F, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at = f[None, :] * D + d[:, None]
        at_hidden = i[:, None] * F + f[None, :]
        if DEEP:
            hidden = gelu(tl.load(befores + at_hidden))[0]
            pre = tl.load(pres + at_hidden)
            read, sigma = gelu(pre)
        else:
            hidden = token_rows(k_ptr, tok, valid, f).to(tl.float32)
            read = token_rows(q_ptr, tok, valid, f).to(tl.float32)
        weight = tl.load(weights + at)
        to_weight = product(d_read, weight, DT, PRECISION)
        d_retain += read * to_weight
        d_read_hidden = to_weight * retain[:, None] + product(flow, hidden, DT, PRECISION)
        g_weight = tl.load(grads + at)
        by_g = product(delta, g_weight, DT, PRECISION)
        d_end_write -= hidden * by_g
        d_hidden = product(flow_t, read, DT, PRECISION) - by_g * end_write[:, None]
        d_delta -= product(hidden * end_write[:, None], tl.trans(g_weight.to(DT)), DT, PRECISION)
        d_end_retain += tl.sum(weight * g_weight, 1)
        before = g_weight * end_retain + product(d_read_t, read * retain[:, None], DT, PRECISION)
        if MOMENTUM:
            moment = tl.load(weights + SIZE + at)
            to_moment = product(d_read, moment, DT, PRECISION)
            d_carry += read * to_moment
            d_read_hidden += to_moment * carry[:, None]
            g_moment = tl.load(grads + SIZE + at)
            by_g = product(delta, g_moment, DT, PRECISION)
            d_end_momentum -= hidden * by_g
            d_hidden -= by_g * end_momentum[:, None]
            d_delta -= product(hidden * end_momentum[:, None], tl.trans(g_moment.to(DT)), DT, PRECISION)
            d_end_carry += tl.sum(moment * g_weight, 1)
            d_end_inertia += tl.sum(moment * g_moment, 1)
            inert = g_weight * end_carry + g_moment * end_inertia
            inert += product(d_read_t, read * carry[:, None], DT, PRECISION)
            tl.store(grads + SIZE + at, inert)
        tl.store(grads + at, before)
        tl.store(d_befores + at_hidden, d_hidden)
        if DEEP:
            tl.store(pres + at_hidden, d_read_hidden * gelu_slope(pre, sigma))
        else:
            if RESIDUAL:
                d_read_hidden += token_rows(d_o_ptr, tok, valid, f).to(tl.float32)
            tl.store(d_q_ptr + tok[:, None] + f[None, :], d_read_hidden.to(DT), mask=valid[:, None])
    tl.store(tall(d_deltas, C, D)[0], d_delta)
    tl.store(d_vectors + i, tl.sum(d_retain, 1))
    tl.store(d_vectors + C + i, tl.sum(d_carry, 1))
    tl.store(d_vectors + 2 * C + i, tl.sum(d_end_write, 1))
    tl.store(d_vectors + 3 * C + i, tl.sum(d_end_momentum, 1))
    tl.store(d_ends, tl.sum(d_end_retain))
    tl.store(d_ends + 1, tl.sum(d_end_carry))
    tl.store(d_ends + 2, tl.sum(d_end_inertia))


@triton.jit
def first_reads(q_ptr, k_ptr, d_o_ptr, d_q_ptr, j, begin, length, place, h, weights, write, vectors, ends, d_vectors,
                small, wide, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
                RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Reads of the first layer: writes the gradient of Q, and that of its scores to the workspace; adds to those of
    A and f."""
    SIZE: tl.constexpr = D * F
    tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
    retain, carry, _, _, _, _, _ = load_gates(vectors, ends, C)
    _, _, _, delta1s = small_parts(small, C, D)
    _, scores, _, _, _, _, _, d_pres, _ = wide_parts(wide, C, D, F)
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    q = token_rows(q_ptr, tok, valid, d)
    d_q = tl.zeros([C, D], tl.float32)
    d_scores = tl.zeros([C, C], tl.float32)
    d_retain = tl.zeros([C, BF], tl.float32)
    d_carry = tl.zeros([C, BF], tl.float32)
    for start in tl.range(0, F, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at = d[:, None] * F + f[None, :]
        d_pre = tl.load(d_pres + i[:, None] * F + f[None, :])
        d_scores -= product(d_pre, tl.load(delta1s + i[None, :] * F + f[:, None]), DT, PRECISION)
        weight = tl.load(weights + at).to(DT)
        d_retain += d_pre * product(q, weight, DT, PRECISION)
        d_q += product(d_pre * retain[:, None], tl.trans(weight), DT, PRECISION)
        if MOMENTUM:
            moment = tl.load(weights + SIZE + at).to(DT)
            d_carry += d_pre * product(q, moment, DT, PRECISION)
            d_q += product(d_pre * carry[:, None], tl.trans(moment), DT, PRECISION)
    tl.store(square(scores, C)[0], d_scores)
    d_products = d_scores * tl.load(square(write, C)[0]).to(tl.float32)
    d_q += product(d_products, token_rows(k_ptr, tok, valid, d), DT, PRECISION)
    if RESIDUAL:
        d_q += token_rows(d_o_ptr, tok, valid, d).to(tl.float32)
    tl.store(d_q_ptr + tok[:, None] + d[None, :], d_q.to(DT), mask=valid[:, None])
    tl.store(d_vectors + i, tl.load(d_vectors + i) + tl.sum(d_retain, 1))
    tl.store(d_vectors + C + i, tl.load(d_vectors + C + i) + tl.sum(d_carry, 1))


@triton.jit
def first_update(q_ptr, k_ptr, j, begin, length, place, h, u2, weights, grads, grads2, write, vectors, ends,
                 d_vectors, d_ends, small, wide, own, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
                 C: tl.constexpr, BF: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Update of the first layer, with what its reads add to the gradients of W and S, and the second-order terms: Δ1 =
    (Δ2 U2ᵀ) ⊙ gelu′ depends on the anchor. Adds to the gradients of Δ2 and of the keys' pre-activations in the
    workspace, and to that of U2 (the weights', where the anchor is those: ``own``); that of K so far goes there too.
    Writes those of
    the gates."""
    SIZE: tl.constexpr = D * F
    ANCHOR: tl.constexpr = (2 if MOMENTUM else 1) * SIZE
    tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
    retain, carry, end_write, end_momentum, end_retain, end_carry, end_inertia = load_gates(vectors, ends, C)
    deltas, _, _, _ = small_parts(small, C, D)
    _, scores, _, _, d_deltas, d_keys, befores, d_pres, d_befores = wide_parts(wide, C, D, F)
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    k = token_rows(k_ptr, tok, valid, d)
    qt = token_columns(q_ptr, tok, valid, d)
    delta = tl.load(tall(deltas, C, D)[0])
    delta_t = tl.load(tall(deltas, C, D)[1])
    written_t = tl.load(square(write, C)[1]).to(tl.float32)
    scores_t = (product(k, qt, DT, PRECISION) * written_t).to(DT)
    d_products_t = tl.load(square(scores, C)[1]) * written_t
    d_k = product(d_products_t, token_rows(q_ptr, tok, valid, d), DT, PRECISION)
    d_delta = tl.load(tall(d_deltas, C, D)[0])
    d_end_write = tl.zeros([C, BF], tl.float32)
    d_end_momentum = tl.zeros([C, BF], tl.float32)
    d_end_retain = tl.zeros([D], tl.float32)
    d_end_carry = tl.zeros([D], tl.float32)
    d_end_inertia = tl.zeros([D], tl.float32)
    for start in tl.range(0, F, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at = d[:, None] * F + f[None, :]
        at2 = f[None, :] * D + d[:, None]
        at_hidden = i[:, None] * F + f[None, :]
        before = tl.load(befores + at_hidden)
        sigma = gelu(before)[1]
        slope = gelu_slope(before, sigma)
        last = tl.load(u2 + at2).to(DT)
        back = product(delta, last, DT, PRECISION)
        delta1 = back * slope
        d_pre = tl.load(d_pres + at_hidden)
        weight = tl.load(weights + at)
        g_weight = tl.load(grads + at)
        by_g = product(k, g_weight, DT, PRECISION)
        d_end_write -= delta1 * by_g
        d_delta1 = -product(scores_t, d_pre, DT, PRECISION) - by_g * end_write[:, None]
        d_k -= product(delta1 * end_write[:, None], tl.trans(g_weight.to(DT)), DT, PRECISION)
        d_end_retain += tl.sum(weight * g_weight, 1)
        before_step = g_weight * end_retain + product(qt, d_pre * retain[:, None], DT, PRECISION)
        if MOMENTUM:
            moment = tl.load(weights + SIZE + at)
            g_moment = tl.load(grads + SIZE + at)
            by_g = product(k, g_moment, DT, PRECISION)
            d_end_momentum -= delta1 * by_g
            d_delta1 -= by_g * end_momentum[:, None]
            d_k -= product(delta1 * end_momentum[:, None], tl.trans(g_moment.to(DT)), DT, PRECISION)
            d_end_carry += tl.sum(moment * g_weight, 1)
            d_end_inertia += tl.sum(moment * g_moment, 1)
            inert = g_weight * end_carry + g_moment * end_inertia
            tl.store(grads + SIZE + at, inert + product(qt, d_pre * carry[:, None], DT, PRECISION))
        tl.store(grads + at, before_step)
        d_back = d_delta1 * slope
        d_delta += product(d_back, tl.trans(last), DT, PRECISION)
        d_before = d_delta1 * back * gelu_curve(before, sigma) + tl.load(d_befores + at_hidden) * slope
        tl.store(d_befores + at_hidden, d_before)
        g_anchor = grads2 + tl.where(own, 0, ANCHOR) + at2
        tl.store(g_anchor, tl.load(g_anchor) + product(delta_t, d_back, DT, PRECISION))
    tl.store(tall(d_deltas, C, D)[0], d_delta)
    tl.store(tall(d_keys, C, D)[0], d_k)
    tl.store(d_vectors + 2 * C + i, tl.load(d_vectors + 2 * C + i) + tl.sum(d_end_write, 1))
    tl.store(d_vectors + 3 * C + i, tl.load(d_vectors + 3 * C + i) + tl.sum(d_end_momentum, 1))
    tl.store(d_ends, tl.load(d_ends) + tl.sum(d_end_retain))
    tl.store(d_ends + 1, tl.load(d_ends + 1) + tl.sum(d_end_carry))
    tl.store(d_ends + 2, tl.load(d_ends + 2) + tl.sum(d_end_inertia))


@triton.jit
def keys_down(k_ptr, d_k_ptr, j, begin, length, place, h, u1, u2, grads1, grads2, small, wide, own, H: tl.constexpr,
              D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, DEEP: tl.constexpr,
              LAST: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Down along the keys' own pass, from the gradient of the last layer's output (LAST: there is one): writes
    that of K, and adds those of the anchor, which are the weights' where the anchor is those (``own``)."""
    ANCHOR: tl.constexpr = (2 if MOMENTUM else 1) * D * F
    tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
    g1 = grads1 + tl.where(own, 0, ANCHOR)
    g2 = grads2 + tl.where(own, 0, ANCHOR)
    _, _, lasts, _ = small_parts(small, C, D)
    _, _, _, _, _, d_keys, befores, _, d_befores = wide_parts(wide, C, D, F)
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    kt = token_columns(k_ptr, tok, valid, d)
    d_last = tl.load(tall(lasts, C, D)[0])
    d_last_t = tl.load(tall(lasts, C, D)[1])
    d_k = tl.load(tall(d_keys, C, D)[0])
    for start in tl.range(0, F, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at = d[:, None] * F + f[None, :]
        at2 = f[None, :] * D + d[:, None]
        at_hidden = i[:, None] * F + f[None, :]
        d_before = tl.load(d_befores + at_hidden)
        if DEEP:
            before = tl.load(befores + at_hidden)
            hidden, sigma = gelu(before)
        else:
            hidden = token_rows(k_ptr, tok, valid, f)
        if LAST:
            d_hidden = product(d_last, tl.load(u2 + at2), DT, PRECISION)
            if DEEP:
                d_hidden = d_hidden * gelu_slope(before, sigma)
            d_before += d_hidden
            tl.store(g2 + at2, tl.load(g2 + at2) + product(d_last_t, hidden, DT, PRECISION))
        if DEEP:
            d_k += product(d_before, tl.trans(tl.load(u1 + at).to(DT)), DT, PRECISION)
            tl.store(g1 + at, tl.load(g1 + at) + product(kt, d_before, DT, PRECISION))
        else:
            tl.store(d_befores + at_hidden, d_before)
    if not DEEP:
        tl.debug_barrier()
        d_k += tl.load(tall(d_befores, C, D)[0])
    tl.store(d_k_ptr + tok[:, None] + d[None, :], d_k.to(DT), mask=valid[:, None])


@triton.jit
def error_backward(d_delta, normed, rstd, error, scale, D: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr):
    """From the gradient of Δ of the last layer to those of the error, of the last layer's output, and of the norm."""
    if NORM:
        scaled = error * scale[None, :]
        delta = project(scaled, normed, D) * rstd[:, None]
        d_scaled = project(d_delta, normed, D) * rstd[:, None]
        along = (tl.sum(scaled * normed, 1) / D)[:, None]
        d_along = (tl.sum(d_delta * normed, 1) / D)[:, None]
        d_normed = -rstd[:, None] * (d_delta * along + scaled * d_along)
        d_rstd = -rstd * tl.sum(d_delta * delta, 1) / D
        d_error = d_scaled * scale[None, :]
        d_scale = tl.sum(d_scaled * error, 0)
        if not DOT:
            d_normed += d_error * scale[None, :]
            d_scale += tl.sum(d_error * normed, 0)
        d_last = project(d_normed, normed, D) * rstd[:, None] + normed * d_rstd[:, None]
        return d_error, d_last, d_scale
    else:
        return d_delta, d_delta, tl.zeros([D], tl.float32)


@triton.jit
def error_and_reads(q_ptr, k_ptr, v_ptr, d_o_ptr, j, begin, length, place, h, u1, u2, old1, old2, write, vectors,
                    ends, norm_ptr, d_norm, small, wide, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
                    C: tl.constexpr, BF: tl.constexpr, DEEP: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
                    DOT: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """The forward of a step, its tiles left in the workspace, and the gradient of the last layer's reads."""
    deltas, reads, _, delta1s = small_parts(small, C, D)
    products, _, units, errors, _, _, befores, pres, d_befores = wide_parts(wide, C, D, F)
    tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
    gates = load_gates(vectors, ends, C)
    d = tl.arange(0, D)
    scale = load_norm(norm_ptr, h, D, NORM)
    normed, rstd, error, delta = inner_pass(
        k_ptr, v_ptr, tok, valid, (u1, u2), scale, D, F, C, BF, DEEP, NORM, RESIDUAL, DOT, DT, PRECISION
    )
    tl.store(tall(deltas, C, D)[0], delta.to(DT))
    tl.store(tall(units, C, D)[0], normed)
    tl.store(tall(errors, C, D)[0], error)
    tl.store(d_befores + C * F + tl.arange(0, C), rstd)
    old = old1, old2
    read_products, out = outer_pass(
        q_ptr, k_ptr, tok, valid, delta, (u1, u2), old, old, old, square(write, C)[0], gates,
        (delta1s, befores, pres), D, F, C, BF, DEEP, MOMENTUM, True, False, False, DT, PRECISION,
    )  # fmt: skip
    tl.store(square(products, C)[0], read_products)
    d_out = token_rows(d_o_ptr, tok, valid, d).to(tl.float32)
    if NORM:
        out -= product(read_products * tl.load(square(write, C)[0]).to(tl.float32), delta, DT, PRECISION)
        read_normed, read_rstd = normalised(out, D)
        tl.store(d_norm + d, tl.load(d_norm + d) + tl.sum(d_out * read_normed, 0))
        d_out = project(d_out * scale[None, :], read_normed, D) * read_rstd[:, None]
    tl.store(tall(reads, C, D)[0], d_out.to(DT))


@triton.jit
def error_down(q_ptr, k_ptr, d_v_ptr, j, begin, length, place, h, d_write, norm_ptr, d_norm, small, wide,
               H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, DEEP: tl.constexpr,
               NORM: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr, DT: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """From the gradient of Δ of the last layer to those of V, of the last layer's output and of the norm, and to what
    the error adds to that of K; and the gradient of Λ."""
    deltas, reads, lasts, _ = small_parts(small, C, D)
    products, scores, units, errors, d_deltas, d_keys, _, _, d_befores = wide_parts(wide, C, D, F)
    tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
    d = tl.arange(0, D)
    rstd = tl.load(d_befores + C * F + tl.arange(0, C))
    d_error, d_last, d_scale = error_backward(
        tl.load(tall(d_deltas, C, D)[0]), tl.load(tall(units, C, D)[0]), rstd, tl.load(tall(errors, C, D)[0]),
        load_norm(norm_ptr, h, D, NORM), D, NORM, DOT,
    )  # fmt: skip
    if NORM:
        tl.store(d_norm + d, tl.load(d_norm + d) + d_scale)
    tl.store(tall(lasts, C, D)[0], d_last.to(DT))
    tl.store(d_v_ptr + tok[:, None] + d[None, :], (-d_error).to(DT), mask=valid[:, None])
    d_k = tl.zeros([C, D], tl.float32)
    if DEEP:
        d_k = tl.load(tall(d_keys, C, D)[0])
    if RESIDUAL and not DOT:
        d_k += d_error
    tl.store(tall(d_keys, C, D)[0], d_k)
    d_written = -product(tl.load(tall(reads, C, D)[0]), tl.load(tall(deltas, C, D)[1]), DT, PRECISION)
    d_written = d_written * tl.load(square(products, C)[0])
    if DEEP:
        q = token_rows(q_ptr, tok, valid, d)
        kt = token_columns(k_ptr, tok, valid, d)
        d_written += tl.load(square(scores, C)[0]) * product(q, kt, DT, PRECISION)
    tl.store(square(d_write, C)[0], d_written.to(d_write.dtype.element_ty))


@triton.jit
def replay(q_ptr, k_ptr, v_ptr, j, begin, length, place, h, u1, u2, old1, old2, new1, new2, write, vectors, ends,
           norm_ptr, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
           DEEP: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr, MOMENTUM: tl.constexpr,
           DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The state after a step, without its reads."""
    tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
    anchor, old, new = (u1, u2), (old1, old2), (new1, new2)
    _, _, _, delta = inner_pass(
        k_ptr, v_ptr, tok, valid, anchor, load_norm(norm_ptr, h, D, NORM), D, F, C, BF, DEEP, NORM, RESIDUAL, DOT, DT,
        PRECISION,
    )  # fmt: skip
    outer_pass(
        q_ptr, k_ptr, tok, valid, delta, anchor, old, new, new, square(write, C)[0], load_gates(vectors, ends, C),
        anchor, D, F, C, BF, DEEP, MOMENTUM, False, True, False, DT, PRECISION,
    )  # fmt: skip


@triton.jit
def step_backward(q_ptr, k_ptr, v_ptr, d_o_ptr, d_q_ptr, d_k_ptr, d_v_ptr, j, begin, length, place, h, u1, u2, old1,
                  old2, grads1, grads2, write, d_write, vectors, ends, d_vectors, d_ends, norm_ptr, d_norm, small,
                  wide, own, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
                  DEEP: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr,
                  MOMENTUM: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One step: writes the gradients of its tokens and of the gates' coefficients, carries those of the state back in
    place, adds that of the norm."""
    error_and_reads(
        q_ptr, k_ptr, v_ptr, d_o_ptr, j, begin, length, place, h, u1, u2, old1, old2, write, vectors, ends, norm_ptr,
        d_norm, small, wide, H, D, F, C, BF, DEEP, NORM, RESIDUAL, DOT, MOMENTUM, DT, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()
    last_layer(
        q_ptr, k_ptr, d_o_ptr, d_q_ptr, j, begin, length, place, h, old2, grads2, write, vectors, ends, d_vectors,
        d_ends, small, wide, H, D, F, C, BF, DEEP, RESIDUAL, MOMENTUM, DT, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()
    if DEEP:
        first_reads(
            q_ptr, k_ptr, d_o_ptr, d_q_ptr, j, begin, length, place, h, old1, write, vectors, ends, d_vectors, small,
            wide, H, D, F, C, BF, RESIDUAL, MOMENTUM, DT, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        first_update(
            q_ptr, k_ptr, j, begin, length, place, h, u2, old1, grads1, grads2, write, vectors, ends, d_vectors,
            d_ends, small, wide, own, H, D, F, C, BF, MOMENTUM, DT, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
    error_down(
        q_ptr, k_ptr, d_v_ptr, j, begin, length, place, h, d_write, norm_ptr, d_norm, small, wide, H, D, F, C, DEEP,
        NORM, RESIDUAL, DOT, DT, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()
    keys_down(
        k_ptr, d_k_ptr, j, begin, length, place, h, u1, u2, grads1, grads2, small, wide, own, H, D, F, C, BF, DEEP,
        NORM or not DOT, MOMENTUM, DT, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()
