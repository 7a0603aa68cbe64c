"""Attention over chosen chunks in Triton, by runs of queries: the output, and in the backward the gradient of q.

A program takes rows that read the same: the queries of one run, with the heads that share both their keys and their
choice. It goes through the run's chunks, of which most are one tile; a longer one is read twice, first for its own
log-sum-exp (in the backward, for D), then for what is added up. Softmax runs in powers of two, as in attention over a
window: the log-sum-exp that is kept is a log2.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel, Pairs, precision
from . import chunked
from .choose import weigh
from .layout import ChunkLayout
from .selection import select
from .tables import group_of, runs_of, starts_of

LARGEST = 64  # tokens of a tile: one chunk or a part of it
LOWEST = tl.constexpr(-1e30)  # below every score and finite: its difference from minus infinity is no NaN


@triton.jit
def tile(x, place, depth, there, D: tl.constexpr, STRIDE: tl.constexpr):
    """Rows ``place`` of x, STRIDE apart, [rows, depth]: zeros where not ``there``, and in columns beyond D."""
    pointers = x + place.to(tl.int64)[:, None] * STRIDE + depth[None, :]
    if depth.shape[0] != D:
        return tl.load(pointers, mask=there[:, None] & (depth < D)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=there[:, None], other=0.0)


@triton.jit
def join(
    total, top, mass, q, grad, k, v, place, depth, there, seen, bits,
    D: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a union. Forward: ``total`` and ``mass`` are sums of weighted values and of weights, relative to 2^top.
    With GRAD ``total`` is the gradient of q, ``top`` the log-sum-exp and ``mass`` the row sum of grad * o."""
    keys, values = tile(k, place, depth, there, D, K_STRIDE), tile(v, place, depth, there, D, V_STRIDE)
    scores = tl.where(seen, tl.dot(q, tl.trans(keys), input_precision=PRECISION) * bits, float("-inf"))
    if GRAD:
        slopes = tl.exp2(scores - top[:, None]) * (
            tl.dot(grad, tl.trans(values), input_precision=PRECISION) - mass[:, None]
        )
        total = tl.dot(slopes.to(keys.dtype), keys, total, input_precision=PRECISION)
    else:
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        mass = mass * shrink + tl.sum(weights, 1)
        total = tl.dot(weights.to(values.dtype), values, total * shrink[:, None], input_precision=PRECISION)
        top = higher
    return total, top, mass


