"""The choice of chunks and their weights in Triton, and in the backward the gradients of the summaries.

``chunk_select`` streams over a leader's candidates and keeps the best in registers, in no order until the end.
``chunk_weigh`` gathers the summaries of what was chosen; ``chunk_spread`` goes through a chunk's choosers in their
order. No atomics.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel, Pairs, precision
from . import chunked, selection
from .layout import ChunkLayout
from .tables import Tables, invert, runs_of, starts_of

LAST = tl.constexpr(2**30)  # above every number of a chunk


@triton.jit(do_not_specialize=["queries", "runs"])
def chunk_select(
    summary_q, summary_k, starts, start, end, first, last, found, queries, runs, scale,
    HS: tl.constexpr, E: tl.constexpr, DEPTH: tl.constexpr, TOP: tl.constexpr, CHOICES: tl.constexpr,
    SHARE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (tile of runs, head): the TOP best chunks of every run, of equal ones the lower first, then -1."""
    head = tl.program_id(1)
    run = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lead = run
    if SHARE > 1:
        lead = tl.load(starts + run, mask=run < runs, other=queries)
    live = (run < runs) & (lead < queries)
    depth, column, choice = tl.arange(0, DEPTH), tl.arange(0, BLOCK_N), tl.arange(0, CHOICES)
    inside = (depth < E)[None, :]
    entry = (lead.to(tl.int64) * HS + head)[:, None] * E + depth[None, :]
    rows = tl.load(summary_q + entry, mask=live[:, None] & inside, other=0.0)
    low, high = tl.load(first + lead, mask=live, other=LAST), tl.load(last + lead, mask=live, other=0)
    value = tl.full([BLOCK_M, CHOICES], float("-inf"), tl.float32)
    kept = tl.full([BLOCK_M, CHOICES], -1, tl.int32)
    for at in range(tl.min(low), tl.max(high), BLOCK_N):
        number = at + column
        there = number < tl.max(high)
        full = tl.load(start + number, mask=there, other=0) < tl.load(end + number, mask=there, other=0)
        below = (number.to(tl.int64) * HS + head)[:, None] * E + depth[None, :]
        chunks = tl.load(summary_k + below, mask=there[:, None] & inside, other=0.0)
        score = tl.dot(rows, tl.trans(chunks), input_precision=PRECISION) * scale
        score = tl.where(score == score, score, float("-inf"))
        free = (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None]) & full[None, :]
        for _ in range(TOP):
            best = tl.max(tl.where(free, score, float("-inf")), 1)
            pick = tl.min(tl.where(free & (score == best[:, None]), number[None, :], LAST), 1)
            free = free & (number[None, :] != pick[:, None])
            # What leaves: an empty place, or else the lowest value, of equal ones the highest chunk.
            empty = (kept < 0) & (choice < TOP)[None, :]
            hole = tl.min(tl.where(empty, choice[None, :], CHOICES), 1)
            least = tl.min(tl.where(kept >= 0, value, float("inf")), 1)
            worst = tl.max(tl.where((kept >= 0) & (value == least[:, None]), kept, -1), 1)
            holed = hole < CHOICES
            enter = (pick < LAST) & (holed | (best > least))
            place = tl.where(holed[:, None], choice[None, :] == hole[:, None], kept == worst[:, None])
            place = place & enter[:, None]
            value = tl.where(place, best[:, None], value)
            kept = tl.where(place, pick[:, None], kept)
    out = (run.to(tl.int64) * HS + head) * TOP
    for i in range(TOP):
        best = tl.max(tl.where(kept >= 0, value, float("-inf")), 1)
        pick = tl.min(tl.where((kept >= 0) & (value == best[:, None]), kept, LAST), 1)
        tl.store(found + out + i, tl.where(pick < LAST, pick, -1), mask=run < runs)
        kept = tl.where(kept == pick[:, None], -1, kept)


