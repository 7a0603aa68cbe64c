"""Routing in Triton, forward: choice, and a counting sort in three passes over the tokens, TILE of them a program.

The first pass chooses, and counts the choices of each memory in its tile; torch adds these up over the tiles. The
second counts on to the start of every row or document, which may lie inside a tile; the differences are the lengths of
the sequences, and torch adds them up to borders. The third puts every choice into its slot.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..jit import document_of
from ..launch import Config, Kernel, Pairs
from . import chunked

TILE = 64  # tokens of a program, a part of what the three passes agree on


@triton.jit(do_not_specialize=["tokens"])
def route_choose(
    logits, weight, probability, memory, counts, tokens,
    M: tl.constexpr, TOP: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
    DTYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens): softmax, the TOP largest one after the other, and how often each memory was taken."""
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column, choice = tl.arange(0, COLUMNS), tl.arange(0, CHOICES)
    live = token < tokens
    entry, mask = token[:, None] * M + column[None, :], live[:, None] & (column < M)[None, :]
    value = tl.load(logits + entry, mask=mask, other=0.0).to(tl.float32)
    value = tl.where((column < M)[None, :], value, float("-inf"))
    p = tl.exp(value - tl.max(value, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    tl.store(probability + entry, p, mask=mask)
    value = tl.where(value == value, value, float("-inf"))
    free = tl.zeros([TILE, COLUMNS], tl.int32) + (column < M).to(tl.int32)[None, :]
    chosen = tl.zeros([TILE, CHOICES], tl.int32) + M
    kept = tl.zeros([TILE, CHOICES], tl.float32)
    for k in tl.static_range(TOP):
        best = tl.max(tl.where(free > 0, value, float("-inf")), 1)
        pick = tl.min(tl.where((free > 0) & (value == best[:, None]), column[None, :], COLUMNS), 1)
        taken = column[None, :] == pick[:, None]
        free = tl.where(taken, 0, free)
        here = (choice == k)[None, :]
        chosen = tl.where(here, pick[:, None], chosen)
        kept = tl.where(here, tl.sum(tl.where(taken, p, 0.0), 1)[:, None], kept)
    w = tl.where((choice < TOP)[None, :], kept / tl.sum(kept, 1)[:, None], 1.0)
    place = token[:, None] * (TOP + SHARED) + choice[None, :]
    mask = live[:, None] & (choice < TOP + SHARED)[None, :]
    tl.store(weight + place, w, mask=mask)
    tl.store(memory + place, chosen.to(tl.int64), mask=mask)
    routed = (live[:, None] & (column < M + SHARED)[None, :] & (free == 0)).to(tl.int32)
    tl.store(
        counts + tl.program_id(0).to(tl.int64) * (M + SHARED) + column, tl.sum(routed, 0), mask=column < M + SHARED
    )


@triton.jit
def taken(memory, token, live, column, K: tl.constexpr):
    """1 where a token goes to the memory of a column, else 0."""
    found = tl.zeros([token.shape[0], column.shape[0]], tl.int32)
    for k in tl.static_range(K):
        chosen = tl.load(memory + token * K + k, mask=live, other=-1)
        found += (chosen[:, None] == column[None, :]).to(tl.int32)
    return found


@triton.jit
def before_tile(totals, tile, column, MEMORIES: tl.constexpr):
    """How often each memory was chosen in all tiles before one."""
    mask = tl.where(tile > 0, column < MEMORIES, False)
    return tl.load(totals + (tile - 1) * MEMORIES + column, mask=mask, other=0)


@triton.jit(do_not_specialize=["length"])
def route_count(
    memory, totals, borders, starts, length,
    MEMORIES: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (border of rows or documents): how often each memory was chosen before it."""
    border = tl.program_id(0).to(tl.int64)
    start = tl.load(borders + border).to(tl.int64) if PACKED else border * length
    tile = start // TILE
    column = tl.arange(0, COLUMNS)
    token = tile * TILE + tl.arange(0, TILE)
    count = before_tile(totals, tile, column, MEMORIES) + tl.sum(taken(memory, token, token < start, column, K), 0)
    tl.store(starts + border * MEMORIES + column, count, mask=column < MEMORIES)


@triton.jit(do_not_specialize=["tokens", "length", "documents", "steps"])
def route_place(
    memory, totals, borders, shift, slot, token_of, tokens, length, documents, steps,
    MEMORIES: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens): the slot of each choice, ``shift`` [N, M'] further than it is among its memory's."""
    tile = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    token = tile * TILE + tl.arange(0, TILE)
    live = token < tokens
    here = taken(memory, token, live, column, K)
    rank = tl.cumsum(here, 0) - here + before_tile(totals, tile, column, MEMORIES)[None, :]
    row = document_of(borders, token, documents, steps) if PACKED else token // length
    for k in tl.static_range(K):
        chosen = tl.load(memory + token * K + k, mask=live, other=0)
        place = tl.sum(tl.where(column[None, :] == chosen[:, None], rank, 0), 1)
        place += tl.load(shift + row * MEMORIES + chosen, mask=live, other=0)
        tl.store(slot + token * K + k, place.to(tl.int64), mask=live)
        tl.store(token_of + place, token, mask=live)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """A thread holds at most 64 of a tile's counters."""
    return [Config((), num_warps=8 if constants["COLUMNS"] > 64 else 4, num_stages=1)]


def problem(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with these constants: several tiles, rows or documents that end in and at tiles, and ties."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    packed = constants.get("PACKED", False)
    top = constants["TOP"] if "TOP" in constants else max(1, constants["K"] - 1)
    routed = constants["M"] if "M" in constants else constants["MEMORIES"] - (constants["K"] > top)
    batch, length = (1, 2 * TILE + 5) if packed else (2, TILE + 5)
    logits = torch.randn(batch, length, routed, generator=source, device=device)
    kind = getattr(torch, constants.get("DTYPE", "float32"))
    edges = torch.tensor([0, 0, 1, TILE, TILE + 9, length], dtype=torch.int32, device=device)
    shared = bool(constants["SHARED"]) if "SHARED" in constants else constants["K"] > top
    return {
        "logits": logits.mul(2).round().div(2).to(kind),
        "top_k": top,
        "shared": shared,
        "cu_seqlens": edges if packed else None,
    }


def canary(constants: Mapping[str, Any]) -> Pairs:
    """All that routing returns against the plain path, integers as float32."""
    arguments = problem(constants)
    found = route(**arguments)
    logits = arguments["logits"].float()
    chosen = chunked.choose(logits, arguments["top_k"], arguments["shared"])
    memories = logits.shape[2] + arguments["shared"]
    wanted = (*chosen, *chunked.sort(chosen[2], memories, arguments["cu_seqlens"]))
    return [(a.float(), b.float()) for a, b in zip(found, wanted, strict=True)]


CHOOSE = Kernel(route_choose, configs, canary)
COUNT = Kernel(route_count, configs, canary)
PLACE = Kernel(route_place, configs, canary)


def route(
    logits: Tensor, top_k: int, shared: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight, probability, memory, token, slot and borders."""
    batch, length, routed = logits.shape
    tokens, choices, memories = batch * length, top_k + shared, routed + shared
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles = triton.cdiv(tokens, TILE)
    weight = logits.new_empty(batch, length, choices, dtype=torch.float32)
    probability = logits.new_empty(logits.shape, dtype=torch.float32)
    memory, slot = (logits.new_empty(weight.shape, dtype=torch.int64) for _ in range(2))
    token = logits.new_empty(tokens * choices, dtype=torch.int64)
    counts, starts = (logits.new_empty(n, memories, dtype=torch.int32) for n in (tiles, rows + 1))
    columns = triton.next_power_of_2(memories)
    CHOOSE(
        lambda it: (tiles,),
        {
            "logits": logits.contiguous(),
            "weight": weight,
            "probability": probability,
            "memory": memory,
            "counts": counts,
            "tokens": tokens,
        },
        {
            "M": routed,
            "TOP": top_k,
            "SHARED": int(shared),
            "COLUMNS": columns,
            "CHOICES": triton.next_power_of_2(choices),
            "DTYPE": str(logits.dtype).removeprefix("torch."),
            "TILE": TILE,
        },
    )
    known = {"memory": memory, "totals": counts.cumsum(0, dtype=torch.int32), "borders": cu_seqlens, "length": length}
    constants = {
        "MEMORIES": memories,
        "K": choices,
        "COLUMNS": columns,
        "PACKED": cu_seqlens is not None,
        "TILE": TILE,
    }
    COUNT(lambda it: (rows + 1,), {**known, "starts": starts}, constants)
    borders = F.pad(starts.diff(dim=0).flatten().cumsum(0, dtype=torch.int32), (1, 0))
    shift = borders[:-1].view(rows, memories) - starts[:-1]
    further = {"tokens": tokens, "documents": rows, "steps": (rows - 1).bit_length()}
    PLACE(lambda it: (tiles,), {**known, **further, "shift": shift, "slot": slot, "token_of": token}, constants)
    return weight, probability, memory, token, slot, borders