@triton.jit
def measure(
    top, mass, q, grad, k, v, place, depth, there, bits,
    D: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First reading of a tile of a long chunk: forward maximum and sum of weights, with GRAD the sum D."""
    keys = tile(k, place, depth, there, D, K_STRIDE)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * bits
    scores = tl.where(there[None, :], scores, float("-inf"))
    if GRAD:
        values = tile(v, place, depth, there, D, V_STRIDE)
        along = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        mass += tl.sum(tl.exp2(scores - top[:, None]) * along, 1)
    else:
        higher = tl.maximum(top, tl.max(scores, 1))
        mass = mass * tl.exp2(top - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        top = higher
    return top, mass


@triton.jit
def add(
    total, top, mass, share, q, grad, k, v, place, depth, there, bits,
    D: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, GRAD: tl.constexpr, ONE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The second reading, of weight ``share``; for ONE, of the whole chunk, also the first. ``top`` is then found, or
    with GRAD ``mass``; else they are the chunk's log-sum-exp and D."""
    keys, values = tile(k, place, depth, there, D, K_STRIDE), tile(v, place, depth, there, D, V_STRIDE)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * bits
    scores = tl.where(there[None, :], scores, float("-inf"))
    if ONE and not GRAD:
        peak = tl.maximum(tl.max(scores, 1), LOWEST)
        sums = tl.sum(tl.exp2(scores - peak[:, None]), 1)
        top = tl.where(sums > 0, peak + tl.log2(tl.where(sums > 0, sums, 1.0)), float("inf"))
    weights = tl.exp2(scores - top[:, None])
    if GRAD:
        along = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        if ONE:
            mass = tl.sum(weights * along, 1)
        slopes = weights * share[:, None] * (along - mass[:, None])
        total = tl.dot(slopes.to(keys.dtype), keys, total, input_precision=PRECISION)
    else:
        weights = weights * share[:, None]
        total = tl.dot(weights.to(values.dtype), values, total, input_precision=PRECISION)
    return total, top, mass


@triton.jit(do_not_specialize=["queries"])
def chunk_attend(
    q, k, v, weights, chosen, starts, start, end, local, own, o, log_sum, grad, d_q, along, queries, scale,
    H: tl.constexpr, HKV: tl.constexpr, HS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DEPTH: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, TOP: tl.constexpr, SHARE: tl.constexpr,
    GROUP: tl.constexpr,
    UNION: tl.constexpr, ONE: tl.constexpr, GRAD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (run of queries and part of its rows, set of heads). ONE: no chunk is longer than a tile."""
    PARTS: tl.constexpr = (SHARE * GROUP + BLOCK_M - 1) // BLOCK_M
    run, first = tl.program_id(0) // PARTS, tl.program_id(1) * GROUP
    row = tl.program_id(0) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    lead, after = run, run + 1
    if SHARE > 1:
        lead, after = tl.load(starts + run), tl.load(starts + run + 1)
    token = lead + row // GROUP
    live = (row < SHARE * GROUP) & (token < after)
    lead = tl.minimum(lead, queries - 1)
    shared, chooser = first * HKV // H, first * HS // H
    head = first + row % GROUP
    depth, step = tl.arange(0, DEPTH), tl.arange(0, TILE)
    known = token.to(tl.int64) * H + head
    rows = tile(q + head[:, None] * D, token, depth, live, D, Q_STRIDE)
    total = tl.zeros([BLOCK_M, DEPTH], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    slope = rows
    if GRAD:
        slope = tile(grad, known, depth, live, D, D)
        if UNION:
            outputs = tile(o, known, depth, live, D, D)
            mass = tl.sum(slope.to(tl.float32) * outputs.to(tl.float32), 1)
            top = tl.load(log_sum + known, mask=live, other=float("inf"))
            tl.store(along + known, mass, mask=live)
    bits = scale * 1.4426950408889634
    keys, values = k + shared * D, v + shared * D
    choice = chosen + (lead.to(tl.int64) * HS + chooser) * TOP
    weight = (token.to(tl.int64) * HS + chooser) * TOP
    for i in range(TOP):
        number = tl.load(choice + i)
        begin = tl.load(start + tl.maximum(number, 0))
        stop = tl.where(number >= 0, tl.load(end + tl.maximum(number, 0)), begin)
        if UNION:
            if ONE:
                there = begin + step < stop
                total, top, mass = join(
                    total, top, mass, rows, slope, keys, values, begin + step, depth, there, there[None, :], bits,
                    D, K_STRIDE, V_STRIDE, GRAD, PRECISION,
                )  # fmt: skip
            else:
                for at in range(begin, stop, TILE):
                    there = at + step < stop
                    total, top, mass = join(
                        total, top, mass, rows, slope, keys, values, at + step, depth, there, there[None, :], bits,
                        D, K_STRIDE, V_STRIDE, GRAD, PRECISION,
                    )  # fmt: skip
        else:
            share = tl.load(weights + weight + i, mask=live, other=0.0)
            mass = tl.zeros([BLOCK_M], tl.float32)
            if GRAD:
                top = tl.load(log_sum + known * TOP + i, mask=live, other=float("inf"))
            else:
                top = tl.full([BLOCK_M], LOWEST, tl.float32)
            if ONE:
                total, top, mass = add(
                    total, top, mass, share, rows, slope, keys, values, begin + step, depth, begin + step < stop, bits,
                    D, K_STRIDE, V_STRIDE, GRAD, True, PRECISION,
                )  # fmt: skip
            else:
                for at in range(begin, stop, TILE):
                    top, mass = measure(
                        top, mass, rows, slope, keys, values, at + step, depth, at + step < stop, bits,
                        D, K_STRIDE, V_STRIDE, GRAD, PRECISION,
                    )  # fmt: skip
                if not GRAD:
                    top = tl.where(mass > 0, top + tl.log2(tl.where(mass > 0, mass, 1.0)), float("inf"))
                for at in range(begin, stop, TILE):
                    total, top, mass = add(
                        total, top, mass, share, rows, slope, keys, values, at + step, depth, at + step < stop, bits,
                        D, K_STRIDE, V_STRIDE, GRAD, False, PRECISION,
                    )  # fmt: skip
            if GRAD:
                tl.store(along + known * TOP + i, mass, mask=live)
            else:
                tl.store(log_sum + known * TOP + i, top, mask=live)
    if UNION:
        low = tl.load(local + token, mask=live, other=0)
        high = tl.load(own + token, mask=live, other=0)
        for at in range(tl.load(local + lead), tl.max(high), TILE):
            place = at + step
            seen = (place[None, :] >= low[:, None]) & (place[None, :] < high[:, None])
            total, top, mass = join(
                total, top, mass, rows, slope, keys, values, place, depth, place < tl.max(high), seen, bits,
                D, K_STRIDE, V_STRIDE, GRAD, PRECISION,
            )  # fmt: skip
    mask = live[:, None] & (depth < D)[None, :]
    entry = known[:, None] * D + depth[None, :]
    if GRAD:
        tl.store(d_q + entry, (total * scale).to(d_q.dtype.element_ty), mask=mask)
    else:
        if UNION:
            mass = tl.where(mass > 0, mass, 1.0)
            total = total / mass[:, None]
            tl.store(log_sum + known, top + tl.log2(mass), mask=live)
        tl.store(o + entry, total.to(o.dtype.element_ty), mask=mask)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """As many rows as there are, up to what registers hold."""
    rows = max(16, triton.next_power_of_2(constants["SHARE"] * constants["GROUP"]))
    if constants["DTYPE"] == "float32":
        sizes = [(32, 4, 1), (16, 4, 1)]
    elif constants["DEPTH"] > 64:
        sizes = [(64, 4, 2), (32, 4, 1)] if rows > 16 else [(16, 4, 3 if constants["GRAD"] else 2)]
    else:
        sizes = [(64, 4, 3), (128, 8, 2)]
    found = dict.fromkeys((min(rows, m), 4 if rows <= 64 else w, s) for m, w, s in sizes)
    return [Config((("BLOCK_M", m),), num_warps=w, num_stages=s) for m, w, s in found]


def problem(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with these constants: several chunks, of which a choice holds no more than there are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    kind = getattr(torch, constants["DTYPE"])
    heads, shared, choosers, width, size = (constants[name] for name in ("H", "HKV", "HS", "D", "E"))
    share, top = constants["SHARE"], constants["TOP"]
    longest = constants["TILE"] - 1 if constants["ONE"] else constants["TILE"] + 3
    length = 3 * longest + 5
    layout = ChunkLayout.regular(1, length, longest, share, device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device).to(kind)

    def tokens(heads: int, stride: int) -> Tensor:
        return draw(1, length, stride)[..., : heads * width].unflatten(-1, (heads, width))

    summaries = draw(1, length, choosers, size), draw(1, 4, choosers, size)
    tables = (layout.start, layout.end, layout.first, layout.last, layout.leader)
    return {
        "q": tokens(heads, constants["Q_STRIDE"]),
        "k": tokens(shared, constants["K_STRIDE"]),
        "v": tokens(shared, constants["V_STRIDE"]),
        "summary_q": summaries[0],
        "summary_k": summaries[1],
        "selection": select(*summaries, *tables, share, layout.blocks, top, 1.0, 0),
        "layout": layout.tensors,
        "share": share,
        "blocks": layout.blocks,
        "longest": longest,
        "union": constants["UNION"],
        "scale": width**-0.5,
        "summary_scale": size**-0.5,
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float32."""
    return {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def canary(constants: Mapping[str, Any]) -> Pairs:
    """What is kept, and the output, against the plain path; for GRAD every gradient."""
    if constants["GRAD"]:
        from .backward import canary as of_gradients

        return of_gradients(constants)
    arguments = problem(constants)
    o, log_sum, _ = chunked.forward(**wide(arguments))
    found = forward(**arguments)
    there = log_sum < float("inf")
    return [(found[0], o), ((found[1] * math.log(2))[there], log_sum[there])]


ATTEND = Kernel(chunk_attend, configs, canary)


def rows(x: Tensor) -> Tensor:
    """x [B, T, H, D] itself where its tokens lie a constant stride apart, heads side by side; else a copy."""
    even = x.stride(3) == 1 and x.stride(2) == x.shape[3] and x.stride(0) == x.shape[1] * x.stride(1)
    return x if even else x.contiguous()


def call(
    q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, selection: Tensor, layout: tuple[Tensor, ...], share: int,
    blocks: int, longest: int, union: bool, scale: float,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Arguments and constants that the kernels of forward and backward have in common."""
    start, end, _, _, local, own, leader = layout
    q, k, v = rows(q), rows(k), rows(v)
    heads, width, shared, choosers = q.shape[2], q.shape[3], k.shape[2], selection.shape[2]
    size = min(LARGEST, max(16, triton.next_power_of_2(longest or LARGEST)))
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "chosen": selection.contiguous(),
        "starts": starts_of(leader, share, blocks) if share > 1 else None,
        "start": start,
        "end": end,
        "local": local,
        "own": own,
        "queries": q.shape[0] * q.shape[1],
        "scale": scale,
    }
    constants = {
        "H": heads,
        "HKV": shared,
        "HS": choosers,
        "D": width,
        "E": summary_q.shape[3],
        "DEPTH": max(16, triton.next_power_of_2(width)),
        "Q_STRIDE": q.stride(1),
        "K_STRIDE": k.stride(1),
        "V_STRIDE": v.stride(1),
        "TOP": selection.shape[3],
        "SHARE": share,
        "GROUP": group_of(heads, shared, choosers),
        "UNION": union,
        "ONE": 0 < longest <= size,
        "DTYPE": str(q.dtype).removeprefix("torch."),
        "PRECISION": precision(q.dtype),
        "TILE": size,
    }
    return arguments, constants


def attend(arguments: dict[str, Any], constants: dict[str, Any], blocks: int, **tensors: Any) -> None:
    """Launch over all runs and sets of heads; with ``d_q`` among the tensors, for its gradient."""
    rows, sets = constants["SHARE"] * constants["GROUP"], constants["H"] // constants["GROUP"]
    outputs = dict.fromkeys(("weights", "o", "log_sum", "grad", "d_q", "along"))
    ATTEND(
        lambda it: (blocks * triton.cdiv(rows, it["BLOCK_M"]), sets),
        {**arguments, **outputs, **tensors},
        {**constants, "GRAD": "d_q" in tensors},
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, summary_k: Tensor, selection: Tensor,
    layout: tuple[Tensor, ...], share: int, blocks: int, longest: int, union: bool, scale: float, summary_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o [B, T, H, D], log2-sum-exp2 [Q, H, K] (K = 1 for a union), and weights [Q, Hs, K] (none for a union)."""
    share, blocks = runs_of(q, share, blocks)
    arguments, constants = call(q, k, v, summary_q, selection, layout, share, blocks, longest, union, scale)
    o = q.new_empty(q.shape)
    kept = 1 if union else selection.shape[3]
    log_sum = q.new_empty(arguments["queries"], q.shape[2], kept, dtype=torch.float32)
    if union:
        weights = q.new_empty(0, dtype=torch.float32)
    else:
        weights = weigh(summary_q, summary_k, selection, layout[-1], summary_scale)
    attend(arguments, constants, blocks, weights=weights, o=o, log_sum=log_sum)
    return o, log_sum, weights
