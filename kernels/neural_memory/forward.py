"""The Triton forward of neural memory: one program per memory (sequence and head), which walks its steps in order.

The state W, S lies in global memory (the L2 cache, while a program works on it) and passes through a program in blocks
of BF hidden units, twice per step: once for the keys' pass at the anchor, up to the error; once for the reads and the
update of the state, in place. docs/neural_memory.md has the algebra and what the design costs.

A linear memory is the last layer alone: its hidden vector is the key, or the query, itself (``DEEP`` false).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel, precision
from .canary import forward_pairs
from .cost import kept_slots, segment_chunks
from .gate_kernels import run_gates
from .spec import MemorySpec
from .tiles import (
    begin_state,
    clear,
    copy,
    gelu,
    gelu_slope,
    load_gates,
    load_norm,
    normalised,
    product,
    project,
    sequence,
    step_offsets,
    step_slot,
    token_columns,
    token_rows,
)


@triton.jit
def inner_pass(k_ptr, v_ptr, tok, valid, anchor, scale, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
               BF: tl.constexpr, DEEP: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr,
               DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The keys' pass at the anchor: ẑ and 1/std of the last layer, the error e, and Δ of the last layer."""
    u1, u2 = anchor
    d = tl.arange(0, D)
    last = tl.zeros([C, D], tl.float32)
    if NORM or not DOT:
        k = token_rows(k_ptr, tok, valid, d)
        for start in tl.range(0, F, BF, disable_licm=True):
            f = start + tl.arange(0, BF)
            if DEEP:
                hidden, _ = gelu(product(k, tl.load(u1 + d[:, None] * F + f[None, :]), DT, PRECISION))
            else:
                hidden = token_rows(k_ptr, tok, valid, f)
            last += product(hidden, tl.load(u2 + f[:, None] * D + d[None, :]), DT, PRECISION)
    error = -token_rows(v_ptr, tok, valid, d).to(tl.float32)
    normed = last
    rstd = tl.zeros([C], tl.float32)
    if NORM:
        normed, rstd = normalised(last, D)
    if not DOT:
        if NORM:
            error += normed * scale[None, :]
        else:
            error += last
        if RESIDUAL:
            error += token_rows(k_ptr, tok, valid, d).to(tl.float32)
    delta = error
    if NORM:
        delta = project(error * scale[None, :], normed, D) * rstd[:, None]
    return normed, rstd, error, delta


