"""The backward of one step of neural memory, in Triton; backward.py walks the steps.

The gradients of W, S and the anchor lie in global memory, like the state itself. A step passes over the hidden units
four times: the error and the reads of the forward, then the reads, the update and the second-order terms up to the
error (``upper_backward``), then down along the keys' own pass (``lower_backward``).

A tile that is needed transposed goes through the workspace and is loaded so: the transpose of a product's result is
never an operand of another. Layer 2's matrices are taken as [D, BF], transposed, throughout.
"""

import triton
import triton.language as tl

from .forward import inner_pass, outer_pass
from .tiles import (
    gelu,
    gelu_curve,
    gelu_slope,
    normalised,
    product,
    project,
    token_columns,
    token_rows,
)


@triton.jit
def upper_backward(q_ptr, k_ptr, d_o_ptr, d_q_ptr, tok, valid, anchor, old, grads, write, gates, small, wide, own,
                   D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, DEEP: tl.constexpr,
                   RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """The backward of reads and update, and of δ1 = (δ2 U2ᵀ) ⊙ gelu′: from the gradients of the reads and of the state
    after the step to those of the state before it (in place), of Q, K, Δ2, h Kᵀ-scores and the gates.

    The gradient of the keys' pre-activations so far goes to ``wide``, to be completed by :func:`lower_backward`.
    """
    u1, u2 = anchor
    w1, s1, w2, s2 = old
    g_w1, g_s1, _, g_w2, g_s2, g_u2 = grads
    retain, carry, end_write, end_momentum, end_retain, end_carry, end_inertia = gates
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    rows = i[:, None] * D + d[None, :]
    cols = i[None, :] * D + d[:, None]
    q = token_rows(q_ptr, tok, valid, d)
    k = token_rows(k_ptr, tok, valid, d)
    qt = token_columns(q_ptr, tok, valid, d)
    delta = tl.load(small + rows)
    delta_t = tl.load(small + cols)
    d_read = tl.load(small + C * D + rows)
    d_read_t = tl.load(small + C * D + cols)
    square = i[:, None] * C + i[None, :]
    square_t = i[None, :] * C + i[:, None]
    written = tl.load(write + square).to(tl.float32)
    written_t = tl.load(write + square_t).to(tl.float32)
    d_delta = -product(tl.load(wide + square_t) * written_t, d_read, DT, PRECISION)
    flow = (-product(d_read, delta_t, DT, PRECISION) * written).to(DT)
    flow_t = (-product(delta, d_read_t, DT, PRECISION) * written_t).to(DT)
    scores = flow
    scores_t = flow
    if DEEP:
        kt = token_columns(k_ptr, tok, valid, d)
        scores = (product(q, kt, DT, PRECISION) * written).to(DT)
        scores_t = (product(k, qt, DT, PRECISION) * written_t).to(DT)
    d_q = tl.zeros([C, D], tl.float32)
    d_k = tl.zeros([C, D], tl.float32)
    d_scores = tl.zeros([C, C], tl.float32)
    d_retain = tl.zeros([C], tl.float32)
    d_carry = tl.zeros([C], tl.float32)
    d_end_write = tl.zeros([C], tl.float32)
    d_end_momentum = tl.zeros([C], tl.float32)
    d_end_retain = tl.zeros([D], tl.float32)
    d_end_carry = tl.zeros([D], tl.float32)
    d_end_inertia = tl.zeros([D], tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        at1 = d[:, None] * F + f[None, :]
        at2 = f[None, :] * D + d[:, None]
        at_hidden = i[:, None] * F + f[None, :]
        if DEEP:
            before = product(k, tl.load(u1 + at1), DT, PRECISION)
            hidden, sigma = gelu(before)
            slope = gelu_slope(before, sigma)
            last = tl.load(u2 + at2).to(DT)
            back = product(delta, last, DT, PRECISION)
            delta1 = back * slope
            weight1 = tl.load(w1 + at1)
            by_weight = product(q, weight1, DT, PRECISION)
            pre = by_weight * retain[:, None] - product(scores, delta1, DT, PRECISION)
            if MOMENTUM:
                moment1 = tl.load(s1 + at1)
                by_moment = product(q, moment1, DT, PRECISION)
                pre += by_moment * carry[:, None]
            read, sigma_q = gelu(pre)
        else:
            hidden = token_rows(k_ptr, tok, valid, f).to(tl.float32)
            read = token_rows(q_ptr, tok, valid, f).to(tl.float32)
        # The last layer's reads.
        weight2 = tl.load(w2 + at2)
        to_weight = product(d_read, weight2, DT, PRECISION)
        d_retain += tl.sum(read * to_weight, 1)
        d_hidden_q = to_weight * retain[:, None] + product(flow, hidden, DT, PRECISION)
        d_hidden = product(flow_t, read, DT, PRECISION)
        # The last layer's update, and the gradients of its state before the step.
        g_weight = tl.load(g_w2 + at2)
        by_g = product(delta, g_weight, DT, PRECISION)
        d_hidden -= by_g * end_write[:, None]
        d_end_write -= tl.sum(hidden * by_g, 1)
        d_delta -= product(hidden * end_write[:, None], tl.trans(g_weight.to(DT)), DT, PRECISION)
        d_end_retain += tl.sum(weight2 * g_weight, 1)
        g_before2 = g_weight * end_retain + product(d_read_t, read * retain[:, None], DT, PRECISION)
        if MOMENTUM:
            moment2 = tl.load(s2 + at2)
            to_moment = product(d_read, moment2, DT, PRECISION)
            d_carry += tl.sum(read * to_moment, 1)
            d_hidden_q += to_moment * carry[:, None]
            g_moment = tl.load(g_s2 + at2)
            by_g = product(delta, g_moment, DT, PRECISION)
            d_hidden -= by_g * end_momentum[:, None]
            d_end_momentum -= tl.sum(hidden * by_g, 1)
            d_delta -= product(hidden * end_momentum[:, None], tl.trans(g_moment.to(DT)), DT, PRECISION)
            d_end_carry += tl.sum(moment2 * g_weight, 1)
            d_end_inertia += tl.sum(moment2 * g_moment, 1)
            inert = g_weight * end_carry + g_moment * end_inertia
            tl.store(g_s2 + at2, inert + product(d_read_t, read * carry[:, None], DT, PRECISION))
        if DEEP:
            # The first layer's reads and update.
            d_pre = d_hidden_q * gelu_slope(pre, sigma_q)
            d_retain += tl.sum(d_pre * by_weight, 1)
            d_q += product(d_pre * retain[:, None], tl.trans(weight1.to(DT)), DT, PRECISION)
            delta1_t = tl.load(small + 3 * C * D + i[None, :] * F + f[:, None])
            d_scores -= product(d_pre, delta1_t, DT, PRECISION)
            d_delta1 = -product(scores_t, d_pre, DT, PRECISION)
            g_weight = tl.load(g_w1 + at1)
            by_g = product(k, g_weight, DT, PRECISION)
            d_delta1 -= by_g * end_write[:, None]
            d_end_write -= tl.sum(delta1 * by_g, 1)
            d_k -= product(delta1 * end_write[:, None], tl.trans(g_weight.to(DT)), DT, PRECISION)
            d_end_retain += tl.sum(weight1 * g_weight, 1)
            g_before1 = g_weight * end_retain + product(qt, d_pre * retain[:, None], DT, PRECISION)
            if MOMENTUM:
                d_carry += tl.sum(d_pre * by_moment, 1)
                d_q += product(d_pre * carry[:, None], tl.trans(moment1.to(DT)), DT, PRECISION)
                g_moment = tl.load(g_s1 + at1)
                by_g = product(k, g_moment, DT, PRECISION)
                d_delta1 -= by_g * end_momentum[:, None]
                d_end_momentum -= tl.sum(delta1 * by_g, 1)
                d_k -= product(delta1 * end_momentum[:, None], tl.trans(g_moment.to(DT)), DT, PRECISION)
                d_end_carry += tl.sum(moment1 * g_weight, 1)
                d_end_inertia += tl.sum(moment1 * g_moment, 1)
                inert = g_weight * end_carry + g_moment * end_inertia
                tl.store(g_s1 + at1, inert + product(qt, d_pre * carry[:, None], DT, PRECISION))
            tl.store(g_w1 + at1, g_before1)
            # Second order: the keys' errors depend on the anchor.
            d_back = d_delta1 * slope
            d_before = d_delta1 * back * gelu_curve(before, sigma) + d_hidden * slope
            tl.store(wide + 2 * C * C + 2 * C * D + at_hidden, d_before)
            d_delta += product(d_back, tl.trans(last), DT, PRECISION)
            g_anchor = product(delta_t, d_back, DT, PRECISION)
            g_before2 += tl.where(own, g_anchor, 0.0)
            held = tl.load(g_u2 + at2, mask=own == 0, other=0.0)
            tl.store(g_u2 + at2, held + g_anchor, mask=own == 0)
        else:
            tl.store(wide + 2 * C * C + 2 * C * D + at_hidden, d_hidden)
            if RESIDUAL:
                d_hidden_q += token_rows(d_o_ptr, tok, valid, f).to(tl.float32)
            tl.store(d_q_ptr + tok[:, None] + f[None, :], d_hidden_q.to(DT), mask=valid[:, None])
        tl.store(g_w2 + at2, g_before2)
    of_gates = (d_retain, d_carry, d_end_write, d_end_momentum, tl.sum(d_end_retain, 0), tl.sum(d_end_carry, 0),
                tl.sum(d_end_inertia, 0))  # fmt: skip
    return d_q, d_k, d_delta, d_scores, of_gates


@triton.jit
def lower_backward(k_ptr, tok, valid, anchor, grads, small, wide, own, D: tl.constexpr, F: tl.constexpr,
                   C: tl.constexpr, BF: tl.constexpr, DEEP: tl.constexpr, LAST: tl.constexpr, DT: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Down along the keys' own pass, from the gradient of the last layer's output in ``small`` (LAST: there is one):
    the gradient of K, and those of the anchor, which go to the weights where the anchor is those (``own``)."""
    u1, u2 = anchor
    g_w1, _, g_u1, g_w2, _, g_u2 = grads
    g1 = tl.where(own, g_w1, g_u1)
    g2 = tl.where(own, g_w2, g_u2)
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    k = token_rows(k_ptr, tok, valid, d)
    kt = token_columns(k_ptr, tok, valid, d)
    d_last = tl.load(small + 2 * C * D + i[:, None] * D + d[None, :])
    d_last_t = tl.load(small + 2 * C * D + i[None, :] * D + d[:, None])
    d_k = tl.zeros([C, D], tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        at1 = d[:, None] * F + f[None, :]
        at2 = f[None, :] * D + d[:, None]
        partial = wide + 2 * C * C + 2 * C * D + i[:, None] * F + f[None, :]
        d_before = tl.load(partial)
        if DEEP:
            first = tl.load(u1 + at1).to(DT)
            before = product(k, first, DT, PRECISION)
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
            d_k += product(d_before, tl.trans(first), DT, PRECISION)
            tl.store(g1 + at1, tl.load(g1 + at1) + product(kt, d_before, DT, PRECISION))
        else:
            tl.store(partial, d_before)
    if not DEEP:
        tl.debug_barrier()
        d_k += tl.load(wide + 2 * C * C + 2 * C * D + i[:, None] * F + d[None, :])
    return d_k


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
def step_backward(tokens, d_tokens, tok, valid, anchor, old, grads, write, d_write, gates, scale, small, wide, own,
                  D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, DEEP: tl.constexpr,
                  NORM: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr, MOMENTUM: tl.constexpr,
                  DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One step: writes the gradients of its tokens and of Λ, carries those of the state back in place; returns those
    of the norm and of the gates' other coefficients."""
    q_ptr, k_ptr, v_ptr, d_o_ptr = tokens
    d_q_ptr, d_k_ptr, d_v_ptr = d_tokens
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    rows = i[:, None] * D + d[None, :]
    square = i[:, None] * C + i[None, :]
    normed, rstd, error, delta = inner_pass(
        k_ptr, v_ptr, tok, valid, anchor, scale, D, F, C, BF, DEEP, NORM, RESIDUAL, DOT, DT, PRECISION
    )
    products, out = outer_pass(
        q_ptr, k_ptr, tok, valid, delta, anchor, old, old, old, write + square, gates, small + 3 * C * D, D, F, C, BF,
        DEEP, MOMENTUM, True, False, False, DT, PRECISION,
    )  # fmt: skip
    d_out = token_rows(d_o_ptr, tok, valid, d).to(tl.float32)
    d_scale = tl.zeros([D], tl.float32)
    if NORM:
        out -= product(products * tl.load(write + square).to(tl.float32), delta, DT, PRECISION)
        read_normed, read_rstd = normalised(out, D)
        d_scale += tl.sum(d_out * read_normed, 0)
        d_out = project(d_out * scale[None, :], read_normed, D) * read_rstd[:, None]
    tl.store(small + rows, delta.to(DT))
    tl.store(small + C * D + rows, d_out.to(DT))
    tl.store(wide + square, products)
    tl.store(wide + 2 * C * C + rows, normed)
    tl.store(wide + 2 * C * C + C * D + rows, error)
    tl.debug_barrier()
    d_q, d_k, d_delta, d_scores, of_gates = upper_backward(
        q_ptr, k_ptr, d_o_ptr, d_q_ptr, tok, valid, anchor, old, grads, write, gates, small, wide, own, D, F, C, BF,
        DEEP, RESIDUAL, MOMENTUM, DT, PRECISION,
    )  # fmt: skip
    d_error, d_last, more_scale = error_backward(
        d_delta, tl.load(wide + 2 * C * C + rows), rstd, tl.load(wide + 2 * C * C + C * D + rows), scale, D, NORM, DOT
    )
    tl.store(small + 2 * C * D + rows, d_last.to(DT))
    tl.store(wide + C * C + square, d_scores)
    tl.debug_barrier()
    at = tok[:, None] + d[None, :]
    tl.store(d_v_ptr + at, (-d_error).to(DT), mask=valid[:, None])
    if RESIDUAL and not DOT:
        d_k += d_error
    k = token_rows(k_ptr, tok, valid, d)
    delta_t = tl.load(small + i[None, :] * D + d[:, None])
    d_written = -product(tl.load(small + C * D + rows), delta_t, DT, PRECISION) * tl.load(wide + square)
    if DEEP:
        q = token_rows(q_ptr, tok, valid, d)
        kt = token_columns(k_ptr, tok, valid, d)
        square_t = i[None, :] * C + i[:, None]
        written = tl.load(write + square).to(tl.float32)
        written_t = tl.load(write + square_t).to(tl.float32)
        d_written += d_scores * product(q, kt, DT, PRECISION)
        d_q += product(d_scores * written, k, DT, PRECISION)
        d_k += product(tl.load(wide + C * C + square_t) * written_t, q, DT, PRECISION)
        if RESIDUAL:
            d_q += token_rows(d_o_ptr, tok, valid, d).to(tl.float32)
        tl.store(d_q_ptr + at, d_q.to(DT), mask=valid[:, None])
    tl.store(d_write + square, d_written.to(d_write.dtype.element_ty))
    d_k += lower_backward(k_ptr, tok, valid, anchor, grads, small, wide, own, D, F, C, BF, DEEP, NORM or not DOT, DT,
                          PRECISION)  # fmt: skip
    tl.store(d_k_ptr + at, d_k.to(DT), mask=valid[:, None])
    tl.debug_barrier()
    return d_scale + more_scale, of_gates
