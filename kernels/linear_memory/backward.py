"""Both linear memories in Triton, backward: the mirror of the forward.

Gradients of what is written, as the chunk's own reads want it, for all chunks at once (the delta rule only); the
states' gradients from chunk to chunk, backwards; then the gradients of q, k, v and the gates for all chunks at once.
The delta rule's part of these, through its errors, is a kernel of its own.

Products with a transposed matrix load it transposed or are computed transposed: a product is never turned around.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel
from . import canary
from .forward import Call, configs
from .tiles import chunk_of, cumulative, gate, lower, put, sequence_of, tile, turned, upper


@triton.jit
def put_gate(x, value, first, stop, head, H: tl.constexpr, C: tl.constexpr):
    """Write a gate's values [C]."""
    i = tl.arange(0, C)
    tl.store(x + first.to(tl.int64) * H + head + i * H, value, mask=first + i < stop)


@triton.jit(do_not_specialize=["scale", "length", "count"])
def memory_written_backward(
    q, k, log_decay, d_o, d_states, table, d_local, scale, length, count,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    DELTA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradient of what one chunk writes, [B, T, H, D_v], a block of columns. For the delta rule as far as the chunk
    itself reads it, and :func:`memory_states_backward` goes on; for linear attention, after that kernel, all of it."""
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, stop = chunk_of(slot, table, length, count, C, PACKED)
    if first >= stop:
        return
    d, e = tl.arange(0, D), tl.program_id(1) * BV + tl.arange(0, BV)
    keys = tile(k + head * D, first, stop, d, K_STRIDE, C)
    queries = turned(q + head * D, first, stop, d, Q_STRIDE, C)
    total, last = cumulative(log_decay, first, stop, head, H, C, DECAY)
    scores = tl.dot(keys, queries, input_precision=PRECISION) * upper(total, C, DECAY, False) * scale
    grad = tile(d_o + head * DV, first, stop, e, H * DV, C)
    found = tl.dot(scores.to(grad.dtype), grad, input_precision=PRECISION)
    if not DELTA:
        ds = tl.load(d_states + (slot * H + head).to(tl.int64) * (D * DV) + d[:, None] * DV + e[None, :])
        found += tl.dot(keys, ds, input_precision=PRECISION) * tl.exp(last - total)[:, None]
    put(d_local + head * DV, found, first, stop, e, H * DV, C)


@triton.jit(do_not_specialize=["scale", "length", "count"])
def memory_states_backward(
    q, k, towards, beta, log_decay, d_o, d_local, d_final, borders, offset, d_states, d_written, d_state,
    scale, length, count,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    DELTA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One sequence and head, a block of columns, from its end: gradients of the state after each chunk, of what the
    delta rule writes (``d_local`` and what later chunks read of it), and of the initial memory."""
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    start, end, slot, chunks = sequence_of(row, borders, offset, length, count, C, PACKED)
    d, e = tl.arange(0, D), tl.program_id(1) * BV + tl.arange(0, BV)
    inner = d[:, None] * DV + e[None, :]
    whole = (row * H + head).to(tl.int64) * (D * DV)
    ds = tl.load(d_final + whole + inner)
    for done in range(0, chunks):
        c = chunks - 1 - done
        first = start + c * C
        kept = d_states + ((slot + c) * H + head).to(tl.int64) * (D * DV) + inner
        tl.store(kept, ds.to(d_states.dtype.element_ty))
        total, last = cumulative(log_decay, first, end, head, H, C, DECAY)
        grad = tile(d_o + head * DV, first, end, e, H * DV, C)
        queries = turned(q + head * D, first, end, d, Q_STRIDE, C)
        across = ds.to(grad.dtype)
        read = grad.to(tl.float32) * scale
        if DECAY:
            read *= tl.exp(total)[:, None]
            ds *= tl.exp(last)
        ds += tl.dot(queries, read.to(grad.dtype), input_precision=PRECISION)
        if DELTA:
            keys = tile(k + head * D, first, end, d, K_STRIDE, C)
            found = tl.dot(keys, across, input_precision=PRECISION)
            if DECAY:
                found *= tl.exp(last - total)[:, None]
            found += tile(d_local + head * DV, first, end, e, H * DV, C).to(tl.float32)
            put(d_written + head * DV, found, first, end, e, H * DV, C)
            found *= gate(beta, first, end, head, H, C)[:, None]
            w = turned(towards + head * D, first, end, d, H * D, C)
            ds -= tl.dot(w, found.to(w.dtype), input_precision=PRECISION)
    if STATE:
        tl.store(d_state + whole + inner, ds)


@triton.jit(do_not_specialize=["scale", "length", "count"])
def memory_gradients(
    q, k, written, beta, log_decay, states, d_o, d_states, table, d_q, d_k, d_decay, scale, length, count,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    DELTA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One chunk and head: gradients of q and, of linear attention, of k and the log decay. For the delta rule ``d_k``
    and ``d_decay`` are those through what is read, the latter of G; :func:`delta_gradients` goes on."""
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, stop = chunk_of(slot, table, length, count, C, PACKED)
    if first >= stop:
        return
    i, d = tl.arange(0, C), tl.arange(0, D)
    FROM: tl.constexpr = H * DV if DELTA else V_STRIDE
    matrix = (slot * H + head).to(tl.int64) * (D * DV)
    # Keys j: products of what they wrote (rows) with gradients of later outputs (columns), and with the next state's.
    crossed, of_k = tl.zeros([C, C], tl.float32), tl.zeros([C, D], tl.float32)
    at_end = 0.0
    for begin in range(0, DV, BV):
        e = begin + tl.arange(0, BV)
        values = tile(written + head * DV, first, stop, e, FROM, C)
        grad = turned(d_o + head * DV, first, stop, e, H * DV, C)
        crossed += tl.dot(values, grad, input_precision=PRECISION)
        ds = tl.load(d_states + matrix + d[None, :] * DV + e[:, None])
        of_k += tl.dot(values, ds, input_precision=PRECISION)
        if DECAY:
            s = tl.load(states + matrix + d[None, :] * DV + e[:, None])
            at_end += tl.sum(s.to(tl.float32) * ds.to(tl.float32))
    total, last = cumulative(log_decay, first, stop, head, H, C, DECAY)
    crossed *= upper(total, C, DECAY, False) * scale
    if DELTA:
        crossed *= gate(beta, first, stop, head, H, C)[:, None]
        of_k *= gate(beta, first, stop, head, H, C)[:, None]
    keys = tile(k + head * D, first, stop, d, K_STRIDE, C).to(tl.float32)
    if DECAY:
        of_k *= tl.exp(last - total)[:, None]
        at_end = at_end * tl.exp(last) + tl.sum(keys * of_k)
    queries = tile(q + head * D, first, stop, d, Q_STRIDE, C)
    of_k += tl.dot(crossed.to(queries.dtype), queries, input_precision=PRECISION)
    put(d_k + head * D, of_k, first, stop, d, H * D, C)
    of_total = tl.where(first + i == stop - 1, at_end, 0.0) - tl.sum(keys * of_k, 1)
    # Queries i: products of gradients of outputs (rows) with what earlier tokens wrote (columns), and with the state.
    crossed, of_q = tl.zeros([C, C], tl.float32), tl.zeros([C, D], tl.float32)
    for begin in range(0, DV, BV):
        e = begin + tl.arange(0, BV)
        grad = tile(d_o + head * DV, first, stop, e, H * DV, C)
        values = turned(written + head * DV, first, stop, e, FROM, C)
        crossed += tl.dot(grad, values, input_precision=PRECISION)
        s = tl.load(states + matrix + d[None, :] * DV + e[:, None])
        of_q += tl.dot(grad, s, input_precision=PRECISION)
    total, _ = cumulative(log_decay, first, stop, head, H, C, DECAY)
    crossed *= lower(total, C, DECAY, False) * scale
    if DELTA:
        crossed *= gate(beta, first, stop, head, H, C)[None, :]
    of_q *= scale * tl.exp(total)[:, None]
    keys = tile(k + head * D, first, stop, d, K_STRIDE, C)
    of_q += tl.dot(crossed.to(keys.dtype), keys, input_precision=PRECISION)
    put(d_q + head * D, of_q, first, stop, d, H * D, C)
    if DECAY:
        of_total += tl.sum(tile(q + head * D, first, stop, d, Q_STRIDE, C).to(tl.float32) * of_q, 1)
        if not DELTA:
            of_total = tl.cumsum(of_total, 0, reverse=True)
        put_gate(d_decay, of_total, first, stop, head, H, C)


@triton.jit(do_not_specialize=["length", "count"])
def delta_gradients(
    k, beta, log_decay, inverse, states, errors, d_written, d_k_read, d_total, table, d_k, d_v, d_beta, d_decay,
    length, count,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    DELTA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One chunk and head of the delta rule: gradients of v, β, k and the log decay through the errors
    (I + L diag β) E = V − (K ⊙ exp G) S, added to those of k and G through what is read."""
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, stop = chunk_of(slot, table, length, count, C, PACKED)
    if first >= stop:
        return
    i, d = tl.arange(0, C), tl.arange(0, D)
    n = inverse + (slot * H + head).to(tl.int64) * (C * C)
    matrix = (slot * H + head).to(tl.int64) * (D * DV)
    # Gates and keys are read again wherever they are used: to hold them all along costs registers.
    # Keys that answer, j: products of the errors (rows) with d_v of later tokens (columns).
    crossed, of_beta = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for begin in range(0, DV, BV):
        e = begin + tl.arange(0, BV)
        error = tile(errors + head * DV, first, stop, e, H * DV, C)
        of_beta += tl.sum(tile(d_written + head * DV, first, stop, e, H * DV, C).to(tl.float32) * error, 1)
        grad = turned(d_written + head * DV, first, stop, e, H * DV, C).to(tl.float32)
        grad *= gate(beta, first, stop, head, H, C)[None, :]
        upright = tl.load(n + i[:, None] * C + i[None, :])
        of_v = tl.dot(grad.to(upright.dtype), upright, input_precision=PRECISION)
        crossed += tl.dot(error, of_v.to(error.dtype), input_precision=PRECISION)
    total, _ = cumulative(log_decay, first, stop, head, H, C, DECAY)
    crossed *= upper(total, C, DECAY, True)
    keys = tile(k + head * D, first, stop, d, K_STRIDE, C)
    keys_turned = turned(k + head * D, first, stop, d, K_STRIDE, C)
    of_beta -= tl.sum(crossed * tl.dot(keys, keys_turned, input_precision=PRECISION), 1)
    put_gate(d_beta, of_beta, first, stop, head, H, C)
    crossed *= gate(beta, first, stop, head, H, C)[:, None]
    keys = tile(k + head * D, first, stop, d, K_STRIDE, C)
    as_key = -tl.dot(crossed.to(keys.dtype), keys, input_precision=PRECISION)
    # Keys that ask, i: the same products the other way round, d_v as rows, and those with the states.
    crossed, as_query = tl.zeros([C, C], tl.float32), tl.zeros([C, D], tl.float32)
    for begin in range(0, DV, BV):
        e = begin + tl.arange(0, BV)
        grad = tile(d_written + head * DV, first, stop, e, H * DV, C).to(tl.float32)
        grad *= gate(beta, first, stop, head, H, C)[:, None]
        n_turned = tl.load(n + i[:, None] + i[None, :] * C)
        of_v = tl.dot(n_turned, grad.to(n_turned.dtype), input_precision=PRECISION)
        put(d_v + head * DV, of_v, first, stop, e, H * DV, C)
        error = turned(errors + head * DV, first, stop, e, H * DV, C)
        crossed += tl.dot(of_v.to(error.dtype), error, input_precision=PRECISION)
        s = tl.load(states + matrix + d[None, :] * DV + e[:, None])
        as_query -= tl.dot(of_v.to(s.dtype), s, input_precision=PRECISION)
    total, _ = cumulative(log_decay, first, stop, head, H, C, DECAY)
    if DECAY:
        as_query *= tl.exp(total)[:, None]
    crossed *= lower(total, C, DECAY, True) * gate(beta, first, stop, head, H, C)[None, :]
    keys = tile(k + head * D, first, stop, d, K_STRIDE, C)
    as_query -= tl.dot(crossed.to(keys.dtype), keys, input_precision=PRECISION)
    of_k = as_query + as_key + tile(d_k_read + head * D, first, stop, d, H * D, C)
    put(d_k + head * D, of_k, first, stop, d, H * D, C)
    if DECAY:
        of_total = gate(d_total, first, stop, head, H, C) + tl.sum(keys.to(tl.float32) * (as_query - as_key), 1)
        put_gate(d_decay, tl.cumsum(of_total, 0, reverse=True), first, stop, head, H, C)


def _written_configs(constants: Mapping[str, Any]) -> list[Config]:
    return configs(constants, (64, 4, 2))


def _states_configs(constants: Mapping[str, Any]) -> list[Config]:
    first = (32, 4, 2) if constants["D"] <= 64 else (16, 4, 2)
    return configs(constants, first, (64, 8, 2))


def _gradients_configs(constants: Mapping[str, Any]) -> list[Config]:
    """Tiles of C² and C·D numbers are held through the loops: wide ones want the registers of eight warps."""
    if constants["D"] * constants["C"] <= 4096:
        return configs(constants, (32, 4, 1), (32, 8, 1))
    return configs(constants, (32, 8, 2))


WRITTEN = Kernel(memory_written_backward, _written_configs, canary.backward)
STATES = Kernel(memory_states_backward, _states_configs, canary.backward)
GRADIENTS = Kernel(memory_gradients, _gradients_configs, canary.backward)
DELTA = Kernel(delta_gradients, _gradients_configs, canary.backward)


def _through_states(
    call: Call, grad_o: Tensor, grad_final: Tensor, inverse: Tensor | None, common: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the states after each chunk, of what is written, and of the initial memory."""
    d_states, d_state = call.new_states(), None if call.state is None else torch.empty_like(call.state)
    d_local = call.q.new_empty(grad_o.shape)
    towards = d_written = None
    within = {"log_decay": call.log_decay, "d_o": grad_o, "d_states": d_states, "table": call.table, "d_local": d_local}
    tokens = {"q": call.q, "k": call.k}
    if inverse is not None:
        towards, _ = call.transform(inverse, False)
        d_written = call.q.new_empty(grad_o.shape)
        WRITTEN(call.each_chunk_and_block, {**tokens, **within, **common}, call.constants)
    STATES(
        call.each_sequence_and_block,
        {
            **tokens, "towards": towards, "beta": call.beta, "log_decay": call.log_decay, "d_o": grad_o,
            "d_local": d_local, "d_final": grad_final.contiguous(), "borders": call.borders, "offset": call.offset,
            "d_states": d_states, "d_written": d_written, "d_state": d_state, **common,
        },
        call.constants,
    )  # fmt: skip
    if inverse is None:
        WRITTEN(call.each_chunk_and_block, {**tokens, **within, **common}, call.constants)
    return d_states, d_local if d_written is None else d_written, d_state


def backward(
    grad_o: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    inverse: Tensor | None,
    states: Tensor,
    errors: Tensor | None,
    scale: float,
    chunk: int,
) -> list[Tensor | None]:
    """Gradients of q, k, v, beta, log_decay and state; None for those that were None."""
    call = Call(q, k, v, beta, log_decay, state, cu_seqlens, chunk)
    grad_o, delta = grad_o.contiguous(), beta is not None
    gates, tokens = {"beta": call.beta, "log_decay": call.log_decay}, {"q": call.q, "k": call.k}
    common = {"scale": scale, **call.where}
    d_states, d_written, d_state = _through_states(call, grad_o, grad_final, inverse, common)
    d_q, d_k, d_v = q.new_empty(q.shape), q.new_empty(k.shape), d_written
    d_beta, d_decay = (None if x is None else torch.empty_like(x) for x in (call.beta, call.log_decay))
    d_k_read = q.new_empty(k.shape, dtype=torch.float32) if delta else d_k
    d_total = torch.empty_like(d_decay) if delta and d_decay is not None else d_decay
    GRADIENTS(
        call.each_chunk,
        {
            **tokens, "written": errors if delta else call.v, **gates, "states": states, "d_o": grad_o,
            "d_states": d_states, "table": call.table, "d_q": d_q, "d_k": d_k_read, "d_decay": d_total, **common,
        },
        call.constants,
    )  # fmt: skip
    if delta:
        d_v = q.new_empty(v.shape)
        DELTA(
            call.each_chunk,
            {
                "k": call.k, **gates, "inverse": inverse, "states": states, "errors": errors, "d_written": d_written,
                "d_k_read": d_k_read, "d_total": d_total, "table": call.table, "d_k": d_k, "d_v": d_v,
                "d_beta": d_beta, "d_decay": d_decay, **call.where,
            },
            call.constants,
        )  # fmt: skip
    return [d_q, d_k, d_v, d_beta, d_decay, d_state]
