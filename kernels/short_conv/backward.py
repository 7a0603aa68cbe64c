"""Short convolution in Triton, backward: what entered the activation is computed again, nothing was kept.

With g_t the gradient of what entered the activation at t:

    dx_t = sum_i w_{K-1-i} g_{t+i}      dw_j = sum_t g_t x_{t-K+1+j}      db = sum_t g_t

One pass makes g, dw and db, a second one dx. A single pass would compute g K times over, for no tile sees its
neighbour's: 2 K exponentials an element, where writing and reading g costs a fifth more time than that. Every program
adds up dw and db over its own tokens; the parts are added by torch.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import silu_slope
from ..launch import Config, Kernel, Pairs
from . import chunked
from .forward import call, inputs, place, problem, sums, wide
from .forward import configs as forward_configs

FEW = ("C", "K", "PACKED", "DTYPE")  # constants of the kernels that only read g


@triton.jit(do_not_specialize=["length", "documents", "steps"])
def short_conv_backward(
    grad, x, index, weight, bias, state, borders, slope, parts, length, documents, steps,
    C: tl.constexpr, K: tl.constexpr, X_STRIDE: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, INDEX: tl.constexpr, DTYPE: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (span of tokens, block of channels, row): g, and its part of dw (rows 0 .. K - 1) and db (row K)."""
    row = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    line = tl.arange(0, ROWS)
    part = tl.zeros([ROWS, BLOCK_C], tl.float32)
    begin = tl.program_id(0) * SPAN
    for start in range(begin, tl.minimum(begin + SPAN, length), BLOCK_T):
        time = start + tl.arange(0, BLOCK_T)
        live = time < length
        token = row * length + time
        first, _, document = place(row, token, borders, length, documents, steps, PACKED)
        mask = live[:, None] & known[None, :]
        entry = token[:, None].to(tl.int64) * C + channel[None, :]
        g = tl.load(grad + entry, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            z = sums(
                x, index, weight, bias, state, token, first, document, live, channel, known,
                C, K, X_STRIDE, BIAS, STATE, INDEX,
            )  # fmt: skip
            g *= silu_slope(z)
            tl.store(slope + entry, g.to(slope.dtype.element_ty), mask=mask)
        for j in tl.static_range(K):
            value = inputs(
                x, index, state, token, first, document, live, channel, known, K - 1 - j, C, K, X_STRIDE, STATE, INDEX
            )  # fmt: skip
            part += tl.where(line[:, None] == j, tl.sum(g * value, 0)[None, :], 0.0)
        if BIAS:
            part += tl.where(line[:, None] == K, tl.sum(g, 0)[None, :], 0.0)
    program = row * tl.num_programs(0) + tl.program_id(0)
    entry = (program * (K + 1) + line[:, None]).to(tl.int64) * C + channel[None, :]
    tl.store(parts + entry, part, mask=(line[:, None] <= K) & known[None, :])


@triton.jit(do_not_specialize=["tokens", "length", "documents", "steps"])
def short_conv_backward_input(
    slope, inverse, weight, borders, d_x, tokens, length, documents, steps,
    C: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr, INDEX: tl.constexpr, CHOICES: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, block of channels, row): dx from the later tokens of the same sequence.

    With an index it is the sum over the token's slots of that from the later slots of the same sequence.
    """
    row = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    time = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = time < tokens
    token = row * tokens + time
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in range(CHOICES):  # unrolled, nine choices spill
        choice = token.to(tl.int64) * CHOICES + k
        slot = tl.load(inverse + choice, mask=live, other=0).to(tl.int32) if INDEX else token
        _, stop, _ = place(row, slot, borders, length, documents, steps, PACKED)
        for i in tl.static_range(K):
            mask = (live & (slot + i < stop))[:, None] & known[None, :]
            g = tl.load(slope + (slot + i)[:, None].to(tl.int64) * C + channel[None, :], mask=mask, other=0.0)
            tap = tl.load(weight + channel * K + (K - 1 - i), mask=known, other=0.0).to(tl.float32)
            total += tap[None, :] * g.to(tl.float32)
    entry = token[:, None].to(tl.int64) * C + channel[None, :]
    tl.store(d_x + entry, total.to(d_x.dtype.element_ty), mask=live[:, None] & known[None, :])


@triton.jit(do_not_specialize=["length"])
def short_conv_backward_state(
    slope, weight, borders, d_state, length,
    C: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (sequence, block of channels): slot s is read at tokens t <= s of its sequence, by weight s - t."""
    document = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    if PACKED:
        first, stop = tl.load(borders + document), tl.load(borders + document + 1)
    else:
        first, stop = document * length, (document + 1) * length
    slot = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for t in tl.static_range(K - 1):
        there = tl.where(first + t < stop, known, False)
        g = tl.load(slope + (first + t).to(tl.int64) * C + channel, mask=there, other=0.0).to(tl.float32)
        mask = ((slot >= t) & (slot < K - 1))[:, None] & known[None, :]
        tap = tl.load(weight + channel[None, :] * K + (slot - t)[:, None], mask=mask, other=0.0).to(tl.float32)
        total += tap * g[None, :]
    entry = (document * (K - 1) + slot[:, None]).to(tl.int64) * C + channel[None, :]
    tl.store(d_state + entry, total.to(d_state.dtype.element_ty), mask=(slot[:, None] < K - 1) & known[None, :])


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """As the forward's, with smaller tiles first: more of them are alive at once."""
    return [
        Config((("BLOCK_T", 16), ("BLOCK_C", 64)), num_warps=4, num_stages=1),
        Config((("BLOCK_T", 32), ("BLOCK_C", 64)), num_warps=4, num_stages=1),
    ]


def state_configs(constants: Mapping[str, Any]) -> list[Config]:
    """There is little to do."""
    return [Config((("BLOCK_C", 128),), num_warps=2, num_stages=1)]


def canary(constants: Mapping[str, Any]) -> Pairs:
    """Every gradient against the plain path's; what a kernel's constants leave open is drawn with everything on."""
    free = {"X_STRIDE": constants["C"], "SILU": True, "BIAS": True, "STATE": True}
    arguments = problem({**free, **constants})
    source = torch.Generator(arguments["x"].device).manual_seed(1)
    exact = wide(arguments)
    y, z = chunked.forward(**{name: x for name, x in exact.items() if name != "inverse"})
    grad = torch.randn(y.shape, generator=source, device=y.device).to(arguments["x"].dtype)
    found, wanted = backward(grad, **arguments), chunked.backward(grad.float(), z, **exact)
    return [pair for pair in zip(found, wanted, strict=True) if pair[1].numel()]


BACKWARD = Kernel(short_conv_backward, configs, canary)
BACKWARD_INPUT = Kernel(short_conv_backward_input, forward_configs, canary)
BACKWARD_STATE = Kernel(short_conv_backward_state, state_configs, canary)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
    inverse: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, weight, bias and state; empty for those that were None."""
    batch, tokens, channels = x.shape
    width, rows = weight.shape[1], grad.shape[0]
    arguments, constants = call(x, weight, bias, state, cu_seqlens, silu, index)
    grad = grad.contiguous()
    slope = torch.empty_like(grad) if silu else grad
    spans = triton.cdiv(arguments["length"], constants["SPAN"])
    parts = x.new_empty(rows * spans, width + 1, channels, dtype=torch.float32)
    BACKWARD(
        lambda it: (spans, triton.cdiv(channels, it["BLOCK_C"]), rows),
        {**arguments, "grad": grad, "slope": slope, "parts": parts},
        {**constants, "ROWS": triton.next_power_of_2(width + 1)},
    )
    known = {"slope": slope, **{name: arguments[name] for name in ("weight", "borders", "length")}}
    few = {name: constants[name] for name in FEW}
    d_x = x.new_empty(x.shape)
    BACKWARD_INPUT(
        lambda it: (triton.cdiv(tokens, it["BLOCK_T"]), triton.cdiv(channels, it["BLOCK_C"]), batch),
        {
            **known,
            "inverse": inverse,
            "d_x": d_x,
            "tokens": tokens,
            "documents": arguments["documents"],
            "steps": arguments["steps"],
        },
        {**few, "INDEX": inverse is not None, "CHOICES": 1 if inverse is None else inverse.shape[2]},
    )
    d_state = x.new_empty(0)
    if state is not None:
        d_state = state.new_empty(state.shape)
        BACKWARD_STATE(
            lambda it: (arguments["documents"] if width > 1 else 0, triton.cdiv(channels, it["BLOCK_C"])),
            {**known, "d_state": d_state},
            {**few, "ROWS": triton.next_power_of_2(width)},
        )
    total = parts.sum(0)
    d_bias = x.new_empty(0) if bias is None else total[width].to(bias.dtype, copy=True)
    return [d_x, total[:width].mT.to(weight.dtype).contiguous(), d_bias, d_state]