@triton.jit(do_not_specialize=["queries"])
def chunk_weigh(
    summary_q, summary_k, chosen, leader, weights, along, slopes, d_summary_q, queries, scale,
    H: tl.constexpr, HS: tl.constexpr, E: tl.constexpr, DEPTH: tl.constexpr, TOP: tl.constexpr, CHOICES: tl.constexpr,
    GRAD: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, head): softmax of a query's scores of what its leader chose.

    With GRAD the gradients of scores, w (D - sum w D) with D ``along`` summed over the heads of the choice, times
    ``scale``, to ``slopes``; and the gradient of summary_q.
    """
    head = tl.program_id(1)
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = query < queries
    depth, choice = tl.arange(0, DEPTH), tl.arange(0, CHOICES)
    mask = live[:, None] & (depth < E)[None, :]
    own = query.to(tl.int64) * HS + head
    lead = tl.load(leader + query, mask=live, other=0).to(tl.int64) * HS + head
    entry, kept = own[:, None] * TOP + choice[None, :], live[:, None] & (choice < TOP)[None, :]
    if GRAD:
        total = tl.zeros([BLOCK_M, DEPTH], tl.float32)
        score = tl.zeros([BLOCK_M, CHOICES], tl.float32)
        for member in range(H // HS):
            row = query.to(tl.int64) * H + head * (H // HS) + member
            score += tl.load(along + row[:, None] * TOP + choice[None, :], mask=kept, other=0.0)
        share = tl.load(weights + entry, mask=kept, other=0.0)
        score = scale * share * (score - tl.sum(share * score, 1)[:, None])
        tl.store(slopes + entry, score, mask=kept)
    else:
        rows = tl.load(summary_q + own[:, None] * E + depth[None, :], mask=mask, other=0.0).to(tl.float32)
        score = tl.full([BLOCK_M, CHOICES], float("-inf"), tl.float32)
    for i in range(TOP):
        number = tl.load(chosen + lead * TOP + i, mask=live, other=-1)
        place = (tl.maximum(number, 0).to(tl.int64) * HS + head)[:, None] * E + depth[None, :]
        chunk = tl.load(summary_k + place, mask=mask & (number >= 0)[:, None], other=0.0).to(tl.float32)
        here = (choice == i)[None, :]
        if GRAD:
            total += tl.sum(tl.where(here, score, 0.0), 1)[:, None] * chunk
        else:
            value = tl.where(number >= 0, tl.sum(rows * chunk, 1) * scale, float("-inf"))
            score = tl.where(here, value[:, None], score)
    if GRAD:
        tl.store(d_summary_q + own[:, None] * E + depth[None, :], total.to(d_summary_q.dtype.element_ty), mask=mask)
    else:
        top = tl.max(score, 1)
        share = tl.exp(score - tl.where(top > float("-inf"), top, 0.0)[:, None])
        mass = tl.sum(share, 1)
        tl.store(weights + entry, share / tl.where(mass > 0, mass, 1.0)[:, None], mask=kept)


@triton.jit(do_not_specialize=["chunks"])
def chunk_spread(
    summary_q, slopes, starts, pairs, offsets, d_summary_k, chunks,
    HS: tl.constexpr, E: tl.constexpr, DEPTH: tl.constexpr, TOP: tl.constexpr, SHARE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (chunk, head): gradient of summary_k, a sum over the queries of all runs that chose the chunk."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    depth = tl.arange(0, DEPTH)
    inside = (depth < E)[None, :]
    low, high = tl.load(offsets + head * chunks + chunk), tl.load(offsets + head * chunks + chunk + 1)
    total = tl.zeros([DEPTH], tl.float32)
    for at in range(0, (high - low) * SHARE, BLOCK_M):
        row = at + tl.arange(0, BLOCK_M)
        there = low + row // SHARE < high
        pair = tl.load(pairs + low + row // SHARE, mask=there, other=0)
        run = pair // (HS * TOP)
        query, after = run, run + 1
        if SHARE > 1:
            query = tl.load(starts + run, mask=there, other=0) + row % SHARE
            after = tl.load(starts + run + 1, mask=there, other=0)
        there = there & (query < after)
        own = query.to(tl.int64) * HS + head
        slope = tl.load(slopes + own * TOP + pair % TOP, mask=there, other=0.0)
        rows = tl.load(summary_q + own[:, None] * E + depth[None, :], mask=there[:, None] & inside, other=0.0)
        total += tl.sum(slope[:, None] * rows.to(tl.float32), 0)
    place = (chunk.to(tl.int64) * HS + head) * E + depth
    tl.store(d_summary_k + place, total.to(d_summary_k.dtype.element_ty), mask=depth < E)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """Tiles of what a program holds: scores, or rows of summaries."""
    if "PRECISION" in constants:
        sizes = [(("BLOCK_M", 32), ("BLOCK_N", 64)), (("BLOCK_M", 16), ("BLOCK_N", 32))]
        return [Config(blocks, num_warps=4, num_stages=2) for blocks in sizes]
    return [Config((("BLOCK_M", max(16, 2048 // constants["DEPTH"])),), num_warps=4, num_stages=2)]


def problem(constants: Mapping[str, Any]) -> tuple[Tensor, Tensor, ChunkLayout]:
    """Summaries and a layout of two rows for these constants: more chunks than a tile holds, equal ones among them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    kind = getattr(torch, constants["DTYPE"])
    length = 2 * 70 if "PRECISION" in constants else 37
    layout = ChunkLayout.regular(2, length, 2, constants.get("SHARE", 1), device)
    count = layout.start.numel() // 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device)

    # Small integers, whose products are exact everywhere, with many ties.
    line = draw(1, 1, constants["HS"], constants["E"]).sign()
    queries = line * draw(2, length, constants["HS"], 1).mul(4).round()
    chunks = line * draw(2, count, 1, 1).mul(4).round()
    return queries.to(kind), chunks.to(kind), layout


