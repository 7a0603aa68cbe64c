"""Window attention in Triton, by blocks of keys: the gradients of k and v, of the cache and of the prefix.

Scores are computed transposed, [keys, queries], so that no product takes the transpose of another one's result. Blocks
of queries add into the prefix from all rows; each span of tokens has a buffer of its own, and torch adds these.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import document_of
from ..launch import Config, Kernel, Pairs
from . import chunked
from .forward import QUERIES, call, forward, problem, tile, wide

SPAN = 1024  # queries of a row that one program adds up for the prefix
TOKENS, CACHED, PREFIXED = 0, 1, 2  # whose keys


@triton.jit
def gather(
    d_k, d_v, keys, values, q, grad, log_sum, along, time, length, depth, seen, scale,
    D: tl.constexpr, Q_STRIDE: tl.constexpr, G_STRIDE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what one block of queries, rows from q on at ``time``, gives to the gradients of the keys and values."""
    live, place = time < length, tl.arange(0, time.shape[0])
    queries = tile(q, place, depth, live, D, Q_STRIDE, MASKED)
    slope = tile(grad, place, depth, live, D, G_STRIDE, MASKED)
    # Beyond the last query the log-sum-exp is infinite, and so every weight zero.
    top = tl.load(log_sum + time, mask=live, other=float("inf"))
    mass = tl.load(along + time, mask=live, other=0.0)
    weights = tl.exp2(tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale - top[None, :])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    d_v = tl.dot(weights.to(slope.dtype), slope, d_v, input_precision=PRECISION)
    slopes = weights * (tl.dot(values, tl.trans(slope), input_precision=PRECISION) - mass[None, :])
    return tl.dot(slopes.to(queries.dtype), queries, d_k, input_precision=PRECISION), d_v


@triton.jit(do_not_specialize=["length", "size", "documents", "steps", "spans"])
def window_attention_keys(
    q, k, v, count, borders, log_sum, grad, along, d_k, d_v, length, size, documents, steps, spans, scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, KIND: tl.constexpr,
    SPAN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block of keys, key head, row): ``size`` keys a row, which are tokens, cached ones or the prefix (KIND).

    The third number is a row for tokens, a sequence for the cache, and for the prefix a row and a span of its queries.
    """
    begin, shared, third = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2)
    row = third
    if KIND == 1 and PACKED:
        row = third * 0
    if KIND == 2:
        row = third // spans
    key = begin + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, DEPTH)
    there = key < size
    far = row.to(tl.int64) * length
    # Queries low .. stop see some key; at a query of time t a key's own end must be > t, its start <= t.
    start_of, end_of = key, key * 0 + length
    low, stop = begin, length
    entry = third.to(tl.int64) * size
    if KIND == 0:
        if PACKED:
            document = document_of(borders, tl.minimum(key, length - 1), documents, steps)
            end_of = tl.load(borders + document + 1)
        if WINDOW > 0:
            end_of = tl.minimum(end_of, key + WINDOW)
    if KIND == 1:
        there = there & (key >= size - tl.load(count + third))
        low = row * 0
        if PACKED:
            low = tl.load(borders + third)
            end_of = end_of * 0 + tl.load(borders + third + 1)
        start_of = start_of * 0 + low
        if WINDOW > 0:
            end_of = tl.minimum(end_of, low + WINDOW + key - size)
    if KIND == 2:
        low = third % spans * SPAN
        entry = entry * 0
        start_of, end_of = start_of * 0, tl.minimum(end_of, low + SPAN)
    stop = tl.minimum(tl.max(tl.where(there, end_of, 0)), length)
    keys = tile(k + (entry + begin) * K_STRIDE + shared * D, tl.arange(0, BLOCK_N), depth, there, D, K_STRIDE, True)
    values = tile(v + (entry + begin) * V_STRIDE + shared * D, tl.arange(0, BLOCK_N), depth, there, D, V_STRIDE, True)
    sum_k, sum_v = tl.zeros([BLOCK_N, DEPTH], tl.float32), tl.zeros([BLOCK_N, DEPTH], tl.float32)
    # Of the queries after the block of keys, whole blocks see all its keys until the first key goes out of sight.
    left, right = stop, stop
    if KIND == 0:
        left = tl.minimum(begin + tl.cdiv(BLOCK_N, BLOCK_M) * BLOCK_M, tl.maximum(stop, begin))
        right = left + tl.maximum(tl.minimum(tl.min(end_of), stop) - left, 0) // BLOCK_M * BLOCK_M
    for member in range(H // HKV):
        head = shared * (H // HKV) + member
        known = (row * H + head).to(tl.int64) * length
        for part in tl.static_range(3):
            if part == 0:
                head_of, tail_of = low, left
            elif part == 1:
                head_of, tail_of = left, right
            else:
                head_of, tail_of = right, stop
            for start in range(head_of, tail_of, BLOCK_M):
                time = start + tl.arange(0, BLOCK_M)
                seen = (time[None, :] >= start_of[:, None]) & (time[None, :] < end_of[:, None]) & there[:, None]
                sum_k, sum_v = gather(
                    sum_k, sum_v, keys, values, q + (far + start) * Q_STRIDE + head * D,
                    grad + (far + start) * (H * D) + head * D, log_sum + known, along + known, time, length, depth,
                    seen, scale * 1.4426950408889634, D, Q_STRIDE, H * D, part != 1, PRECISION,
                )  # fmt: skip
    out = (third.to(tl.int64) * size + begin) * (HKV * D) + shared * D
    place = out + tl.arange(0, BLOCK_N)[:, None] * (HKV * D) + depth[None, :]
    mask = (key < size)[:, None] & (depth < D)[None, :]
    tl.store(d_k + place, (sum_k * scale).to(d_k.dtype.element_ty), mask=mask)
    tl.store(d_v + place, sum_v.to(d_v.dtype.element_ty), mask=mask)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """Two sums of a block of keys are held: narrow blocks, which spill on no architecture."""
    if constants["DTYPE"] == "float32":
        sizes = [(32, 32, 4, 1), (32, 64, 8, 1)]
    elif constants["DEPTH"] > 64:
        sizes = [(32, 64, 8, 1)]
    else:
        sizes = [(32, 64, 4, 2), (64, 64, 4, 2)] if constants["KIND"] == TOKENS else [(32, 64, 4, 2)]
    return [Config((("BLOCK_M", m), ("BLOCK_N", n)), num_warps=w, num_stages=s) for m, n, w, s in sizes]


def canary(constants: Mapping[str, Any]) -> Pairs:
    """Every gradient against the plain path's; what constants leave open is drawn with everything on."""
    kind = constants.get("KIND", TOKENS)
    plain = {"PREFIX": kind == PREFIXED, "CACHE": kind == CACHED}
    if kind != TOKENS:  # strides are then those of the cache or the prefix
        plain |= {f"{x}_STRIDE": constants["HKV"] * constants["D"] for x in "KV"}
    if kind == PREFIXED:
        plain |= {"PACKED": False, "WINDOW": 64}
    arguments = problem({**constants, **plain, **{x: constants[x] for x in ("PREFIX", "CACHE") if x in constants}})
    exact = wide(arguments)
    o, log_sum = chunked.forward.body(*exact.values())
    grad = torch.randn(o.shape, generator=torch.Generator(o.device).manual_seed(1), device=o.device)
    own_o, own_log_sum = forward(**arguments)
    found = backward(grad.to(own_o.dtype), own_o, own_log_sum, **arguments)
    wanted = chunked.backward.body(grad, o, log_sum, *exact.values())
    return [pair for pair in zip(found, wanted, strict=True) if pair[1].numel()]


