"""Cross-entropy over a vocabulary in Triton, backward: a span of the vocabulary at a time, without atomics.

For each span, one kernel computes the logits again and writes the losses' gradients with respect to them, G
[tokens, span], in x's dtype; two products follow, dW[span] = G^T x, complete, and dx += G W[span]. These are four
products over forward and backward, as in Cut Your Losses. That paper holds no such G: it adds each tile into dx and dW
under locks, in an order that changes from run to run. A kernel for dx and one for dW that both compute the logits again
would hold none either, at five products, and would add into dx [tokens, d] in memory once per tile instead of once per
span, since a block of its rows does not fit in registers. G has as many entries as ``chunk`` tokens have logits, 2^26
when that is not given: at 32k tokens, 2048 of the 128k columns, 128 MB in bfloat16 where all logits take 8.6 GB.

G has the incoming gradients divided by the largest of them, and the products' sums, in float32, are multiplied with it:
those of a mean over many tokens would underflow in float16.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel, Pairs, precision
from . import chunked
from .forward import call, logits, problem, tiles, wide

GRAIN = 128  # tokens and entries of a block that filtering keeps or skips; spans are whole blocks
ENTRIES = 2**26  # of G when ``chunk`` is not given


@triton.jit(do_not_specialize=["tokens", "depths", "entries", "first", "grains"])
def linear_cross_entropy_slopes(
    x, weight, label, log_sum, incoming, slopes, kept, tokens, depths, entries, first, grains, smoothing, z_loss,
    softcap, threshold,
    D: tl.constexpr, V: tl.constexpr, X_STRIDE: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr,
    FILTER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, GRAIN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (block of entries, block of tokens): G, for ``entries`` entries from number ``first`` on, then zeros.

    G has ``grains`` * GRAIN columns. With FILTER a block whose entries are all below ``threshold``, before the incoming
    gradient, is marked as not kept.
    """
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = token < tokens
    target = tl.load(label + token, mask=live, other=-1)
    known = tl.load(log_sum + token, mask=live, other=0.0)[:, None]
    z = logits(x, weight, token, tokens, entry, entries, depths, softcap, D, X_STRIDE, SOFTCAP, PRECISION, BLOCK_D)
    g = tl.exp(z - known) * (1.0 + 2.0 * z_loss * known)
    g -= tl.where(entry[None, :] + first == target[:, None], 1.0 - smoothing, 0.0)
    if SMOOTH:
        g -= smoothing / V
    if SOFTCAP:
        g *= 1.0 - (z / softcap) * (z / softcap)
    counts = (target >= 0)[:, None] & (entry < entries)[None, :]
    g = tl.where(counts, g, 0.0)
    width = grains * GRAIN  # in the kernel, so that the compiler knows what divides it
    mask = live[:, None] & (entry < width)[None, :]
    if FILTER:
        mark = tl.max((tl.abs(g) >= threshold).to(tl.int32))
        tl.store(kept + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), mark)
        mask = tl.where(mark > 0, mask, False)
    g *= tl.load(incoming + token, mask=target >= 0, other=0.0)[:, None]
    block = slopes + (tl.program_id(1) * BLOCK_N).to(tl.int64) * width
    place = tl.arange(0, BLOCK_N)[:, None] * width + entry[None, :]
    tl.store(block + place, g.to(slopes.dtype.element_ty), mask=mask)


