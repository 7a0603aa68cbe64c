"""Short convolution in Triton, forward: a tile of tokens and channels at a time, activation included.

Tiles of the K shifted inputs are read one by one: after the first they lie in the L1 cache.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import document_of, sigmoid
from ..launch import Config, Kernel, Pairs
from . import chunked

SPAN = 128  # tokens of a program, in steps of BLOCK_T


@triton.jit
def place(row, token, borders, length, documents, steps, PACKED: tl.constexpr):
    """First token, end, and number of the sequence that each token belongs to; ``token`` counts through all rows."""
    if PACKED:
        document = document_of(borders, token, documents, steps)
        return tl.load(borders + document), tl.load(borders + document + 1), document
    else:
        return token * 0 + row * length, token * 0 + (row + 1) * length, token * 0 + row


@triton.jit
def inputs(
    x, index, state, token, first, document, live, channel, known, BACK: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, X_STRIDE: tl.constexpr, STATE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Inputs BACK tokens before each ``live`` token: of its own sequence, else of the state, else zero."""
    position = token - BACK
    inside = live & (position >= first)
    mask = inside[:, None] & known[None, :]
    entry = tl.load(index + position, mask=inside, other=0) if INDEX else position.to(tl.int64)
    value = tl.load(x + entry[:, None] * X_STRIDE + channel[None, :], mask=mask, other=0.0)
    value = value.to(tl.float32)
    if STATE and BACK > 0:
        slot = document * (K - 1) + position - first + K - 1
        mask = (live & (position < first))[:, None] & known[None, :]
        value += tl.load(state + slot[:, None].to(tl.int64) * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def sums(
    x, index, weight, bias, state, token, first, document, live, channel, known,
    C: tl.constexpr, K: tl.constexpr, X_STRIDE: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """What enters the activation at each token and channel."""
    total = tl.zeros([token.shape[0], channel.shape[0]], tl.float32)
    if BIAS:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(K):
        tap = tl.load(weight + channel * K + j, mask=known, other=0.0).to(tl.float32)
        value = inputs(
            x, index, state, token, first, document, live, channel, known, K - 1 - j, C, K, X_STRIDE, STATE, INDEX
        )  # fmt: skip
        total += tap[None, :] * value
    return total


@triton.jit(do_not_specialize=["length", "documents", "steps"])
def short_conv_forward(
    x, index, weight, bias, state, borders, y, length, documents, steps,
    C: tl.constexpr, K: tl.constexpr, X_STRIDE: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, INDEX: tl.constexpr, DTYPE: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (span of tokens, block of channels, row)."""
    row = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    begin = tl.program_id(0) * SPAN
    for start in range(begin, tl.minimum(begin + SPAN, length), BLOCK_T):
        time = start + tl.arange(0, BLOCK_T)
        live = time < length
        token = row * length + time
        first, _, document = place(row, token, borders, length, documents, steps, PACKED)
        z = sums(
            x, index, weight, bias, state, token, first, document, live, channel, known,
            C, K, X_STRIDE, BIAS, STATE, INDEX,
        )  # fmt: skip
        if SILU:
            z = z * sigmoid(z)
        mask = live[:, None] & known[None, :]
        tl.store(y + token[:, None].to(tl.int64) * C + channel[None, :], z.to(y.dtype.element_ty), mask=mask)


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """16-byte accesses of half precision: 8 channels a thread, a warp on rows of 64 or 128."""
    wide = 64 if constants["C"] <= 64 else 128
    return [
        Config((("BLOCK_T", 32), ("BLOCK_C", wide)), num_warps=4, num_stages=1),
        Config((("BLOCK_T", 16), ("BLOCK_C", wide)), num_warps=4, num_stages=1),
    ]


def problem(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that has these constants: three spans long, the last one not full."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    kind, width = getattr(torch, constants["DTYPE"]), constants["K"]
    choices = constants.get("CHOICES", 2) if constants.get("INDEX") else 0
    batch, length, channels = 1 if constants["PACKED"] else 2, 2 * SPAN + 17, constants["C"]
    slots = length * max(1, choices)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device).to(kind)

    borders = torch.tensor([0, 0, 1, SPAN - 2, SPAN + 40, slots], dtype=torch.int32, device=device)
    order = torch.randperm(slots, generator=source, device=device) if choices else None
    return {
        "x": draw(batch, length, constants["X_STRIDE"])[..., :channels],
        "weight": draw(channels, width),
        "bias": draw(channels) if constants["BIAS"] else None,
        "state": draw(5 if constants["PACKED"] else batch, width - 1, channels) if constants["STATE"] else None,
        "cu_seqlens": borders if constants["PACKED"] else None,
        "silu": constants["SILU"],
        "index": None if order is None else order.argsort() // choices,
        "inverse": None if order is None else order.view(1, length, choices),
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float32."""
    return {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def canary(constants: Mapping[str, Any]) -> Pairs:
    """The output against the plain path."""
    arguments = problem(constants)
    del arguments["inverse"]
    return [(forward(**arguments), chunked.forward(**wide(arguments))[0])]


FORWARD = Kernel(short_conv_forward, configs, canary)


def call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that the kernels of forward and backward have in common."""
    batch, length, channels = x.shape
    if x.stride(2) != 1 or x.stride(0) != length * x.stride(1):
        x = x.contiguous()
    documents = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    arguments = {
        "x": x,
        "index": index,
        "weight": weight.contiguous(),
        "bias": bias,
        "state": None if state is None else state.to(x.dtype).contiguous(),
        "borders": cu_seqlens,
        "length": length if index is None else index.shape[0],
        "documents": documents,
        "steps": (documents - 1).bit_length(),
    }
    constants = {
        "C": channels,
        "K": weight.shape[1],
        "X_STRIDE": x.stride(1),
        "SILU": silu,
        "BIAS": bias is not None,
        "STATE": state is not None,
        "PACKED": cu_seqlens is not None,
        "INDEX": index is not None,
        "DTYPE": str(x.dtype).removeprefix("torch."),
        "SPAN": SPAN,
    }
    return arguments, constants


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
) -> Tensor:
    """The output [B, T, C], [1, S, C] with an index."""
    arguments, constants = call(x, weight, bias, state, cu_seqlens, silu, index)
    length, channels = arguments["length"], x.shape[2]
    y = x.new_empty(x.shape if index is None else (1, length, channels))
    FORWARD(
        lambda it: (triton.cdiv(length, it["SPAN"]), triton.cdiv(channels, it["BLOCK_C"]), y.shape[0]),
        {**arguments, "y": y},
        constants,
    )
    return y
