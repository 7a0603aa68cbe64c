"""Window attention in Triton, by blocks of queries: the output, and in the backward the gradient of q.

Both go through the same keys in the same order, the prefix, the cached tokens and the tokens of the window; one kernel
does either. Softmax runs in powers of two: scores are scaled by log2(e), and the log-sum-exp that is kept is a log2. In
packed rows every query sees from its own document's first token on, and a block of queries may hold several documents.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import document_of
from ..launch import Config, Kernel, Pairs, precision
from . import chunked

LENGTH = 333  # tokens of the canary: two and a half of the longest blocks
LOWEST = tl.constexpr(-1e30)  # below every score and finite: its difference from minus infinity is no NaN


@triton.jit
def tile(x, place, depth, there, D: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr):
    """Rows ``place`` of x, STRIDE apart, [rows, depth]: zeros where not ``there``, and in columns beyond D."""
    pointers = x + place[:, None] * STRIDE + depth[None, :]
    if MASKED:
        return tl.load(pointers, mask=there[:, None] & (depth < D)[None, :], other=0.0)
    elif depth.shape[0] != D:
        return tl.load(pointers, mask=(depth < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def visit(
    total, top, mass, q, grad, k, v, place, depth, there, seen, scale,
    D: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, MASKED: tl.constexpr, GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys and values, rows ``place`` of k and v, some of which are ``seen`` by each query.

    Forward: ``total`` is the weighted sum of values, ``mass`` that of the weights, both relative to 2^top. With GRAD
    ``total`` is the gradient of q, ``top`` the log-sum-exp and ``mass`` the row sum of grad * o.
    """
    keys = tile(k, place, depth, there, D, K_STRIDE, MASKED)
    values = tile(v, place, depth, there, D, V_STRIDE, MASKED)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    if GRAD:
        weights = tl.exp2(scores - top[:, None])
        along = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        slopes = weights * (along - mass[:, None])
        total = tl.dot(slopes.to(keys.dtype), keys, total, input_precision=PRECISION)
    else:
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        mass = mass * shrink + tl.sum(weights, 1)
        total = tl.dot(weights.to(values.dtype), values, total * shrink[:, None], input_precision=PRECISION)
        top = higher
    return total, top, mass


