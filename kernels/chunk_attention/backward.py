"""Attention over chosen chunks in Triton, by tiles of chunks: the gradients of k and v.

A program goes through the queries of all runs that chose its chunk, in their order, and in a union through those that
read it as their own. Scores are computed transposed, [keys, queries], so that no product takes the transpose of another
one's result. No atomics.
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
from .choose import gradients
from .forward import attend, call, forward, problem, tile, wide
from .tables import invert, runs_of, starts_of


@triton.jit
def gather(
    sum_k, sum_v, keys, values, q, grad, log_sum, along, share, token, head, kept, depth, live, seen, bits,
    H: tl.constexpr, D: tl.constexpr, Q_STRIDE: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what some rows, each a query and a head, give to the gradients of the keys and values that they see."""
    known = token.to(tl.int64) * H + head
    rows = tile(q + head[:, None] * D, token, depth, live, D, Q_STRIDE)
    slope = tile(grad, known, depth, live, D, D)
    # Where no row is, the log-sum-exp is infinite, and so every weight zero.
    top = tl.load(log_sum + known * KEPT + kept, mask=live, other=float("inf"))
    mass = tl.load(along + known * KEPT + kept, mask=live, other=0.0)
    weights = tl.exp2(tl.dot(keys, tl.trans(rows), input_precision=PRECISION) * bits - top[None, :])
    weights = tl.where(seen, weights, 0.0) * share[None, :]
    sum_v = tl.dot(weights.to(slope.dtype), slope, sum_v, input_precision=PRECISION)
    slopes = weights * (tl.dot(values, tl.trans(slope), input_precision=PRECISION) - mass[None, :])
    return tl.dot(slopes.to(rows.dtype), rows, sum_k, input_precision=PRECISION), sum_v