@triton.jit
def multiply(
    a, b, total, row, rows, column, depth, depths, width,
    D: tl.constexpr, B_STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the product of a tile of G, or of its transpose, and one of b [., D] to ``total``.

    G is zero or never used where it has columns beyond the span; only tokens can be out of bounds.
    """
    at, there = depth.to(tl.int64), depth < depths
    if TRANSPOSED:
        left = tl.load(a + at[None, :] * width + row[:, None], mask=there[None, :], other=0.0)
    else:
        left = tl.load(a + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * width + depth[None, :])
    mask = there[:, None] & (column < D)[None, :]
    right = tl.load(b + at[:, None] * B_STRIDE + column[None, :], mask=mask, other=0.0)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows", "depths", "grains", "tiles"])
def linear_cross_entropy_product(
    a, b, before, out, kept, scale, rows, depths, grains, tiles,
    D: tl.constexpr, B_STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr, ADD: tl.constexpr, FILTER: tl.constexpr,
    DTYPE: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, GRAIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, block of rows): out = (with ADD, before +) scale G b, or G^T b with TRANSPOSED."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    width = grains * GRAIN
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if FILTER:
        tile = tl.program_id(1) * BLOCK_M // GRAIN
        for grain in range(0, tl.cdiv(depths, GRAIN)):
            mark = tl.load(kept + (grain * tiles + tile if TRANSPOSED else tile * tiles + grain))
            if mark != 0:
                for start in range(0, GRAIN, BLOCK_K):
                    depth = grain * GRAIN + start + tl.arange(0, BLOCK_K)
                    total = multiply(
                        a, b, total, row, rows, column, depth, depths, width, D, B_STRIDE, TRANSPOSED, PRECISION
                    )
    else:
        for start in range(0, depths, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            total = multiply(a, b, total, row, rows, column, depth, depths, width, D, B_STRIDE, TRANSPOSED, PRECISION)
    block = (tl.program_id(1) * BLOCK_M).to(tl.int64) * D
    place = tl.arange(0, BLOCK_M)[:, None] * D + column[None, :]
    mask = (row < rows)[:, None] & (column < D)[None, :]
    total *= tl.load(scale)
    if ADD:
        total += tl.load(before + block + place, mask=mask, other=0.0)
    tl.store(out + block + place, total.to(out.dtype.element_ty), mask=mask)


def slope_configs(constants: Mapping[str, Any]) -> list[Config]:
    """With filtering a tile is a block that is kept or skipped; a soft-cap is as in the forward."""
    narrow = constants["FILTER"] or constants["SOFTCAP"]
    return tiles(constants, ("BLOCK_N", "BLOCK_V", "BLOCK_D"), narrow)


def product_configs(constants: Mapping[str, Any]) -> list[Config]:
    """Rows are a block that filtering keeps or skips; its depth goes into that block.

    A wider tile and what is added to it take more registers than there are.
    """
    return tiles(constants, ("BLOCK_M", "BLOCK_N", "BLOCK_K"), False)[: 1 if constants["ADD"] else 2]


def canary(constants: Mapping[str, Any]) -> Pairs:
    """Both gradients against the plain path's, in three spans; what constants leave open is drawn with everything on.

    The threshold is so small that every block is kept, for only then are the gradients exact.
    """
    width, entries = constants["D"], constants.get("V", 2 * GRAIN + 44)
    known = {"X_STRIDE": width, "SMOOTH": True, "SOFTCAP": True, **constants, "V": entries}
    arguments = problem(known)
    exact = wide(arguments)
    grad = torch.linspace(-1, 1, len(arguments["target"]), device=arguments["x"].device)
    if constants.get("OUT", constants["DTYPE"]) != constants["DTYPE"]:
        arguments["weight"] = arguments["weight"].to(getattr(torch, constants["OUT"]))
    log_sum = torch.logsumexp(_capped(exact), 1)
    threshold = 1e-30 if constants["FILTER"] else None
    chunk = triton.cdiv(entries, 3 * GRAIN) * GRAIN * len(grad) // entries
    found = backward(grad, **arguments, log_sum=log_sum, threshold=threshold, chunk=chunk)
    wanted = chunked.backward.body(grad, *exact.values(), 128)
    return list(zip(found, wanted, strict=True))


def _capped(arguments: dict[str, Any]) -> Tensor:
    z = arguments["x"] @ arguments["weight"].mT
    cap = arguments["softcap"]
    return z if cap is None else cap * torch.tanh(z / cap)


SLOPES = Kernel(linear_cross_entropy_slopes, slope_configs, canary)
PRODUCT = Kernel(linear_cross_entropy_product, product_configs, canary)


def product(
    a: Tensor, b: Tensor, scale: Tensor, out: Tensor, before: Tensor | None, kept: Tensor | None, transposed: bool
) -> None:
    """out [., D] = scale G b, or G^T b, in addition to ``before``; rows and depth are those of out and b."""
    rows, width = out.shape
    constants = {
        "D": width,
        "B_STRIDE": b.stride(0),
        "TRANSPOSED": transposed,
        "ADD": before is not None,
        "FILTER": kept is not None,
        "DTYPE": str(b.dtype).removeprefix("torch."),
        "OUT": str(out.dtype).removeprefix("torch."),
        "PRECISION": precision(b.dtype),
        "GRAIN": GRAIN,
    }
    arguments = {"a": a, "b": b, "before": before, "out": out, "kept": kept, "scale": scale, "rows": rows}
    arguments |= {"depths": b.shape[0], "grains": a.shape[1] // GRAIN, "tiles": 0 if kept is None else kept.shape[1]}
    PRODUCT(
        lambda it: (triton.cdiv(width, it["BLOCK_N"]), triton.cdiv(rows, it["BLOCK_M"])),
        arguments,
        constants,
    )


def _span_grid(entries: int, tokens: int) -> Callable[[Mapping[str, Any]], tuple[int, ...]]:
    """The grid of SLOPES over a span of the vocabulary."""
    return lambda it: (triton.cdiv(entries, it["BLOCK_V"]), triton.cdiv(tokens, it["BLOCK_N"]))


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
    threshold: float | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, d] and weight [V, d] for the incoming gradients ``grad`` [N] of the tokens' losses."""
    arguments, constants = call(x, weight, target, ignore_index, smoothing, softcap)
    (tokens, depth), entries = x.shape, weight.shape[0]
    if tokens == 0:
        return torch.empty_like(x), torch.zeros_like(weight)
    x, narrow = arguments["x"], arguments.pop("weight")
    most = ENTRIES if chunk is None else chunk * entries
    span = min(triton.cdiv(entries, GRAIN), max(1, most // (tokens * GRAIN))) * GRAIN
    slopes = x.new_empty(tokens, span)
    d_x, d_weight = x.new_empty(tokens, depth), weight.new_empty(weight.shape)
    sums = None if span >= entries else x.new_zeros(tokens, depth, dtype=torch.float32)
    numbers = {"smoothing": smoothing, "z_loss": z_loss, "threshold": threshold or 0.0, "grains": span // GRAIN}
    scale = grad.abs().amax().float()
    rows = {"log_sum": log_sum.contiguous(), "incoming": grad.float() / scale.where(scale > 0, 1)}
    for first in range(0, entries, span):
        part = narrow[first : first + span]
        size = part.shape[0]
        kept = None
        if threshold is not None:
            kept = x.new_empty(triton.cdiv(tokens, GRAIN), triton.cdiv(size, GRAIN), dtype=torch.int32)
        own = {"weight": part, "slopes": slopes, "kept": kept, "entries": size, "first": first}
        SLOPES(
            _span_grid(size, tokens),
            {**arguments, **rows, **numbers, **own},
            {**constants, "FILTER": threshold is not None, "GRAIN": GRAIN},
        )
        product(slopes, x, scale, d_weight[first : first + span], None, kept, transposed=True)
        out = d_x if sums is None or first + span >= entries else sums
        product(slopes, part, scale, out, sums, kept, transposed=False)
    return d_x, d_weight
