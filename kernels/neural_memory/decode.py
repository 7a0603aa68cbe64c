"""One token of neural memory after a state, in Triton: what decoding calls, forward alone.

With one token there is nothing for matrix instructions: every weight is read once, multiplied by a vector, changed by
a rank-one term and written once. One program per memory takes the state through in blocks of hidden units, twice: the
error at the anchor, then the write of the weights and the read from them. With a window the first is done for each of
its keys, and the second sums over them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel
from .biases import error_of
from .canary import decode_pairs
from .forward import constants_of
from .hidden import hidden_backward, hidden_of
from .logs import exponentials, log_means, settle_logs
from .orthogonal import APART, turn, turned_size, work_of
from .retentions import factor_of, scaled, settle
from .spec import MemorySpec
from .state import matrix_names
from .tiles import EPS, clear, copy


@triton.jit
def row_unit(x, D: tl.constexpr):
    """(x − mean) / std of a vector [D], and 1 / std."""
    centred = x - tl.sum(x, 0) / D
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)
    return centred * rstd, rstd


@triton.jit
def written(layer, at, gradient, factor, weight, theta, retain, momentum, ended, MOMENTUM: tl.constexpr,
            SETTLE: tl.constexpr):  # fmt: skip
    """S ← η S − θ g, W ← a W + S on one block, and the anchor, which W becomes where the chunk has ``ended``; returns W
    before and after. ``factor``: lq's r, or None. Of kl W ← a W + (1 − a) O + S with O = F(U) − U, ``weight`` being
    F(U), and the anchor becomes D = W − O."""
    w, s, u, new_w, new_s, new_u = layer
    before = tl.load(w + at)
    change = -theta * gradient
    if MOMENTUM:
        change += momentum * tl.load(s + at)
        tl.store(new_s + at, change)
    after = retain * before
    if MOMENTUM != APART:
        after += scaled(change, factor)
    if SETTLE[0] == "kl":
        start = tl.load(u + at)
        after += (1.0 - retain) * (weight - start)
        tl.store(new_u + at, tl.where(ended, after - (weight - start), start))
    else:
        tl.store(new_u + at, tl.where(ended, after, tl.load(u + at)))
    tl.store(new_w + at, after)
    return before, after


@triton.jit
def multiple(target, source, factor, zero, COUNT: tl.constexpr):
    """COUNT numbers, a multiple of 256, times a factor."""
    BLOCK: tl.constexpr = 2048 if COUNT % 2048 == 0 else 256
    at = tl.arange(0, BLOCK)
    for i in range(0, COUNT + zero, BLOCK):
        tl.store(target + i + at, tl.load(source + i + at) * factor)


@triton.jit
def settle_token(layer, factor, zero, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                 SETTLE: tl.constexpr):  # fmt: skip
    """W after a chunk's last token, and the anchor: W, or of lq the D that W is ``factor`` times, and W of that; of kl
    the D that is there, and its exponential."""
    _, _, u, new_w, _, new_u = layer
    if SETTLE[0] == "lq":
        multiple(new_u, new_w, 1.0 / factor, zero, IN * OUT)
        tl.debug_barrier()
        multiple(new_w, new_u, factor_of(new_u, zero, IN * OUT, SETTLE[1])[0], zero, IN * OUT)
    elif SETTLE[0] == "kl":
        settle_logs(new_u, zero, IN, OUT, ROWS, COLS)
        tl.debug_barrier()
        exponentials(new_w, new_u, zero, IN * OUT)
    else:
        settle(u, new_w, new_w, zero, IN, OUT, ROWS, COLS, False)
        tl.debug_barrier()
        copy(new_u, new_w, zero, IN * OUT)


@triton.jit
def turn_token(first, last, third, factors, turned, row, ended, zero, D: tl.constexpr, F: tl.constexpr,
               LAYERS: tl.constexpr, SETTLE: tl.constexpr, TURN: tl.constexpr):  # fmt: skip
    """After the last token that muon orthogonalises at once: W += NS(S), with lq times its factor, and S = 0 with
    muon_gd; and the anchor, which W becomes where a chunk has ``ended``."""
    _, work = work_of(turned, row, D, F, LAYERS, TURN, False)
    for layer in tl.range(0, LAYERS + zero, disable_licm=True):
        tall = layer == LAYERS - 1
        new_w = tl.where(tall, last[3], tl.where(layer == 0, first[3], third[3]))
        new_s = tl.where(tall, last[4], tl.where(layer == 0, first[4], third[4]))
        new_u = tl.where(tall, last[5], tl.where(layer == 0, first[5], third[5]))
        factor = 1.0
        if SETTLE[0] == "lq":
            factor = tl.where(tall, factors[1], tl.where(layer == 0, factors[0], factors[2]))
        turn(new_w, new_s, factor, work, tall, zero, D, F, TURN)
        tl.debug_barrier()
        if TURN[0] == "muon_gd":
            clear(new_s, zero, D * F)
        if ended:
            copy(new_u, new_w, zero, D * F)


@triton.jit
def token_factors(first, last, third, zero, SIZE: tl.constexpr, LAYERS: tl.constexpr, POWER: tl.constexpr):
    """lq's r of W1, W2 and W3; what there is not, another's."""
    by_last = factor_of(last[2], zero, SIZE, POWER)[0]
    by_first = by_last
    if LAYERS > 1:
        by_first = factor_of(first[2], zero, SIZE, POWER)[0]
    by_third = by_first
    if LAYERS == 3:
        by_third = factor_of(third[2], zero, SIZE, POWER)[0]
    return by_first, by_last, by_third


@triton.jit
def columns_at(anchor, D: tl.constexpr, SETTLE: tl.constexpr):
    """Whole columns of W1 or W3 at the anchor."""
    weight = tl.load(anchor)
    if SETTLE[0] == "kl":
        powers = tl.exp(weight - tl.max(weight, 0)[None, :])
        weight = powers * (D / tl.sum(powers, 0))[None, :]
    return weight


@triton.jit
def rows_at(anchor, shift, SETTLE: tl.constexpr):
    """Rows of W2 at the anchor; ``shift``: of kl, that of its columns."""
    weight = tl.load(anchor)
    if SETTLE[0] == "kl":
        weight = tl.exp(weight - shift[None, :])
    return weight


@triton.jit
def key_block(weight, weight_above, k, factors, LAYERS: tl.constexpr):
    """The key's pre-activations by a block of W1 and of W3 at the anchor."""
    before = scaled(tl.sum(weight * k[:, None], 0), factors[0])
    above = before
    if LAYERS == 3:
        above = scaled(tl.sum(weight_above * k[:, None], 0), factors[2])
    return before, above