def canary(constants: Mapping[str, Any]) -> Pairs:
    """The choice, the weights and the gradients against the plain path's."""
    summary_q, summary_k, layout = problem(constants)
    tables = (layout.start, layout.end, layout.first, layout.last, layout.leader, layout.share, layout.blocks)
    plain = selection.select(summary_q.float(), summary_k.float(), *tables, constants["TOP"], 1.0, 0)
    if "PRECISION" in constants:
        return [(select(summary_q, summary_k, *tables, constants["TOP"], 1.0).float(), plain.float())]
    call = (summary_q.float(), summary_k.float(), plain, layout.leader.long(), 1.0)
    weights, chunks, chosen = chunked.chunk_weights(*call)
    found = weigh(summary_q, summary_k, plain, layout.leader, 1.0)
    pairs = [(found, weights)]
    if "GRAD" in constants and not constants["GRAD"]:
        return pairs
    heads = constants.get("H", constants["HS"])
    along = torch.randn(weights.shape[0], heads, constants["TOP"], device=weights.device)
    wanted = chunked.summary_gradients(along, weights, chunks, chosen, summary_q.float(), summary_k.float(), 1.0)
    starts = starts_of(layout.leader, layout.share, layout.blocks)
    inverse = invert(plain, starts, summary_k.shape[0] * summary_k.shape[1])
    return list(zip(gradients(along, weights, plain, layout.leader, summary_q, summary_k, inverse, layout.share, 1.0),
                    wanted, strict=True))  # fmt: skip


SELECT = Kernel(chunk_select, configs, canary)
WEIGH = Kernel(chunk_weigh, configs, canary)
SPREAD = Kernel(chunk_spread, configs, canary)


def _sizes(summary_q: Tensor, top_k: int) -> dict[str, Any]:
    width = summary_q.shape[3]
    return {
        "HS": summary_q.shape[2],
        "E": width,
        "DEPTH": max(16, triton.next_power_of_2(width)),
        "TOP": top_k,
        "DTYPE": str(summary_q.dtype).removeprefix("torch."),
    }


