"""Grouped linear map in Triton, backward.

With g_s the gradient of y_s:  dx at slot s = g_s W^T, by the forward's kernel on transposed matrices, then added up
over each token's slots; dW_m = sum over the slots s of m of x_s^T g_s, by programs that walk over the sequences of
their memory in order, so that the sums are always the same.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel, Pairs, precision
from ..routing.move import gather
from . import chunked
from .forward import flat, problem, tiles


@triton.jit(do_not_specialize=["sequences"])
def grouped_linear_backward_weight(
    x, token, borders, grad, d_weight, sequences,
    M: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, X_STRIDE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, block of columns, memory)."""
    memory = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    total = tl.zeros([BLOCK_IN, BLOCK_OUT], tl.float32)
    for sequence in range(memory, sequences, M):
        first, last = tl.load(borders + sequence), tl.load(borders + sequence + 1)
        for start in range(first, last, BLOCK_S):
            slot = start + tl.arange(0, BLOCK_S)
            live = slot < last
            place = tl.load(token + slot, mask=live, other=0)
            a = tl.load(
                x + place[None, :] * X_STRIDE + row[:, None], mask=live[None, :] & (row < IN)[:, None], other=0.0
            )
            g = tl.load(
                grad + slot[:, None].to(tl.int64) * OUT + column[None, :],
                mask=live[:, None] & (column < OUT)[None, :],
                other=0.0,
            )
            total = tl.dot(a, g, total, input_precision=PRECISION)
    entry = (memory.to(tl.int64) * IN + row[:, None]) * OUT + column[None, :]
    tl.store(d_weight + entry, total, mask=(row < IN)[:, None] & (column < OUT)[None, :])


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """Tiles of 64: there is a program for every tile of every matrix, and each walks over many slots."""
    wide, high = (min(64, max(16, triton.next_power_of_2(constants[name]))) for name in ("OUT", "IN"))
    depth = 32 if constants["DTYPE"] == "float32" else 64
    return [Config((("BLOCK_S", depth), ("BLOCK_IN", high), ("BLOCK_OUT", wide)), num_warps=4, num_stages=3)]


def canary(constants: Mapping[str, Any]) -> Pairs:
    """Both gradients against the plain path's."""
    x, weight, token, slot, borders = problem(constants)
    source = torch.Generator(x.device).manual_seed(1)
    grad = torch.randn(1, token.shape[0], weight.shape[2], generator=source, device=x.device).to(x.dtype)
    found = backward(grad, x, weight, token, slot, borders)
    wanted = chunked.backward(grad.float(), x.float(), weight.float(), token, slot, borders)
    return list(zip(found, wanted, strict=True))


WEIGHT = Kernel(grouped_linear_backward_weight, configs, canary)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, token: Tensor, slot: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    memories, inner, outer = weight.shape
    grad = grad.contiguous()
    d_x = gather(tiles(grad[0], weight.to(x.dtype).contiguous().mT, None, cu_seqlens)[None], None, slot)
    rows = flat(x)
    d_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    WEIGHT(
        lambda it: (triton.cdiv(inner, it["BLOCK_IN"]), triton.cdiv(outer, it["BLOCK_OUT"]), memories),
        {
            "x": rows,
            "token": token,
            "borders": cu_seqlens,
            "grad": grad,
            "d_weight": d_weight,
            "sequences": cu_seqlens.shape[0] - 1,
        },
        {
            "M": memories,
            "IN": inner,
            "OUT": outer,
            "X_STRIDE": rows.stride(0),
            "DTYPE": str(x.dtype).removeprefix("torch."),
            "PRECISION": precision(x.dtype),
        },
    )
    return d_x, d_weight.to(weight.dtype)