@triton.jit
def key_delta(k_ptr, threshold_ptr, row, k, error, first, last, third, factors, shift, scale, zero, D: tl.constexpr,
              F: tl.constexpr, BF: tl.constexpr, LAYERS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
              BIAS: tl.constexpr, SETTLE: tl.constexpr):  # fmt: skip
    """Δ of the last layer at the anchor for a key k, in a ``row`` of [..., H, D]; ``error``: −v."""
    d = tl.arange(0, D)
    out = tl.zeros([D], tl.float32)
    for start in range(0, F + zero, BF):
        f = start + tl.arange(0, BF)
        at_first = d[:, None] * F + f[None, :]
        if LAYERS > 1:
            weight = columns_at(first[2] + at_first, D, SETTLE)
            weight_above = weight
            if LAYERS == 3:
                weight_above = columns_at(third[2] + at_first, D, SETTLE)
            before, above = key_block(weight, weight_above, k, factors, LAYERS)
            hidden = hidden_of(before, above, LAYERS)
        else:
            hidden = tl.load(k_ptr + row * D + f).to(tl.float32)
        out += tl.sum(rows_at(last[2] + f[:, None] * D + d[None, :], shift, SETTLE) * hidden[:, None], 0)
    out = scaled(out, factors[1])
    delta = error
    if NORM:
        unit, rstd = row_unit(out, D)
        out = unit * scale
    if BIAS[0] != "dot":
        delta += out
        if RESIDUAL:
            delta += k
    threshold = tl.zeros([1], tl.float32)
    if BIAS[0] == "huber":
        threshold += tl.load(threshold_ptr + row)
    delta = error_of(delta, threshold, BIAS)
    if NORM:
        delta = delta * scale
        delta = rstd * (delta - tl.sum(delta, 0) / D - unit * (tl.sum(delta * unit, 0) / D))
    return delta


