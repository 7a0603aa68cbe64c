"""Both linear memories in Triton, forward: what each chunk writes, the states from chunk to chunk, then all outputs.

Only :func:`memory_states` goes through a sequence; it keeps the state before every chunk, so that the outputs, and the
gradients later, are computed for all chunks at once.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..check import compute_dtype
from ..launch import Config, Kernel, precision
from . import canary
from .slots import make_slots, slot_count
from .tiles import chunk_of, cumulative, gate, lower, put, sequence_of, tile, turned
from .transform import delta_inverse, delta_transform


@triton.jit(do_not_specialize=["length", "count"])
def memory_states(
    k, values, towards, beta, log_decay, state, borders, offset, states, errors, final, length, count,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    DELTA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One sequence and head, a block of the memory's columns: S before every chunk, the errors, the final memory.

    ``values``: v, or for the delta rule N V, from which N (K ⊙ exp G) S (``towards``) is taken.
    """
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    start, end, slot, chunks = sequence_of(row, borders, offset, length, count, C, PACKED)
    d, e = tl.arange(0, D), tl.program_id(1) * BV + tl.arange(0, BV)
    inner = d[:, None] * DV + e[None, :]
    whole = (row * H + head).to(tl.int64) * (D * DV)
    s = tl.load(state + whole + inner) if STATE else tl.zeros([D, BV], tl.float32)
    for c in range(0, chunks):
        first = start + c * C
        kept = states + ((slot + c) * H + head).to(tl.int64) * (D * DV) + inner
        tl.store(kept, s.to(states.dtype.element_ty))
        written = tile(values + head * DV, first, end, e, H * DV if DELTA else V_STRIDE, C).to(tl.float32)
        keys = turned(k + head * D, first, end, d, K_STRIDE, C)
        total, last = cumulative(log_decay, first, end, head, H, C, DECAY)
        if DELTA:
            w = tile(towards + head * D, first, end, d, H * D, C)
            written -= tl.dot(w, s.to(w.dtype), input_precision=PRECISION)
            put(errors + head * DV, written, first, end, e, H * DV, C)
            written *= gate(beta, first, end, head, H, C)[:, None]
        if DECAY:
            written *= tl.exp(last - total)[:, None]
            s *= tl.exp(last)
        s += tl.dot(keys, written.to(keys.dtype), input_precision=PRECISION)
    tl.store(final + whole + inner, s)


