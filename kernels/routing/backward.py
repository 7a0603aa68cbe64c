"""Routing in Triton, backward: the softmax over all memories, and that over the kept ones, in one pass.

dl = p (dp - sum(p dp)) + w (dw - sum(w dw)), the second term where a memory was kept
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Kernel, Pairs
from . import chunked
from .forward import TILE, configs, problem


@triton.jit(do_not_specialize=["tokens"])
def route_backward_kernel(
    d_weight, d_probability, weight, probability, memory, d_logits, tokens,
    M: tl.constexpr, TOP: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens)."""
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column, choice = tl.arange(0, COLUMNS), tl.arange(0, CHOICES)
    live = token < tokens
    entry, mask = token[:, None] * M + column[None, :], live[:, None] & (column < M)[None, :]
    p = tl.load(probability + entry, mask=mask, other=0.0)
    g = tl.load(d_probability + entry, mask=mask, other=0.0)
    slope = p * (g - tl.sum(p * g, 1)[:, None])
    place, kept = token[:, None] * (TOP + SHARED) + choice[None, :], live[:, None] & (choice < TOP)[None, :]
    w = tl.load(weight + place, mask=kept, other=0.0)
    g = tl.load(d_weight + place, mask=kept, other=0.0)
    along = tl.sum(w * g, 1)
    for k in tl.static_range(TOP):
        at = token * (TOP + SHARED) + k
        share = tl.load(weight + at, mask=live, other=0.0)
        part = share * (tl.load(d_weight + at, mask=live, other=0.0) - along)
        chosen = tl.load(memory + at, mask=live, other=-1)
        slope += tl.where(column[None, :] == chosen[:, None], part[:, None], 0.0)
    tl.store(d_logits + entry, slope, mask=mask)


def canary(constants: Mapping[str, Any]) -> Pairs:
    """The gradient against the plain path's."""
    arguments = problem(constants)
    weight, probability, memory = chunked.choose(arguments["logits"], arguments["top_k"], arguments["shared"])
    source = torch.Generator(weight.device).manual_seed(1)
    grads = [torch.randn(x.shape, generator=source, device=x.device) for x in (weight, probability)]
    inputs = (*grads, weight, probability, memory, arguments["top_k"])
    return [(route_backward(*inputs), chunked.route_backward(*inputs))]


BACKWARD = Kernel(route_backward_kernel, configs, canary, name="route_backward")


def route_backward(
    d_weight: Tensor, d_probability: Tensor, weight: Tensor, probability: Tensor, memory: Tensor, top_k: int
) -> Tensor:
    """Gradient of the logits, float32 [B, T, M]."""
    batch, length, routed = probability.shape
    d_logits = probability.new_empty(probability.shape)
    choices = weight.shape[2]
    BACKWARD(
        lambda it: (triton.cdiv(batch * length, TILE),),
        {
            "d_weight": d_weight.contiguous(),
            "d_probability": d_probability.contiguous(),
            "weight": weight,
            "probability": probability,
            "memory": memory,
            "d_logits": d_logits,
            "tokens": batch * length,
        },
        {
            "M": routed,
            "TOP": top_k,
            "SHARED": choices - top_k,
            "COLUMNS": triton.next_power_of_2(routed + choices - top_k),
            "CHOICES": triton.next_power_of_2(choices),
            "TILE": TILE,
        },
    )
    return d_logits