@triton.jit
def key_vectors(k_ptr, row, k, delta, weights, f, factors, D: tl.constexpr, LAYERS: tl.constexpr):
    """A block of hidden units of a key, from its Δ of the last layer: the hidden vector, Δ of W1 and of W3; what there
    is not, another's. ``weights``: blocks of W1, W2 and W3 at the anchor."""
    if LAYERS > 1:
        before, above = key_block(weights[0], weights[2], k, factors, LAYERS)
        hidden = hidden_of(before, above, LAYERS)
        back = scaled(tl.sum(weights[1] * delta[None, :], 1), factors[1])
        delta1, delta3 = hidden_backward(back, before, above, LAYERS)
        return hidden, delta1, delta3
    else:
        hidden = tl.load(k_ptr + row * D + f).to(tl.float32)
        return hidden, hidden, hidden


@triton.jit
def window_gradients(k_ptr, deltas, rows, weights, f, factors, zero, H: tl.constexpr, D: tl.constexpr,
                     BF: tl.constexpr, LAYERS: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """A block of the gradients of W1, W2 and W3, summed over a window: the keys in rows ``rows``, ``rows`` + H, …;
    ``deltas``: their γ Δ."""
    d = tl.arange(0, D)
    by_first, by_third = tl.zeros([D, BF], tl.float32), tl.zeros([D, BF], tl.float32)
    by_last = tl.zeros([BF, D], tl.float32)
    for i in range(0, WINDOW + zero):
        k = tl.load(k_ptr + (rows + i * H) * D + d).to(tl.float32)
        delta = tl.load(deltas + i * D + d)
        hidden, delta1, delta3 = key_vectors(k_ptr, rows + i * H, k, delta, weights, f, factors, D, LAYERS)
        by_last += hidden[:, None] * delta[None, :]
        if LAYERS > 1:
            by_first += k[:, None] * delta1[None, :]
        if LAYERS == 3:
            by_third += k[:, None] * delta3[None, :]
    return by_first, by_last, by_third


@triton.jit(do_not_specialize=["zero"])
def neural_memory_decode(
    q_ptr, k_ptr, v_ptr, theta_ptr, retain_ptr, momentum_ptr, gamma_ptr, threshold_ptr, norm_ptr, position_ptr, w1_ptr,
    s1_ptr, u1_ptr, w2_ptr, s2_ptr, u2_ptr, w3_ptr, s3_ptr, u3_ptr, deltas_ptr, o_ptr, new_w1, new_s1, new_u1, new_w2,
    new_s2, new_u2, new_w3, new_s3, new_u3, turned_ptr, zero, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    CHUNK: tl.constexpr, LAYERS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    SETTLE: tl.constexpr, RETENTION: tl.constexpr, MOMENTUM: tl.constexpr, TURN: tl.constexpr, LATE: tl.constexpr,
    WINDOW: tl.constexpr, DT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """``w``, ``s``, ``u`` [N, H, in, out]: W, S and the anchor of W1, W2 and W3, a linear memory's as its second.
    ``k``, ``v``, ``gamma``, ``threshold`` [N, WINDOW, H, ·]: the window, the token itself last; ``deltas``
    [N, H, WINDOW, D] for what waits between two passes."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(0) % H
    SIZE: tl.constexpr = D * F
    own = row * SIZE
    first = (w1_ptr + own, s1_ptr + own, u1_ptr + own, new_w1 + own, new_s1 + own, new_u1 + own)
    last = (w2_ptr + own, s2_ptr + own, u2_ptr + own, new_w2 + own, new_s2 + own, new_u2 + own)
    third = (w3_ptr + own, s3_ptr + own, u3_ptr + own, new_w3 + own, new_s3 + own, new_u3 + own)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + row * D + d).to(tl.float32)
    if WINDOW == 1:
        k = tl.load(k_ptr + row * D + d).to(tl.float32)
        error = -tl.load(v_ptr + row * D + d).to(tl.float32)
    theta = tl.load(theta_ptr + row)
    retain = 1.0
    if RETENTION:
        retain = tl.exp(tl.load(retain_ptr + row))
    RULE: tl.constexpr = APART if TURN[0] != "none" else MOMENTUM
    momentum = 1.0 if TURN[0] == "muon_gd" else 0.0
    if MOMENTUM and TURN[0] != "muon_gd":
        momentum = tl.exp(tl.load(momentum_ptr + row))
    ended = (tl.load(position_ptr + row // H) + 1) % CHUNK == 0
    scale = tl.zeros([D], tl.float32)
    if NORM:
        scale = tl.load(norm_ptr + h * D + d).to(tl.float32)
    factors = (None, None, None)
    if SETTLE[0] == "lq":
        factors = token_factors(first, last, third, zero, SIZE, LAYERS, SETTLE[1])
    shift = tl.zeros([D], tl.float32)
    if SETTLE[0] == "kl":
        top, rest = log_means(last[2], 0, zero, F, D, BF, D)
        shift = top + rest
    rows = row // H * (WINDOW * H) + h
    deltas = deltas_ptr + row * (WINDOW * D)
    if WINDOW == 1:
        delta = key_delta(
            k_ptr, threshold_ptr, row, k, error, first, last, third, factors, shift, scale, zero, D, F, BF, LAYERS,
            NORM, RESIDUAL, BIAS, SETTLE,
        )  # fmt: skip
    else:
        for i in range(0, WINDOW + zero):
            at = rows + i * H
            delta = key_delta(
                k_ptr, threshold_ptr, at, tl.load(k_ptr + at * D + d).to(tl.float32),
                -tl.load(v_ptr + at * D + d).to(tl.float32), first, last, third, factors, shift, scale, zero, D, F, BF,
                LAYERS, NORM, RESIDUAL, BIAS, SETTLE,
            )  # fmt: skip
            tl.store(deltas + i * D + d, delta * tl.load(gamma_ptr + at))
        tl.debug_barrier()
    read = tl.zeros([D], tl.float32)
    for start in range(0, F + zero, BF):
        f = start + tl.arange(0, BF)
        at_first = d[:, None] * F + f[None, :]
        at_last = f[:, None] * D + d[None, :]
        weight_last = scale
        if LAYERS > 1 or SETTLE[0] == "kl":
            weight_last = rows_at(last[2] + at_last, shift, SETTLE)
        weight = weight_last
        if LAYERS > 1:
            weight = columns_at(first[2] + at_first, D, SETTLE)
        weight_above = weight
        if LAYERS == 3:
            weight_above = columns_at(third[2] + at_first, D, SETTLE)
        weights = weight, weight_last, weight_above
        if WINDOW == 1:
            hidden, delta1, delta3 = key_vectors(k_ptr, row, k, delta, weights, f, factors, D, LAYERS)
        else:
            by_first, by_last, by_third = window_gradients(
                k_ptr, deltas, rows, weights, f, factors, zero, H, D, BF, LAYERS, WINDOW
            )  # fmt: skip
        if LAYERS > 1:
            if WINDOW == 1:
                by_first = k[:, None] * delta1[None, :]
            old, new = written(
                first, at_first, by_first, factors[0], weight, theta, retain, momentum, ended, RULE, SETTLE
            )  # fmt: skip
            asked = tl.sum((old if LATE else new) * q[:, None], 0)
            asked_above = asked
            if LAYERS == 3:
                if WINDOW == 1:
                    by_third = k[:, None] * delta3[None, :]
                old, new = written(
                    third, at_first, by_third, factors[2], weight_above, theta, retain, momentum, ended, RULE, SETTLE
                )  # fmt: skip
                asked_above = tl.sum((old if LATE else new) * q[:, None], 0)
            asked = hidden_of(asked, asked_above, LAYERS)
        else:
            asked = tl.load(q_ptr + row * D + f).to(tl.float32)
        if WINDOW == 1:
            by_last = hidden[:, None] * delta[None, :]
        old, new = written(
            last, at_last, by_last, factors[1], weight_last, theta, retain, momentum, ended, RULE, SETTLE
        )  # fmt: skip
        read += tl.sum((old if LATE else new) * asked[:, None], 0)
    if NORM:
        read = row_unit(read, D)[0] * scale
    if RESIDUAL:
        read += q
    tl.store(o_ptr + row * D + d, read.to(DT))
    if TURN[0] != "none":
        tl.debug_barrier()
        if (tl.load(position_ptr + row // H) + 1) % TURN[1] == 0:
            turn_token(first, last, third, factors, turned_ptr, row, ended, zero, D, F, LAYERS, SETTLE, TURN)
    if SETTLE[0] != "none":
        tl.debug_barrier()
        if ended:
            settle_token(last, factors[1], zero, F, D, BF, D, SETTLE)
            if LAYERS > 1:
                settle_token(first, factors[0], zero, D, F, D, BF, SETTLE)
            if LAYERS == 3:
                settle_token(third, factors[2], zero, D, F, D, BF, SETTLE)


def decode_configs(constants: Mapping[str, Any]) -> list[Config]:
    """Blocks of hidden units: of 16 only where the weights do not settle, with which they spill, or no others fit. With
    a window, whose sums are tiles, two matrices that do not settle want these, and all others those of 32. With kl none
    but those of 16."""
    every = [Config((("BF", b),), 4, 1) for b in (32, 16) if b <= constants["F"]]
    if constants["SETTLE"][0] == "kl":
        return every[-1:]
    if constants["WINDOW"] > 1 and constants["SETTLE"][0] == "none":
        return every[-1:] if constants["LAYERS"] == 2 else every[:1]
    return every if constants["SETTLE"][0] == "none" else every[:1]


DECODE = Kernel(neural_memory_decode, decode_configs, decode_pairs)


def run_decode(
    tokens: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    norm: Tensor | None,
    state: Sequence[Tensor],
    position: Tensor,
    spec: MemorySpec,
    gamma: Tensor | None = None,
) -> list[Tensor]:
    """What the operator returns: o [N, 1, H, D], the state's tensors after one token of each row,
    and the position. ``gamma``: γ, with a window."""
    q, k, v, step, log_retain, log_momentum, delta = (None if x is None else x.contiguous() for x in tokens)
    assert q is not None and k is not None and v is not None and step is not None
    constants = constants_of(q, weights, True, False, False, spec)
    matrices = [x.contiguous() for x in state[: len(matrix_names(spec))]]
    o, new = torch.empty_like(v), [torch.empty_like(x) for x in matrices]
    halo: list[Tensor] = []
    if gamma is not None:
        given = (x for x in (k, v, gamma, delta) if x is not None)
        k, v, gamma, *rest = (torch.cat(pair, 1) for pair in zip(state[len(matrices) :], given, strict=True))
        delta = rest[0] if rest else None
        halo = [x[:, 1:].clone() for x in (k, v, gamma, *rest)]
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "theta_ptr": step,
        "retain_ptr": step if log_retain is None else log_retain,
        "momentum_ptr": step if log_momentum is None else log_momentum,
        "gamma_ptr": step if gamma is None else gamma,
        "threshold_ptr": step if delta is None else delta,
        "norm_ptr": q if norm is None else norm.contiguous(),
        "position_ptr": position,
        "deltas_ptr": step if gamma is None else torch.empty_like(v),
        "turned_ptr": step.new_empty((*step.shape[::2], turned_size(constants))),
        "o_ptr": o,
        "zero": 0,
    }
    arguments |= {f"{name}_ptr": x for name, x in _named(matrices, spec).items()}
    arguments |= {f"new_{name}": x for name, x in _named(new, spec).items()}
    own = {name: value for name, value in constants.items() if name in DECODE.function.arg_names}
    DECODE(lambda c: (q.shape[0] * c["H"],), arguments, own)
    return [o, *new, *halo, torch.remainder(position + 1, spec.chunk_size).to(torch.int32)]


def _named(state: Sequence[Tensor], spec: MemorySpec) -> dict[str, Tensor]:
    """w1 … u3 of a state's tensors in the order of ``state_names``; what there is not stands in for another."""
    names = ("w", "s", "u") if spec.has_momentum else ("w", "u")
    parts = {name: state[p * spec.layers : (p + 1) * spec.layers] for p, name in enumerate(names)}
    layers = {1: 0, 2: spec.last, 3: spec.layers - 1}
    return {f"{name}{i}": parts.get(name, parts["w"])[layers[i]] for i in layers for name in "wsu"}