@triton.jit(do_not_specialize=["scale", "length", "count"])
def memory_outputs(
    q, k, written, beta, log_decay, states, table, o, scale, length, count,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    DELTA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and head, a block of columns; ``written``: v, or the errors of the delta rule."""
    slot, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, stop = chunk_of(slot, table, length, count, C, PACKED)
    if first >= stop:
        return
    d, e = tl.arange(0, D), tl.program_id(1) * BV + tl.arange(0, BV)
    queries = tile(q + head * D, first, stop, d, Q_STRIDE, C)
    keys = turned(k + head * D, first, stop, d, K_STRIDE, C)
    total, _ = cumulative(log_decay, first, stop, head, H, C, DECAY)
    scores = tl.dot(queries, keys, input_precision=PRECISION) * lower(total, C, DECAY, False)
    if DELTA:
        scores *= gate(beta, first, stop, head, H, C)[None, :]
    s = tl.load(states + (slot * H + head).to(tl.int64) * (D * DV) + d[:, None] * DV + e[None, :])
    out = tl.dot(queries, s, input_precision=PRECISION)
    if DECAY:
        out *= tl.exp(total)[:, None]
    values = tile(written + head * DV, first, stop, e, H * DV if DELTA else V_STRIDE, C)
    out += tl.dot(scores.to(values.dtype), values, input_precision=PRECISION)
    put(o + head * DV, out * scale, first, stop, e, H * DV, C)


def configs(constants: Mapping[str, Any], *choices: tuple[int, int, int]) -> list[Config]:
    """Of (block of the memory's columns, warps, stages) those not wider than the memory, or the first, made narrow."""
    fit = [choice for choice in choices if choice[0] <= constants["DV"]]
    fit = fit or [(constants["DV"], *choices[0][1:])]
    return [Config((("BV", width),), num_warps=warps, num_stages=stages) for width, warps, stages in fit]


def _inverse_configs(constants: Mapping[str, Any]) -> list[Config]:
    """Its tiles are 16 x 16: one warp leaves no register free, and for four there is nothing to do."""
    return [Config(num_warps=2, num_stages=1)]


def _transform_configs(constants: Mapping[str, Any]) -> list[Config]:
    return configs(constants, (64, 4, 2))


def _states_configs(constants: Mapping[str, Any]) -> list[Config]:
    """Few programs go through long sequences: narrow blocks make more of them, wide ones read the keys less often."""
    return configs(constants, (32, 4, 2), (16, 4, 3))


def _outputs_configs(constants: Mapping[str, Any]) -> list[Config]:
    return configs(constants, (64, 4, 2), (32, 4, 2))


INVERSE = Kernel(delta_inverse, _inverse_configs, canary.forward)
TRANSFORM = Kernel(delta_transform, _transform_configs, canary.forward)
STATES = Kernel(memory_states, _states_configs, canary.forward)
OUTPUTS = Kernel(memory_outputs, _outputs_configs, canary.forward)


def lie_close(x: Tensor) -> Tensor:
    """x [B, T, H, D] with heads close to each other and rows of tokens after each other, copied where it must be."""
    batch, length, _, width = x.shape
    fits = x.stride(3) == 1 and x.stride(2) == width and (batch == 1 or x.stride(0) == length * x.stride(1))
    return x if fits else x.contiguous()


class Call:
    """The tensors of one call as the kernels want them, the chunks' places, and the constants."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        log_decay: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk: int,
        table: bool = True,
    ) -> None:
        self.q, self.k, self.v = lie_close(q), lie_close(k), lie_close(v)
        self.beta, self.log_decay, self.state = (
            None if x is None else x.contiguous() for x in (beta, log_decay, state)
        )
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.value_dim, self.borders = v.shape[3], cu_seqlens
        self.table = self.offset = None
        self.rows = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        if cu_seqlens is not None and table:
            slots = make_slots(cu_seqlens, self.length, chunk)
            self.table = torch.stack([slots.first, slots.stop], 1).to(torch.int32)
            self.offset = slots.offset.to(torch.int32)
        self.slots = slot_count(self.batch, self.length, chunk, self.rows, cu_seqlens is not None)
        self.where = {"length": self.length, "count": -(-self.length // chunk)}
        self.constants = {
            "H": self.heads,
            "D": self.key_dim,
            "DV": self.value_dim,
            "C": chunk,
            "Q_STRIDE": self.q.stride(1),
            "K_STRIDE": self.k.stride(1),
            "V_STRIDE": self.v.stride(1),
            "DELTA": beta is not None,
            "DECAY": log_decay is not None,
            "PACKED": cu_seqlens is not None,
            "STATE": state is not None,
            "PRECISION": precision(q.dtype),
            "DTYPE": str(q.dtype).removeprefix("torch."),
        }

    def each_chunk(self, it: Mapping[str, Any]) -> tuple[int, ...]:
        """A program per chunk and head."""
        return (self.slots * self.heads,)

    def each_chunk_and_block(self, it: Mapping[str, Any]) -> tuple[int, ...]:
        """A program per chunk, head and block of the memory's columns."""
        return self.slots * self.heads, self.value_dim // it["BV"]

    def each_sequence_and_block(self, it: Mapping[str, Any]) -> tuple[int, ...]:
        """A program per sequence, head and block of the memory's columns."""
        return self.rows * self.heads, self.value_dim // it["BV"]

    def new_states(self) -> Tensor:
        """Room for a memory per chunk, [slots·H, D, D_v]; zeros where slots may stay unused: results must repeat."""
        make = self.q.new_empty if self.borders is None else self.q.new_zeros
        return make(self.slots * self.heads, self.key_dim, self.value_dim)

    def transform(self, inverse: Tensor, values: bool) -> tuple[Tensor, Tensor | None]:
        """N (K ⊙ exp G), and with ``values`` N V."""
        towards = self.q.new_empty(self.q.shape)
        errors = self.q.new_empty(self.v.shape) if values else None
        TRANSFORM(
            self.each_chunk,
            {
                "k": self.k, "v": self.v, "log_decay": self.log_decay, "inverse": inverse, "table": self.table,
                "towards": towards, "errors": errors, **self.where,
            },
            {**self.constants, "VALUES": values},
        )  # fmt: skip
        return towards, errors


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """o, the final memory, and what the backward wants: N, the states before each chunk, the errors."""
    call = Call(q, k, v, beta, log_decay, state, cu_seqlens, chunk)
    inverse = towards = projected = errors = None
    gates = {"beta": call.beta, "log_decay": call.log_decay}
    if beta is not None:
        inverse = q.new_empty(call.slots * call.heads, chunk, chunk)
        INVERSE(
            call.each_chunk, {"k": call.k, **gates, "table": call.table, "inverse": inverse, **call.where},
            call.constants,
        )  # fmt: skip
        towards, projected = call.transform(inverse, True)
        errors = q.new_empty(v.shape)
    states, final = call.new_states(), q.new_empty(
        call.rows, call.heads, call.key_dim, call.value_dim, dtype=compute_dtype(q)
    )  # fmt: skip
    STATES(
        call.each_sequence_and_block,
        {
            "k": call.k, "values": call.v if projected is None else projected, "towards": towards, **gates,
            "state": call.state, "borders": call.borders, "offset": call.offset, "states": states, "errors": errors,
            "final": final, **call.where,
        },
        call.constants,
    )  # fmt: skip
    o = q.new_empty(v.shape)
    OUTPUTS(
        call.each_chunk_and_block,
        {
            "q": call.q, "k": call.k, "written": call.v if errors is None else errors, **gates, "states": states,
            "table": call.table, "o": o, "scale": scale, **call.where,
        },
        call.constants,
    )  # fmt: skip
    return o, final, inverse, states, errors
