"""Both linear memories in Triton for a few tokens, forward only: the recurrence itself, token by token, in float32.

It reads and writes each state once, which is what decoding costs. There is nothing for a backward in it.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..check import compute_dtype
from ..launch import Config, Kernel
from . import canary
from .forward import Call, configs

FEW = 4  # tokens of a row up to which this is the better kernel


def is_short(q: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether to go token by token: rows of few tokens, or packed sequences that have at most one in the mean."""
    return q.shape[1] <= (FEW if cu_seqlens is None else cu_seqlens.numel() - 1)


@triton.jit(do_not_specialize=["scale", "length"])
def memory_steps(
    q, k, v, beta, log_decay, state, borders, o, final, scale, length,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    DELTA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One sequence and head, a block of the memory's columns."""
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    if PACKED:
        start, end = tl.load(borders + row), tl.load(borders + row + 1)
    else:
        start, end = row * length, (row + 1) * length
    d, e = tl.arange(0, D), tl.program_id(1) * BV + tl.arange(0, BV)
    inner = (row * H + head).to(tl.int64) * (D * DV) + d[:, None] * DV + e[None, :]
    s = tl.load(state + inner) if STATE else tl.zeros([D, BV], tl.float32)
    for i in range(0, end - start):
        token = (start + i).to(tl.int64)
        query = tl.load(q + token * Q_STRIDE + head * D + d).to(tl.float32)
        key = tl.load(k + token * K_STRIDE + head * D + d).to(tl.float32)
        written = tl.load(v + token * V_STRIDE + head * DV + e).to(tl.float32)
        if DECAY:
            s *= tl.exp(tl.load(log_decay + token * H + head))
        if DELTA:
            written = (written - tl.sum(key[:, None] * s, 0)) * tl.load(beta + token * H + head)
        s += key[:, None] * written[None, :]
        out = tl.sum(query[:, None] * s, 0) * scale
        tl.store(o + token * (H * DV) + head * DV + e, out.to(o.dtype.element_ty))
    tl.store(final + inner, s)


def _configs(constants: Mapping[str, Any]) -> list[Config]:
    return configs(constants, (32, 4, 1), (16, 4, 1))


STEPS = Kernel(memory_steps, _configs, canary.decode)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """o and the final memory."""
    call = Call(q, k, v, beta, log_decay, state, cu_seqlens, chunk, table=False)
    o = q.new_empty(v.shape)
    final = q.new_empty(call.rows, call.heads, call.key_dim, call.value_dim, dtype=compute_dtype(q))
    STEPS(
        call.each_sequence_and_block,
        {
            "q": call.q, "k": call.k, "v": call.v, "beta": call.beta, "log_decay": call.log_decay,
            "state": call.state, "borders": call.borders, "o": o, "final": final, "scale": scale,
            "length": call.length,
        },
        call.constants,
    )  # fmt: skip
    return o, final
