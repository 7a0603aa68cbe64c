"""Cross-entropy over a vocabulary in Triton, forward: logits live in registers, a tile at a time.

A program takes a block of tokens and a span of the vocabulary, over which it keeps a running log-sum-exp; the spans'
parts are put together by torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import tanh
from ..launch import Config, Kernel, Pairs, precision
from . import chunked

SPAN = 2048  # entries of the vocabulary that a program of the forward goes through


@triton.jit
def logits(
    x, weight, token, tokens, entry, entries, depths, softcap,
    D: tl.constexpr, X_STRIDE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of logits. Tokens and entries beyond the last are read as the last: their logits mean nothing.

    ``depths`` is D as a number that the compiler does not know: it unrolls a loop of known length whole.
    """
    row = x + tl.minimum(token, tokens - 1)[:, None].to(tl.int64) * X_STRIDE
    column = weight + tl.minimum(entry, entries - 1)[None, :].to(tl.int64) * D
    z = tl.zeros([token.shape[0], entry.shape[0]], tl.float32)
    for start in range(0, depths, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        if D % BLOCK_D == 0:
            a, b = tl.load(row + depth[None, :]), tl.load(column + depth[:, None])
        else:
            a = tl.load(row + depth[None, :], mask=depth[None, :] < D, other=0.0)
            b = tl.load(column + depth[:, None], mask=depth[:, None] < D, other=0.0)
        z = tl.dot(a, b, z, input_precision=PRECISION)
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit(do_not_specialize=["tokens", "depths"])
def linear_cross_entropy_forward(
    x, weight, label, parts, tokens, depths, softcap,
    D: tl.constexpr, V: tl.constexpr, X_STRIDE: tl.constexpr, SPAN: tl.constexpr, SMOOTH: tl.constexpr,
    SOFTCAP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, span of entries): log-sum-exp, logit of the label, with SMOOTH the sum of logits."""
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = token < tokens
    target = tl.load(label + token, mask=live, other=-1)
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_N], tl.float32)
    chosen = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    begin = tl.program_id(1) * SPAN
    for start in range(begin, tl.minimum(begin + SPAN, V), BLOCK_V):
        entry = start + tl.arange(0, BLOCK_V)
        z = logits(x, weight, token, tokens, entry, V, depths, softcap, D, X_STRIDE, SOFTCAP, PRECISION, BLOCK_D)
        chosen += tl.sum(tl.where(entry[None, :] == target[:, None], z, 0.0), 1)
        if SMOOTH:
            total += tl.sum(tl.where(entry[None, :] < V, z, 0.0), 1)
        z = tl.where(entry[None, :] < V, z, float("-inf"))
        larger = tl.maximum(largest, tl.max(z, 1))
        mass = mass * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger[:, None]), 1)
        largest = larger
    place = parts + tl.program_id(1).to(tl.int64) * 3 * tokens + token
    tl.store(place, largest + tl.log(mass), mask=live)
    tl.store(place + tokens, chosen, mask=live)
    if SMOOTH:
        tl.store(place + 2 * tokens, total, mask=live)


def tiles(constants: Mapping[str, Any], names: Sequence[str], narrow: bool) -> list[Config]:
    """Tiles of a matrix product, 128 x 128 and one that is wider, or less deep where a wider one would be ``narrow``.

    Half as deep for float32, whose operands take twice the shared memory.
    """
    deep = 32 if constants["DTYPE"] == "float32" else 64
    second = (128, 128, 32, 4) if narrow else (128, 256, deep, 3)
    return [
        Config(tuple(zip(names, sizes, strict=True)), num_warps=8, num_stages=stages)
        for *sizes, stages in ((128, 128, deep, 3), second)
    ]


def configs(constants: Mapping[str, Any]) -> list[Config]:
    """Tiles of tokens and entries; a soft-cap takes the registers of wider ones."""
    return tiles(constants, ("BLOCK_N", "BLOCK_V", "BLOCK_D"), constants["SOFTCAP"])


def problem(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with these constants: tokens that do not fill their last block, one in nine ignored."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    kind, width, tokens = getattr(torch, constants["DTYPE"]), constants["D"], 300
    entries = constants["V"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device)

    target = torch.randint(entries, (tokens,), generator=source, device=device)
    target[::9] = -100
    return {
        "x": draw(tokens, constants["X_STRIDE"]).to(kind)[:, :width],
        "weight": (draw(entries, width) * (2 / width) ** 0.5).to(kind),
        "target": target,
        "ignore_index": -100,
        "smoothing": 0.1 if constants["SMOOTH"] else 0.0,
        "z_loss": 0.01,
        "softcap": 5.0 if constants["SOFTCAP"] else None,
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float32."""
    return {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def canary(constants: Mapping[str, Any]) -> Pairs:
    """Losses against the plain path."""
    arguments = problem(constants)
    wanted = chunked.forward.body(*wide(arguments).values(), 128, False, False)
    return [(forward(**arguments)[0], wanted[0])]


FORWARD = Kernel(linear_cross_entropy_forward, configs, canary)


def call(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, smoothing: float, softcap: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that forward and backward have in common; an ignored label is -1."""
    if x.stride(1) != 1:
        x = x.contiguous()
    arguments = {
        "x": x,
        "weight": weight.to(x.dtype).contiguous(),
        "label": torch.where(target == ignore_index, -1, target).int(),
        "tokens": x.shape[0],
        "depths": x.shape[1],
        "softcap": softcap or 0.0,
    }
    constants = {
        "D": x.shape[1],
        "V": weight.shape[0],
        "X_STRIDE": x.stride(0),
        "SMOOTH": smoothing > 0,
        "SOFTCAP": softcap is not None,
        "DTYPE": str(x.dtype).removeprefix("torch."),
        "PRECISION": precision(x.dtype),
    }
    return arguments, constants


def forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Losses [N] and log-sum-exps [N]."""
    arguments, constants = call(x, weight, target, ignore_index, smoothing, softcap)
    tokens, entries = x.shape[0], weight.shape[0]
    spans = triton.cdiv(entries, SPAN)
    parts = x.new_empty(spans, 3, tokens, dtype=torch.float32)
    FORWARD(
        lambda it: (triton.cdiv(tokens, it["BLOCK_N"]), spans),
        {**arguments, "parts": parts},
        {**constants, "SPAN": SPAN},
    )
    log_sum = torch.logsumexp(parts[:, 0], 0)
    expected = parts[:, 1].sum(0)
    if smoothing:
        expected = (1 - smoothing) * expected + (smoothing / entries) * parts[:, 2].sum(0)
    loss = log_sum - expected + z_loss * log_sum.square()
    return loss.where(target != ignore_index, 0), log_sum