KEYS = Kernel(window_attention_keys, configs, canary)
NOT_OF_KEYS = ("PREFIX", "CACHE")


def backward(
    grad: Tensor, o: Tensor, log_sum: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any
) -> list[Tensor]:
    """Gradients of q, k, v, prefix_k, prefix_v, cache_k, cache_v; empty for those that were None."""
    arguments, constants = call(q, k, v, *rest, **named)
    batch, length, heads, width = q.shape
    shared = k.shape[2]
    grad, o = grad.contiguous(), o.contiguous()
    along, d_q = torch.empty_like(log_sum), q.new_empty(q.shape)
    known = {"log_sum": log_sum, "grad": grad, "along": along}
    QUERIES(
        lambda it: (triton.cdiv(length, it["BLOCK_M"]), heads, batch),
        {**arguments, **known, "o": o, "d_q": d_q},
        {**constants, "GRAD": True},
    )
    names = ("q", "count", "borders", "length", "documents", "steps", "scale")
    known |= {name: arguments[name] for name in names}
    constants = {name: value for name, value in constants.items() if name not in NOT_OF_KEYS}

    def of(keys: Tensor, values: Tensor, kind: int, third: int, out: torch.dtype, spans: int = 1) -> list[Tensor]:
        size = keys.shape[-3]
        gradients = [q.new_empty(third, size, shared, width, dtype=out) for _ in range(2)]
        strides = {"K_STRIDE": keys.stride(-3), "V_STRIDE": values.stride(-3)}
        KEYS(
            lambda it: (triton.cdiv(size, it["BLOCK_N"]), shared, third),
            {**known, "k": keys, "v": values, "d_k": gradients[0], "d_v": gradients[1], "size": size, "spans": spans},
            {**constants, **strides, "KIND": kind, "SPAN": SPAN},
        )
        return gradients

    d_k, d_v = of(arguments["k"], arguments["v"], TOKENS, batch, q.dtype)
    d_prefix, d_cache = [q.new_empty(0), q.new_empty(0)], [q.new_empty(0), q.new_empty(0)]
    if arguments["prefix_k"] is not None:
        spans = triton.cdiv(length, SPAN)
        parts = of(arguments["prefix_k"], arguments["prefix_v"], PREFIXED, batch * spans, torch.float32, spans)
        d_prefix = [part.sum(0).to(q.dtype) for part in parts]
    if arguments["cache_k"] is not None:
        d_cache = of(arguments["cache_k"], arguments["cache_v"], CACHED, arguments["documents"], q.dtype)
    return [d_q, d_k, d_v, *d_prefix, *d_cache]