@triton.jit(do_not_specialize=["chunks", "steps", "queries"])
def chunk_keys(
    q, k, v, weights, starts, pairs, offsets, start, end, tiles, local, own, since, until, log_sum, grad, along,
    d_k, d_v, chunks, steps, queries, scale,
    H: tl.constexpr, HKV: tl.constexpr, HS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DEPTH: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, TOP: tl.constexpr, SHARE: tl.constexpr,
    GROUP: tl.constexpr, UNION: tl.constexpr, ONE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (tile of a chunk, key head); ``tiles`` [M + 1] are borders between those of each chunk, if not ONE."""
    ROWS: tl.constexpr = SHARE * GROUP
    KEPT: tl.constexpr = 1 if UNION else TOP
    chunk, shared = tl.program_id(0), tl.program_id(1)
    begin = chunk * 0
    if not ONE:
        chunk = document_of(tiles, chunk, chunks, steps)
        begin = (tl.program_id(0) - tl.load(tiles + chunk)) * TILE
    begin += tl.load(start + chunk)
    depth = tl.arange(0, DEPTH)
    place = begin + tl.arange(0, TILE)
    there = place < tl.load(end + chunk)
    keys = tile(k + shared * D, place, depth, there, D, K_STRIDE)
    values = tile(v + shared * D, place, depth, there, D, V_STRIDE)
    sum_k, sum_v = tl.zeros([TILE, DEPTH], tl.float32), tl.zeros([TILE, DEPTH], tl.float32)
    bits = scale * 1.4426950408889634
    for set in range(H // HKV // GROUP):
        first = shared * (H // HKV) + set * GROUP
        chooser = first * HS // H
        low = tl.load(offsets + chooser * chunks + chunk)
        high = tl.load(offsets + chooser * chunks + chunk + 1)
        for at in range(0, (high - low) * ROWS, BLOCK_M):
            row = at + tl.arange(0, BLOCK_M)
            live = low + row // ROWS < high
            pair = tl.load(pairs + low + row // ROWS, mask=live, other=0)
            run = pair // (HS * TOP)
            token, after = run, run + 1
            if SHARE > 1:
                token = tl.load(starts + run, mask=live, other=0) + row % ROWS // GROUP
                after = tl.load(starts + run + 1, mask=live, other=0)
            live = live & (token < after)
            kept, share = pair * 0, tl.full([BLOCK_M], 1.0, tl.float32)
            if not UNION:
                kept = pair % TOP
                share = tl.load(weights + (token.to(tl.int64) * HS + chooser) * TOP + kept, mask=live, other=0.0)
            sum_k, sum_v = gather(
                sum_k, sum_v, keys, values, q, grad, log_sum, along, share, token, first + row % GROUP, kept, depth,
                live, there[:, None], bits, H, D, Q_STRIDE, KEPT, PRECISION,
            )  # fmt: skip
    if UNION:
        low, high = tl.load(since + chunk), tl.load(until + chunk)
        for member in range(H // HKV):
            head = tl.zeros([BLOCK_M], tl.int32) + shared * (H // HKV) + member
            for at in range(low, high, BLOCK_M):
                token = at + tl.arange(0, BLOCK_M)
                live = token < high
                seen = place[:, None] >= tl.load(local + token, mask=live, other=0)[None, :]
                seen = seen & (place[:, None] < tl.load(own + token, mask=live, other=0)[None, :]) & there[:, None]
                sum_k, sum_v = gather(
                    sum_k, sum_v, keys, values, q, grad, log_sum, along, tl.full([BLOCK_M], 1.0, tl.float32), token,
                    head, token * 0, depth, live, seen, bits, H, D, Q_STRIDE, KEPT, PRECISION,
                )  # fmt: skip
    entry = (place.to(tl.int64)[:, None] * HKV + shared) * D + depth[None, :]
    mask = there[:, None] & (depth < D)[None, :]
    tl.store(d_k + entry, (sum_k * scale).to(d_k.dtype.element_ty), mask=mask)
    tl.store(d_v + entry, sum_v.to(d_v.dtype.element_ty), mask=mask)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """Two sums of a tile of keys are held: few rows at a time."""
    if constants["DTYPE"] == "float32" or constants["DEPTH"] > 64:
        sizes = [(32, 8, 1), (16, 4, 1)]
    else:
        sizes = [(32, 4, 3), (64, 8, 2 if constants["TILE"] > 32 else 1)]
    return [Config((("BLOCK_M", m),), num_warps=w, num_stages=s) for m, w, s in sizes]


def canary(constants: Mapping[str, Any]) -> Pairs:
    """Every gradient against the plain path's."""
    arguments = problem(constants)
    exact = wide(arguments)
    o, log_sum, weights = chunked.forward(**exact)
    grad = torch.randn(o.shape, generator=torch.Generator(o.device).manual_seed(1), device=o.device)
    own = forward(**arguments)
    found = backward(grad.to(own[0].dtype), *own, **arguments)
    wanted = chunked.backward(grad, o, log_sum, weights, **exact)
    return list(zip(found, wanted, strict=True))[: 3 if constants["UNION"] else 5]


KEYS = Kernel(chunk_keys, configs, canary)


def backward(
    grad: Tensor, o: Tensor, log_sum: Tensor, weights: Tensor, q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor,
    summary_k: Tensor, selection: Tensor, layout: tuple[Tensor, ...], share: int, blocks: int, longest: int,
    union: bool, scale: float, summary_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, summary_q and summary_k; those of a union's summaries are zero."""
    share, blocks = runs_of(q, share, blocks)
    arguments, constants = call(q, k, v, summary_q, selection, layout, share, blocks, longest, union, scale)
    start, end, _, _, local, own, leader = layout
    grad = grad.contiguous()
    d_q, along = q.new_empty(q.shape), torch.empty_like(log_sum)
    kept = {"o": o, "log_sum": log_sum, "weights": weights, "grad": grad}
    attend(arguments, constants, blocks, **kept, d_q=d_q, along=along)
    starts = arguments["starts"] if share > 1 else starts_of(leader, share, blocks)
    inverse = invert(selection, starts, start.numel())
    d_k, d_v = k.new_zeros(k.shape), v.new_zeros(v.shape)  # tokens of no chunk have no gradient
    programs, tiles = start.numel(), None
    if not constants["ONE"]:
        counts = (end - start + constants["TILE"] - 1) // constants["TILE"]
        tiles = torch.nn.functional.pad(torch.cumsum(counts, 0, dtype=torch.int32), (1, 0))
        programs += k.shape[0] * k.shape[1] // constants["TILE"]
    since, until = None, None
    if union:
        since = torch.searchsorted(own, start, right=True, out_int32=True)
        until = torch.searchsorted(local, end - 1, right=True, out_int32=True)
    shared = {name: arguments[name] for name in ("q", "k", "v", "start", "end", "local", "own", "queries", "scale")}
    KEYS(
        lambda it: (programs, k.shape[2]),
        {
            **shared,
            "weights": weights,
            "starts": starts if share > 1 else None,
            "pairs": inverse.pairs,
            "offsets": inverse.offsets,
            "tiles": tiles,
            "since": since,
            "until": until,
            "log_sum": log_sum,
            "grad": grad,
            "along": along,
            "d_k": d_k,
            "d_v": d_v,
            "chunks": start.numel(),
            "steps": (start.numel() - 1).bit_length(),
        },
        constants,
    )
    if union:
        return d_q, d_k, d_v, torch.zeros_like(summary_q), torch.zeros_like(summary_k)
    d_summaries = gradients(
        along, weights, selection, leader, summary_q, summary_k, inverse, share, summary_scale
    )  # fmt: skip
    return d_q, d_k, d_v, *d_summaries