@triton.jit
def outer_pass(q_ptr, k_ptr, tok, valid, delta, anchor, old, new, saved, write, gates, workspace,
               D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, DEEP: tl.constexpr,
               MOMENTUM: tl.constexpr, READ: tl.constexpr, UPDATE: tl.constexpr, SAVE: tl.constexpr,
               DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """READ: the reads up to the LayerNorm, but for the term of the last layer's scores; with h h_Kᵀ of that layer.
    UPDATE: the state after the step, ``new``, which may be where ``old`` is. SAVE: see :func:`save`. Not UPDATE: Δ of
    the first layer and both pre-activations to ``workspace``. ``anchor``, ``old``, ``new``: where the two layers begin;
    S follows W."""
    SIZE: tl.constexpr = D * F
    u1, u2 = anchor
    old1, old2 = old
    new1, new2 = new
    retain, carry, end_write, end_momentum, end_retain, end_carry, end_inertia = gates
    d = tl.arange(0, D)
    k = token_rows(k_ptr, tok, valid, d)
    kt = token_columns(k_ptr, tok, valid, d)
    q = token_rows(q_ptr, tok, valid, d)
    scores = tl.zeros([C, C], tl.float32)
    if READ and DEEP:
        scores = product(q, kt, DT, PRECISION) * tl.load(write).to(tl.float32)
    products = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, D], tl.float32)
    for start in tl.range(0, F, BF, disable_licm=True):
        f = start + tl.arange(0, BF)
        at1 = d[:, None] * F + f[None, :]
        at2 = f[:, None] * D + d[None, :]
        moment1 = 0.0
        moment2 = 0.0
        if DEEP:
            first = tl.load(u1 + at1).to(DT)
            before = product(k, first, DT, PRECISION)
            _, sigma = gelu(before)
            delta1 = product(delta, tl.trans(tl.load(u2 + at2).to(DT)), DT, PRECISION) * gelu_slope(before, sigma)
            # The hidden keys, transposed: a product of their own instead of the transpose of a product.
            hidden_t, _ = gelu(product(tl.trans(first), kt, DT, PRECISION))
            if not UPDATE:
                at_hidden = tl.arange(0, C)[:, None] * F + f[None, :]
                tl.store(workspace[0] + at_hidden, delta1.to(DT))
                tl.store(workspace[1] + at_hidden, before)
            weight1 = tl.load(old1 + at1)
            if MOMENTUM:
                moment1 = tl.load(old1 + SIZE + at1)
        else:
            hidden_t = token_columns(k_ptr, tok, valid, f)
        weight2 = tl.load(old2 + at2)
        if MOMENTUM:
            moment2 = tl.load(old2 + SIZE + at2)
        if READ:
            if DEEP:
                pre = product(q, weight1, DT, PRECISION) * retain[:, None] - product(scores, delta1, DT, PRECISION)
                if MOMENTUM:
                    pre += product(q, moment1, DT, PRECISION) * carry[:, None]
                read, _ = gelu(pre)
                if not UPDATE:
                    tl.store(workspace[2] + at_hidden, pre)
            else:
                read = token_rows(q_ptr, tok, valid, f).to(tl.float32)
            products += product(read, hidden_t, DT, PRECISION)
            out += product(read * retain[:, None], weight2, DT, PRECISION)
            if MOMENTUM:
                out += product(read * carry[:, None], moment2, DT, PRECISION)
        if UPDATE:
            if DEEP:
                after = end_retain * weight1 - product(kt, delta1 * end_write[:, None], DT, PRECISION)
                if MOMENTUM:
                    after += end_carry * moment1
                    inert = end_inertia * moment1 - product(kt, delta1 * end_momentum[:, None], DT, PRECISION)
                    tl.store(new1 + SIZE + at1, inert)
                tl.store(new1 + at1, after)
                if SAVE:
                    save(saved, 0, weight1, moment1, after, at1, SIZE, MOMENTUM)
            after = end_retain * weight2 - product(hidden_t, delta * end_write[:, None], DT, PRECISION)
            if MOMENTUM:
                after += end_carry * moment2
                inert = end_inertia * moment2 - product(hidden_t, delta * end_momentum[:, None], DT, PRECISION)
                tl.store(new2 + SIZE + at2, inert)
            tl.store(new2 + at2, after)
            if SAVE:
                save(saved, 1, weight2, moment2, after, at2, SIZE, MOMENTUM)
    return products, out


@triton.jit
def save(saved, LAYER: tl.constexpr, weight, moment, after, at, SIZE: tl.constexpr, MOMENTUM: tl.constexpr):
    """A block of the weights, as they were (``opening``) or became (``ending``), to the anchor; and of [W; S], as they
    were, to the kept states (``keeping``)."""
    anchors, kept, opening, ending, keeping = saved
    tl.store(anchors[LAYER] + at, tl.where(ending, after, weight), mask=opening | ending)
    tl.store(kept[LAYER] + at, weight, mask=keeping)
    if MOMENTUM:
        tl.store(kept[LAYER] + SIZE + at, moment, mask=keeping)