def select(
    summary_q: Tensor, summary_k: Tensor, start: Tensor, end: Tensor, first: Tensor, last: Tensor, leader: Tensor,
    share: int, blocks: int, top_k: int, scale: float,
) -> Tensor:  # fmt: skip
    """Chosen chunks [B, T, Hs, K], int32, the best first."""
    batch, length, heads, _ = summary_q.shape
    share, blocks = runs_of(summary_q, share, blocks)
    starts, run = selection.leaders(leader, share, blocks)
    found = summary_q.new_empty(blocks, heads, top_k, dtype=torch.int32)
    SELECT(
        lambda it: (triton.cdiv(blocks, it["BLOCK_M"]), heads),
        {
            "summary_q": summary_q.contiguous(),
            "summary_k": summary_k.contiguous(),
            "starts": starts.to(torch.int32) if share > 1 else None,
            "start": start,
            "end": end,
            "first": first,
            "last": last,
            "found": found,
            "queries": batch * length,
            "runs": blocks,
            "scale": scale,
        },
        {
            **_sizes(summary_q, top_k),
            "CHOICES": triton.next_power_of_2(top_k),
            "SHARE": share,
            "PRECISION": precision(summary_q.dtype),
        },
    )
    return (found if share == 1 else found[run]).view(batch, length, heads, top_k)


def weigh(summary_q: Tensor, summary_k: Tensor, chosen: Tensor, leader: Tensor, scale: float) -> Tensor:
    """w [Q, Hs, K], the softmax of a query's own scores over what its leader chose, 0 where it chose nothing."""
    queries, heads, top_k = summary_q.shape[0] * summary_q.shape[1], summary_q.shape[2], chosen.shape[3]
    weights = summary_q.new_empty(queries, heads, top_k, dtype=torch.float32)
    given = {"along": None, "slopes": None, "d_summary_q": None, "weights": weights}
    _weigh(summary_q, summary_k, chosen, leader, scale, heads, **given)
    return weights


def _weigh(
    summary_q: Tensor, summary_k: Tensor, chosen: Tensor, leader: Tensor, scale: float, heads: int, **given: Any
) -> None:
    queries, choosers = summary_q.shape[0] * summary_q.shape[1], summary_q.shape[2]
    WEIGH(
        lambda it: (triton.cdiv(queries, it["BLOCK_M"]), choosers),
        {
            "summary_q": summary_q.contiguous(),
            "summary_k": summary_k.contiguous(),
            "chosen": chosen.contiguous(),
            "leader": leader,
            "queries": queries,
            "scale": scale,
            **given,
        },
        {
            **_sizes(summary_q, chosen.shape[3]),
            "H": heads,
            "CHOICES": triton.next_power_of_2(chosen.shape[3]),
            "GRAD": given["along"] is not None,
        },
    )


def gradients(
    along: Tensor, weights: Tensor, chosen: Tensor, leader: Tensor, summary_q: Tensor, summary_k: Tensor,
    inverse: Tables, share: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of summary_q and summary_k from D [Q, H, K]."""
    d_summary_q, d_summary_k = summary_q.new_empty(summary_q.shape), summary_k.new_empty(summary_k.shape)
    slopes = torch.empty_like(weights)
    given = {"along": along, "slopes": slopes, "d_summary_q": d_summary_q, "weights": weights}
    _weigh(summary_q, summary_k, chosen, leader, scale, along.shape[1], **given)
    chunks = summary_k.shape[0] * summary_k.shape[1]
    SPREAD(
        lambda it: (chunks, summary_q.shape[2]),
        {
            "summary_q": summary_q.contiguous(),
            "slopes": slopes,
            "starts": inverse.starts if share > 1 else None,
            "pairs": inverse.pairs,
            "offsets": inverse.offsets,
            "d_summary_k": d_summary_k,
            "chunks": chunks,
        },
        {**_sizes(summary_q, chosen.shape[3]), "SHARE": share},
    )
    return d_summary_q, d_summary_k