@triton.jit(do_not_specialize=["length", "prefixes", "cached", "documents", "steps"])
def window_attention_queries(
    q, k, v, prefix_k, prefix_v, cache_k, cache_v, count, borders, o, log_sum, grad, d_q, along,
    length, prefixes, cached, documents, steps, scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, CACHE: tl.constexpr,
    PACKED: tl.constexpr, GRAD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, head, row). WINDOW 0: no window. ``scale`` is that of the scores, natural."""
    row, head = tl.program_id(2), tl.program_id(1)
    shared = head // (H // HKV)
    begin = tl.program_id(0) * BLOCK_M
    time, step = begin + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    depth = tl.arange(0, DEPTH)
    live = time < length
    far = row.to(tl.int64) * length  # a row's first token; also makes an offset 64 bits wide
    zero = far * 0
    first = time * 0
    number = first + row
    if PACKED:
        number = document_of(borders, tl.minimum(time, length - 1), documents, steps)
        first = tl.load(borders + number)
    queries = tile(q + (far + begin) * Q_STRIDE + head * D, tl.arange(0, BLOCK_M), depth, live, D, Q_STRIDE, True)
    total = tl.zeros([BLOCK_M, DEPTH], tl.float32)
    place = (row * H + head).to(tl.int64) * length + time
    out = (far + begin) * (H * D) + head * D
    if GRAD:
        slope = tile(grad + out, tl.arange(0, BLOCK_M), depth, live, D, H * D, True)
        outputs = tile(o + out, tl.arange(0, BLOCK_M), depth, live, D, H * D, True)
        mass = tl.sum(slope.to(tl.float32) * outputs.to(tl.float32), 1)
        tl.store(along + place, mass, mask=live)
        top = tl.load(log_sum + place, mask=live, other=0.0)
    else:
        slope = queries
        mass = tl.zeros([BLOCK_M], tl.float32)
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
    bits = scale * 1.4426950408889634

    if PREFIX:
        for start in range(0, prefixes, BLOCK_N):
            there = start + step < prefixes
            total, top, mass = visit(
                total, top, mass, queries, slope, prefix_k + shared * D, prefix_v + shared * D, start + step, depth,
                there, there[None, :], bits, D, HKV * D, HKV * D, True, GRAD, PRECISION,
            )  # fmt: skip
    if CACHE:
        for document in range(tl.min(number), tl.max(number) + 1):
            own = cached - tl.load(count + document)
            opening = document * 0
            if PACKED:
                opening = tl.load(borders + document)
            if WINDOW > 0:
                own = tl.maximum(own, cached + tl.maximum(begin - opening, 0) - WINDOW + 1)
            entry = ((zero + document) * cached * HKV + shared) * D
            for start in range(own, cached, BLOCK_N):
                slot = start + step
                there = slot < cached
                seen = there[None, :] & (number == document)[:, None]
                if WINDOW > 0:
                    seen = seen & (time[:, None] - opening - slot[None, :] + cached < WINDOW)
                total, top, mass = visit(
                    total, top, mass, queries, slope, cache_k + entry, cache_v + entry, slot, depth, there, seen,
                    bits, D, HKV * D, HKV * D, True, GRAD, PRECISION,
                )  # fmt: skip
    # Keys low .. begin are split into those that some query does not see, and whole blocks that all see.
    low, edge, stop = tl.min(first), tl.max(first), tl.minimum(begin + BLOCK_M, length)
    if WINDOW > 0:
        low, edge = tl.maximum(low, begin - WINDOW + 1), tl.maximum(edge, begin + BLOCK_M - WINDOW)
    left = tl.minimum(low + tl.cdiv(tl.maximum(edge - low, 0), BLOCK_N) * BLOCK_N, stop)
    right = left + tl.maximum(begin + 1 - left, 0) // BLOCK_N * BLOCK_N
    for part in tl.static_range(3):
        if part == 0:
            head_of, tail_of = low, left
        elif part == 1:
            head_of, tail_of = left, right
        else:
            head_of, tail_of = right, stop
        for start in range(head_of, tail_of, BLOCK_N):
            key = start + step
            seen = (key[None, :] <= time[:, None]) & (key[None, :] >= first[:, None])
            if WINDOW > 0:
                seen = seen & (key[None, :] > time[:, None] - WINDOW)
            total, top, mass = visit(
                total, top, mass, queries, slope, k + (far + start) * K_STRIDE + shared * D,
                v + (far + start) * V_STRIDE + shared * D, step, depth, key < length, seen, bits,
                D, K_STRIDE, V_STRIDE, part != 1, GRAD, PRECISION,
            )  # fmt: skip

    mask = live[:, None] & (depth < D)[None, :]
    entry = out + tl.arange(0, BLOCK_M)[:, None] * (H * D) + depth[None, :]
    if GRAD:
        tl.store(d_q + entry, (total * scale).to(d_q.dtype.element_ty), mask=mask)
    else:
        mass = tl.where(live, mass, 1.0)
        tl.store(o + entry, (total / mass[:, None]).to(o.dtype.element_ty), mask=mask)
        tl.store(log_sum + place, top + tl.log2(mass), mask=live)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """One spills on no architecture; the backward holds two more tiles than the forward, too many for wide heads."""
    if constants["DTYPE"] == "float32":
        sizes = [(64, 32, 4, 2), (32, 32, 4, 2)]
    elif constants["DEPTH"] > 64:
        sizes = [(64, 32, 4, 3)] if constants["GRAD"] else [(128, 64, 8, 3), (64, 32, 4, 3)]
    elif constants["GRAD"]:
        sizes = [(128, 64, 8, 2), (64, 32, 4, 3)]
    else:
        sizes = [(128, 64, 4, 3), (64, 64, 4, 3)]
    return [Config((("BLOCK_M", m), ("BLOCK_N", n)), num_warps=w, num_stages=s) for m, n, w, s in sizes]


def problem(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with these constants."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    kind, packed = getattr(torch, constants["DTYPE"]), constants["PACKED"]
    heads, shared, width, length = constants["H"], constants["HKV"], constants["D"], LENGTH
    rows, documents = (1, 4) if packed else (2, 2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device).to(kind)

    def tokens(heads: int, stride: int) -> Tensor:
        return draw(rows, length, stride)[..., : heads * width].unflatten(-1, (heads, width))

    prefix = [draw(21, shared, width) if constants["PREFIX"] else None for _ in range(2)]
    cache = [draw(documents, 70, shared, width) if constants["CACHE"] else None for _ in range(2)]
    return {
        "q": tokens(heads, constants["Q_STRIDE"]),
        "k": tokens(shared, constants["K_STRIDE"]),
        "v": tokens(shared, constants["V_STRIDE"]),
        "prefix_k": prefix[0],
        "prefix_v": prefix[1],
        "cache_k": cache[0],
        "cache_v": cache[1],
        "count": torch.tensor([70, 33, 5, 0][:documents], dtype=torch.int32, device=device)
        if constants["CACHE"]
        else None,
        "cu_seqlens": torch.tensor([0, 1, length // 2, length // 2, length], dtype=torch.int32, device=device)
        if packed
        else None,
        "window": constants["WINDOW"] or None,
        "scale": width**-0.5,
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float32."""
    return {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def canary(constants: Mapping[str, Any]) -> Pairs:
    """The output against the plain path; for GRAD every gradient."""
    if constants["GRAD"]:
        from .backward import canary as of_gradients

        return of_gradients(constants)
    arguments = problem(constants)
    o, log_sum = chunked.forward.body(*wide(arguments).values())
    found = forward(**arguments)
    return [(found[0], o), (found[1] * math.log(2), log_sum)]


QUERIES = Kernel(window_attention_queries, configs, canary)


def rows(x: Tensor) -> Tensor:
    """x [B, T, H, D] itself where its tokens lie a constant stride apart, heads side by side; else a copy."""
    even = x.stride(3) == 1 and x.stride(2) == x.shape[3] and x.stride(0) == x.shape[1] * x.stride(1)
    return x if even else x.contiguous()


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that the kernels of forward and backward have in common."""
    batch, length, heads, width = q.shape
    q, k, v = rows(q), rows(k), rows(v)
    documents = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    pairs = {"prefix_k": prefix_k, "prefix_v": prefix_v, "cache_k": cache_k, "cache_v": cache_v}
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        **{name: None if x is None else x.contiguous() for name, x in pairs.items()},
        "count": count,
        "borders": cu_seqlens,
        "length": length,
        "prefixes": 0 if prefix_k is None else prefix_k.shape[0],
        "cached": 0 if cache_k is None else cache_k.shape[1],
        "documents": documents,
        "steps": (documents - 1).bit_length(),
        "scale": scale,
    }
    constants = {
        "H": heads,
        "HKV": k.shape[2],
        "D": width,
        "DEPTH": max(16, triton.next_power_of_2(width)),
        "Q_STRIDE": q.stride(1),
        "K_STRIDE": k.stride(1),
        "V_STRIDE": v.stride(1),
        "WINDOW": window or 0,
        "PREFIX": prefix_k is not None,
        "CACHE": cache_k is not None,
        "PACKED": cu_seqlens is not None,
        "DTYPE": str(q.dtype).removeprefix("torch."),
        "PRECISION": precision(q.dtype),
    }
    return arguments, constants


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Attention o [B, T, H, D] and its log2-sum-exp2 [B, H, T]; arguments as :func:`call`."""
    arguments, constants = call(q, k, v, *rest, **named)
    batch, length, heads, _ = q.shape
    o, log_sum = q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)
    QUERIES(
        lambda it: (triton.cdiv(length, it["BLOCK_M"]), heads, batch),
        {**arguments, "o": o, "log_sum": log_sum, "grad": None, "d_q": None, "along": None},
        {**constants, "GRAD": False},
    )
    return o, log_sum