@triton.jit(do_not_specialize=["T"])
def neural_memory_forward(
    q_ptr, k_ptr, v_ptr, write_ptr, vectors_ptr, ends_ptr, norm_ptr, start_ptr, position_ptr, cu_ptr, o_ptr, state_ptr,
    kept_ptr, T, zero, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr,
    EVERY: tl.constexpr, DEEP: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr,
    MOMENTUM: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """See the module. ``start``: the state before the call, or W_0 of each layer [H, ·]; ``state``: that after it, and
    the running one in between, [N, H, ·] with W, S and the anchor of each layer; ``kept``: W and S every EVERY chunks,
    [slots, H, ·].

    ``zero`` is 0, which the compiler does not know: addresses that move by it are not kept in registers over all steps.
    """
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    SIZE: tl.constexpr = D * F
    LAYERS: tl.constexpr = 2 if DEEP else 1
    COPIES: tl.constexpr = 2 if MOMENTUM else 1
    WHOLE: tl.constexpr = (COPIES + 1) * SIZE
    begin, length, place = sequence(n, cu_ptr, position_ptr, T, PACKED, STATE)
    own = state_ptr + (n * H + h).to(tl.int64) * (LAYERS * WHOLE)
    begin_state(own, start_ptr, n, h, H, SIZE, LAYERS, COPIES, COPIES + 1, STATE)
    if STATE:
        for layer in tl.static_range(LAYERS):
            at = layer * WHOLE + COPIES * SIZE
            copy(own + at, start_ptr + (n * H + h).to(tl.int64) * (LAYERS * WHOLE) + at, SIZE)
    tl.debug_barrier()
    d = tl.arange(0, D)
    i = tl.arange(0, C)
    scale = load_norm(norm_ptr, h, D, NORM)
    filled = place + length
    slots = (begin // (CHUNK * EVERY) + n).to(tl.int64)
    last_step = tl.where(length > 0, tl.cdiv(filled, C), 0)
    for j in tl.range(place // C, last_step, disable_licm=True):
        base = j * C
        state1 = own + j * 16 * zero
        state2 = state1 + (LAYERS - 1) * WHOLE
        u1 = state1 + COPIES * SIZE
        u2 = state2 + COPIES * SIZE
        opens = (base % CHUNK == 0) & ((base > 0) | (not STATE))
        # Later steps, or the next call, need the anchor beside the running weights.
        opening = opens & ((C < CHUNK) | (base + CHUNK > filled))
        ending = (base + C == filled) & (filled % CHUNK == 0)
        keeping = (base > 0) & (base % (CHUNK * EVERY) == 0) & KEEP
        slot = tl.where(keeping, slots + base // (CHUNK * EVERY) - 1, 0) * H + h
        kept = kept_ptr + slot * (LAYERS * COPIES * SIZE)
        saved = (u1, u2), (kept, kept + (LAYERS - 1) * COPIES * SIZE), opening, ending, keeping
        tok, valid = step_offsets(j, begin, length, place, h, H, D, C)
        slot = step_slot(j, n, begin, place, C) * H + h
        gates = load_gates(vectors_ptr + slot * (4 * C), ends_ptr + slot * 4, C)
        write = write_ptr + slot * (C * C) + i[:, None] * C + i[None, :]
        anchor = tl.where(opens, state1, u1), tl.where(opens, state2, u2)
        _, _, _, delta = inner_pass(
            k_ptr, v_ptr, tok, valid, anchor, scale, D, F, C, BF, DEEP, NORM, RESIDUAL, DOT, DT, PRECISION
        )
        state = state1, state2
        products, out = outer_pass(
            q_ptr, k_ptr, tok, valid, delta, anchor, state, state, saved, write, gates, o_ptr, D, F, C, BF, DEEP,
            MOMENTUM, True, True, True, DT, PRECISION,
        )  # fmt: skip
        out -= product(products * tl.load(write).to(tl.float32), delta, DT, PRECISION)
        if NORM:
            out = normalised(out, D)[0] * scale[None, :]
        if RESIDUAL:
            out += token_rows(q_ptr, tok, valid, d).to(tl.float32)
        tl.store(o_ptr + tok[:, None] + d[None, :], out.to(o_ptr.dtype.element_ty), mask=valid[:, None])
        tl.debug_barrier()
    if (length == 0) & (not STATE):
        for layer in tl.static_range(LAYERS):
            copy(own + layer * WHOLE + COPIES * SIZE, own + layer * WHOLE, SIZE)
    if KEEP:
        # An operator's results must repeat: places that no chunk reached are zero.
        used = slots + tl.maximum(filled - 1, 0) // (CHUNK * EVERY)
        for spare in range(used, (begin + length) // (CHUNK * EVERY) + n + 1):
            clear(kept_ptr + (spare * H + h) * (LAYERS * COPIES * SIZE), LAYERS * COPIES * SIZE)


DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def step_length(spec: MemorySpec) -> int:
    """C of a step: the chunk, or the part of it that fits a program's registers."""
    return min(spec.chunk_size, 64)


def constants_of(
    q: Tensor, weights: Sequence[Tensor], state: bool, packed: bool, keep: bool, spec: MemorySpec
) -> dict[str, Any]:
    """What selects the function that the kernels compute."""
    return {
        "H": q.shape[2],
        "D": q.shape[3],
        "F": weights[0].shape[2],
        "CHUNK": spec.chunk_size,
        "C": step_length(spec),
        "EVERY": segment_chunks(spec, [(w.shape[1], w.shape[2]) for w in weights]),
        "DEEP": spec.layers == 2,
        "NORM": spec.norm,
        "RESIDUAL": spec.residual,
        "DOT": spec.bias == "dot",
        "RETENTION": spec.retention == "l2",
        "MOMENTUM": spec.has_momentum,
        "LATE": not spec.read_after_write,
        "STATE": state,
        "PACKED": packed,
        "KEEP": keep,
        "DT": DTYPES[q.dtype],
        "PRECISION": precision(q.dtype),
        "GATE_PRECISION": precision(torch.float32) if q.dtype == torch.float32 else "tf32",
    }


def forward_configs(constants: Mapping[str, Any]) -> list[Config]:
    """Blocks of hidden units; the narrow one spills least, and eight warps hold the most registers."""
    return [Config((("BF", b),), 8, 1) for b in (16, 32, 64) if b <= constants["F"]]


FORWARD = Kernel(neural_memory_forward, forward_configs, forward_pairs)


def pack(tensors: Sequence[Tensor], layers: int) -> Tensor:
    """[..., in, out] of every layer, part by part as ``state_names`` has them, as one [..., ·], layer by layer."""
    parts = len(tensors) // layers
    return torch.cat([tensors[p * layers + i].flatten(-2) for i in range(layers) for p in range(parts)], -1)


def unpack(packed: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`pack`; every tensor its own."""
    layers, parts = len(weights), packed.shape[-1] // sum(w[0].numel() for w in weights)
    sizes = [w[0].numel() for w in weights for _ in range(parts)]
    flat = packed.split(sizes, -1)
    order = [i * parts + p for p in range(parts) for i in range(layers)]
    shapes = list(weights) * parts
    return [
        flat[place].unflatten(-1, w.shape[1:]).clone(memory_format=torch.contiguous_format)
        for place, w in zip(order, shapes, strict=True)
    ]


def run_forward(
    tokens: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    norm: Tensor | None,
    state: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: MemorySpec,
    keep: bool,
) -> list[Tensor]:
    """What the operator returns: o, the state's tensors after the call, the position, and W and S every EVERY chunks
    (none unless ``keep``)."""
    q, k, v, step, log_retain, log_momentum = (None if x is None else x.contiguous() for x in tokens)
    assert q is not None and k is not None and v is not None and step is not None
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    constants = constants_of(q, weights, bool(state), cu_seqlens is not None, keep, spec)
    parts = 3 if spec.has_momentum else 2
    o = torch.empty_like(v)
    size = sum(w[0].numel() for w in weights)
    final = step.new_empty((rows, constants["H"], parts * size))
    slots = kept_slots(q.shape[0] * q.shape[1], rows, spec.chunk_size, constants["EVERY"]) if keep else 0
    kept = step.new_empty((slots, constants["H"], (parts - 1) * size))
    write, vectors, ends = run_gates(step, log_retain, log_momentum, position, cu_seqlens, rows, constants, q.dtype)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "write_ptr": write,
        "vectors_ptr": vectors,
        "ends_ptr": ends,
        "norm_ptr": q if norm is None else norm.contiguous(),
        "start_ptr": pack(state or weights, spec.layers),
        "position_ptr": step if position is None else position,
        "cu_ptr": step if cu_seqlens is None else cu_seqlens,
        "o_ptr": o,
        "state_ptr": final,
        "kept_ptr": kept,
        "T": q.shape[1],
        "zero": 0,
    }
    own = {name: value for name, value in constants.items() if name in FORWARD.function.arg_names}
    FORWARD(lambda c: (rows * c["H"],), arguments, own)
    lengths = q.shape[1] if cu_seqlens is None else cu_seqlens.diff()
    before = torch.zeros(rows, dtype=torch.int32, device=q.device) if position is None else position
    after = torch.remainder(before + lengths, spec.chunk_size).to(torch.int32)
    return [o, *unpack(final, weights), after, *([kept] if keep else [])]
