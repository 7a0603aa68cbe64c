"""Grouped linear map in Triton: a tile of slots of one sequence and a block of columns a program.

Sequence n may begin anywhere, so that the tiles of all sequences would have to be counted to find that of a program.
Instead n is given the tiles floor(first / BLOCK_S) + n and on, of which there are always enough: at most one too many,
that returns at once. Which sequence a tile belongs to is then found by bisection in the borders.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel, Pairs, precision
from . import chunked


@triton.jit
def sequence_of(borders, tile, sequences, steps, BLOCK_S: tl.constexpr):
    """The sequence that a tile is one of."""
    low = tile * 0
    high = low + sequences - 1
    for _ in range(steps):
        middle = (low + high + 1) // 2
        reached = tl.load(borders + middle) // BLOCK_S + middle <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low


@triton.jit(do_not_specialize=["sequences", "steps"])
def grouped_linear_tiles(
    x, weight, token, borders, y, sequences, steps,
    M: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, X_STRIDE: tl.constexpr, W_IN: tl.constexpr,
    W_OUT: tl.constexpr, GATHER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Program (tile of slots and, faster, block of columns): y = x at token, or as it lies, times the memory's matrix.

    ``weight`` [M, IN, OUT] has strides W_IN and W_OUT, so that the transposed matrices need no copy.
    """
    blocks: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    tile = tl.program_id(0) // blocks
    sequence = sequence_of(borders, tile, sequences, steps, BLOCK_S)
    first, last = tl.load(borders + sequence), tl.load(borders + sequence + 1)
    start = first + (tile - first // BLOCK_S - sequence) * BLOCK_S
    if start < last:
        slot = start + tl.arange(0, BLOCK_S)
        live = slot < last
        row = tl.load(token + slot, mask=live, other=0) if GATHER else slot.to(tl.int64)
        column = (tl.program_id(0) % blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inner = tl.arange(0, BLOCK_IN)
        left = x + row[:, None] * X_STRIDE + inner[None, :]
        right = weight + (sequence % M).to(tl.int64) * (IN * OUT) + inner[:, None] * W_IN + column[None, :] * W_OUT
        total = tl.zeros([BLOCK_S, BLOCK_OUT], tl.float32)
        for k in range(0, IN, BLOCK_IN):
            there = inner < IN - k
            a = tl.load(left + k, mask=live[:, None] & there[None, :], other=0.0)
            b = tl.load(right + k * W_IN, mask=there[:, None] & (column < OUT)[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        mask = live[:, None] & (column < OUT)[None, :]
        tl.store(y + slot[:, None].to(tl.int64) * OUT + column[None, :], total.to(y.dtype.element_ty), mask=mask)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """Two sizes of tiles; the smaller for short sequences and narrow results."""
    narrow = min(128, max(16, triton.next_power_of_2(constants["OUT"])))
    depth = min(32 if constants["DTYPE"] == "float32" else 64, max(16, triton.next_power_of_2(constants["IN"])))
    sizes = [(64, min(64, narrow), 4, 3)]
    if constants["DTYPE"] != "float32":
        sizes.insert(0, (128, narrow, 4 if narrow <= 64 else 8, 3))
    return [
        Config((("BLOCK_S", s), ("BLOCK_IN", depth), ("BLOCK_OUT", n)), num_warps=w, num_stages=stages)
        for s, n, w, stages in sizes
    ]


def problem(constants: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, token, slot and borders of a call with these constants: two rows, and two choices if need be."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    kind, memories = getattr(torch, constants["DTYPE"]), constants["M"]
    tokens, choices = 75 if device.type == "cpu" else 150, 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device)

    slots = 2 * tokens * choices
    order = torch.randperm(slots, generator=source, device=device)
    cuts = torch.randint(slots, (2 * memories - 1,), generator=source, device=device).sort().values
    ends = torch.tensor([0, slots], device=device)
    borders = torch.cat([ends[:1], cuts, ends[1:]]).int()
    x = draw(2, tokens, constants.get("X_STRIDE", constants["IN"]))[..., : constants["IN"]].to(kind)
    weight = draw(memories, constants["IN"], constants["OUT"]) * constants["IN"] ** -0.5
    return x, weight.to(kind), order.argsort() // choices, order.view(2, tokens, choices), borders


def canary(constants: Mapping[str, Any]) -> Pairs:
    """The product against the plain path's, with the gather or without."""
    x, weight, token, _, borders = problem(constants)
    if constants["GATHER"]:
        return [(forward(x, weight, token, borders), chunked.forward(x.float(), weight.float(), token, borders))]
    slots = x.flatten(0, 1).index_select(0, token)
    held = weight if constants["W_OUT"] == 1 else weight.mT.contiguous().mT
    found = tiles(slots, held, None, borders)
    return [(found, chunked.multiply(slots.float(), weight.float(), borders))]


TILES = Kernel(grouped_linear_tiles, configs, canary)


def forward(x: Tensor, weight: Tensor, token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y [1, S, out]; x [B, T, in] is read at the tokens of the slots."""
    return tiles(flat(x), weight.to(x.dtype).contiguous(), token, cu_seqlens)[None]


def flat(x: Tensor) -> Tensor:
    """x [B, T, in] as rows, which may lie apart."""
    batch, length, width = x.shape
    if x.stride(2) != 1 or (batch > 1 and x.stride(0) != length * x.stride(1)):
        x = x.contiguous()
    return x.as_strided((batch * length, width), (x.stride(1), 1))


def tiles(x: Tensor, weight: Tensor, token: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """[S, out]: row token[s] of x, or row s, times the matrix [in, out] of the memory of s; these may be transposed."""
    memories, inner, outer = weight.shape
    slots, sequences = (x if token is None else token).shape[0], cu_seqlens.shape[0] - 1
    y = x.new_empty(slots, outer)
    TILES(
        lambda it: ((slots // it["BLOCK_S"] + sequences) * triton.cdiv(outer, it["BLOCK_OUT"]),),
        {
            "x": x,
            "weight": weight,
            "token": token,
            "borders": cu_seqlens,
            "y": y,
            "sequences": sequences,
            "steps": (sequences - 1).bit_length(),
        },
        {
            "M": memories,
            "IN": inner,
            "OUT": outer,
            "X_STRIDE": x.stride(0),
            "W_IN": weight.stride(1),
            "W_OUT": weight.stride(2),
            "GATHER": token is not None,
            "DTYPE": str(x.dtype).removeprefix("torch."),
            "PRECISION": precision(x.dtype),
        },
    )
    return y
