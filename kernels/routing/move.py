"""To the slots and back in Triton: two kernels that walk over tokens, each the other's backward. No atomics.

``routing_spread`` reads a token once and writes it to its K slots, no two of which are the same; with weights it also
makes the gradient of these from what lies in the slots. ``routing_gather`` adds up a token's K slots in their order.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel, Pairs
from . import chunked


@triton.jit(do_not_specialize=["tokens"])
def routing_spread(
    x, y, weight, slot, out, d_weight, tokens,
    C: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, X_STRIDE: tl.constexpr, WEIGHT: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens): out at slot k of a token = its x, times weight k; d_weight k = <x, y at slot k>."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    choice = tl.arange(0, CHOICES)
    part = tl.zeros([BLOCK_T, CHOICES], tl.float32)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        mask = live[:, None] & (channel < C)[None, :]
        value = tl.load(x + token[:, None] * X_STRIDE + channel[None, :], mask=mask, other=0.0)
        for k in tl.static_range(K):
            entry = tl.load(slot + token * K + k, mask=live, other=0)[:, None] * C + channel[None, :]
            if WEIGHT:
                wide = value.to(tl.float32)
                along = tl.sum(wide * tl.load(y + entry, mask=mask, other=0.0).to(tl.float32), 1)
                part += tl.where((choice == k)[None, :], along[:, None], 0.0)
                share = tl.load(weight + token * K + k, mask=live, other=0.0)
                tl.store(out + entry, (wide * share[:, None]).to(out.dtype.element_ty), mask=mask)
            else:
                tl.store(out + entry, value, mask=mask)
    if WEIGHT:
        tl.store(d_weight + token[:, None] * K + choice[None, :], part, mask=live[:, None] & (choice < K)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def routing_gather(
    y, weight, slot, out, tokens,
    C: tl.constexpr, K: tl.constexpr, WEIGHT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, block of channels): out of a token = the sum of its slots, times their weights."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = token < tokens
    mask = live[:, None] & (channel < C)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in tl.static_range(K):
        entry = tl.load(slot + token * K + k, mask=live, other=0)[:, None] * C + channel[None, :]
        value = tl.load(y + entry, mask=mask, other=0.0).to(tl.float32)
        if WEIGHT:
            value *= tl.load(weight + token * K + k, mask=live, other=0.0)[:, None]
        total += value
    tl.store(out + token[:, None] * C + channel[None, :], total.to(out.dtype.element_ty), mask=mask)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """16-byte accesses of half precision, a warp on 256 channels, as far as there are as many."""
    wide = min(256, max(32, triton.next_power_of_2(constants["C"])))
    sizes = (2048,) if "X_STRIDE" in constants else (2048, 4096)  # a spread of more would spill with weights
    return [Config((("BLOCK_T", size // wide), ("BLOCK_C", wide)), num_warps=4, num_stages=1) for size in sizes]


def problem(constants: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, y, weight, token and slot of a call with these constants, more tokens than a program takes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    kind, choices, width = getattr(torch, constants["DTYPE"]), constants["K"], constants["C"]
    tokens = 4096 // min(256, max(32, width)) + 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device)

    logits = draw(1, tokens, choices + 1)
    weight, _, memory = chunked.choose(logits, choices, False)
    token, slot, _ = chunked.sort(memory, choices + 1, None)
    x = draw(1, tokens, constants.get("X_STRIDE", width)).to(kind)[..., :width]
    return x, draw(1, tokens * choices, width).to(kind), weight, token, slot


def canary(constants: Mapping[str, Any]) -> Pairs:
    """All four uses against the plain path, but those whose kernel has other constants."""
    x, y, weight, token, slot = problem(constants)
    if "X_STRIDE" not in constants:
        held = weight if constants["WEIGHT"] else None
        return [(gather(y, held, slot), chunked.gather(y.float(), held, slot))]
    if not constants["WEIGHT"]:
        return [(spread(x, slot), chunked.spread(x.float(), token))]
    found, wanted = (call(x, y, weight, slot) for call in (spread_weighted, chunked.combine_backward))
    return list(zip(found, wanted, strict=True))


SPREAD = Kernel(routing_spread, configs, canary)
GATHER = Kernel(routing_gather, configs, canary)


def gather(y: Tensor, weight: Tensor | None, slot: Tensor) -> Tensor:
    """[B, T, C]: what lies in a token's slots, [1, S, C], weighted and added in the order of its choices."""
    batch, length, choices = slot.shape
    tokens, width = batch * length, y.shape[2]
    out = y.new_empty(batch, length, width)
    GATHER(
        lambda it: (triton.cdiv(tokens, it["BLOCK_T"]), triton.cdiv(width, it["BLOCK_C"])),
        {
            "y": y.contiguous(),
            "weight": None if weight is None else weight.float().contiguous(),
            "slot": slot,
            "out": out,
            "tokens": tokens,
        },
        {"C": width, "K": choices, "WEIGHT": weight is not None, "DTYPE": str(y.dtype).removeprefix("torch.")},
    )
    return out


def spread(x: Tensor, slot: Tensor) -> Tensor:
    """[1, S, C]: tokens [B, T, C] in the order of slots."""
    return _spread(x, None, None, slot)[0]


def spread_weighted(grad: Tensor, y: Tensor, weight: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y [1, S, C] and of weight [B, T, K], which :func:`gather` was called with."""
    return _spread(grad, y.contiguous(), weight.float().contiguous(), slot)


def _spread(x: Tensor, y: Tensor | None, weight: Tensor | None, slot: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, choices = slot.shape
    tokens, width = batch * length, x.shape[2]
    if x.stride(2) != 1 or (batch > 1 and x.stride(0) != length * x.stride(1)):
        x = x.contiguous()
    out = x.new_empty(1, tokens * choices, width)
    d_weight = slot.new_empty(slot.shape if weight is not None else 0, dtype=torch.float32)
    SPREAD(
        lambda it: (triton.cdiv(tokens, it["BLOCK_T"]),),
        {"x": x, "y": y, "weight": weight, "slot": slot, "out": out, "d_weight": d_weight, "tokens": tokens},
        {
            "C": width,
            "K": choices,
            "CHOICES": triton.next_power_of_2(choices),
            "X_STRIDE": x.stride(1),
            "WEIGHT": weight is not None,
            "DTYPE": str(x.dtype).removeprefix("torch."),
        },
    )
    return out, d_weight
