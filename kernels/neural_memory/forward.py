"""The forward of neural memory in Triton: segments of EVERY chunks in order, two kernels each.

``neural_memory_states`` (``states.py``) walks a segment's steps and leaves the state each begins with;
``neural_memory_reads`` (``reads.py``) reads from all of them at once. How many segments there can be is known from
shapes alone; a program whose sequence has no such segment returns at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..launch import Kernel, Pairs, precision
from .canary import LP, backward_pairs, forward_pairs
from .cost import kept_every, kept_slots
from .duals import derives, enter, leave, shifts, start
from .gate_kernels import run_gates
from .launch_plans import reads_plan, states_plan
from .orthogonal import turn_of, turned_size
from .reads import neural_memory_reads
from .retentions import settled_size
from .slots import Band
from .spec import MemorySpec
from .states import neural_memory_states

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def step_length(spec: MemorySpec, width: int) -> int:
    """C of a step: the chunk, or what muon orthogonalises at once, or the part of it that fits a program's registers
    with heads of ``width``."""
    return min(spec.step_size, 64 if width <= 64 else 32)


def settle_of(spec: MemorySpec) -> tuple[Any, ...]:
    """What a chunk's end makes of the weights, and its parameter: the same for all that leave them as they are."""
    if spec.retention in ("l2", "none"):
        return ("none",)
    return (spec.retention, spec.lq_power) if spec.retention == "lq" else (spec.retention,)


def constants_of(
    q: Tensor,
    weights: Sequence[Tensor],
    state: bool,
    packed: bool,
    grad: bool,
    spec: MemorySpec,
    band: Band | None = None,
) -> dict[str, Any]:
    """What selects the function that the kernels compute."""
    return {
        "H": q.shape[2],
        "D": q.shape[3],
        "F": weights[0].shape[2],
        "CHUNK": spec.chunk_size,
        "C": step_length(spec, q.shape[3]),
        "EVERY": kept_every(spec, [(w.shape[1], w.shape[2]) for w in weights]),
        "WINDOW": spec.window if band is None else band.window,
        "HALO": 0 if band is None else band.halo,
        "LAYERS": spec.layers,
        "NORM": spec.norm,
        "RESIDUAL": spec.residual,
        "BIAS": (spec.bias, *(getattr(spec, name) for name in LP if spec.bias == "lp")),
        "SETTLE": settle_of(spec),
        "RETENTION": spec.retention_gate,
        "MOMENTUM": spec.has_momentum,
        "TURN": turn_of(spec),
        "LATE": not spec.read_after_write,
        "STATE": state,
        "PACKED": packed,
        "GRAD": grad,
        "DT": DTYPES[q.dtype],
        "PRECISION": precision(q.dtype),
        "GATE_PRECISION": precision(torch.float32) if q.dtype == torch.float32 else "tf32",
    }


def pairs_of(constants: Mapping[str, Any]) -> Pairs:
    """The canary of a kernel that both directions launch."""
    return (backward_pairs if constants["GRAD"] else forward_pairs)(constants)


STATES = Kernel(neural_memory_states, states_plan, pairs_of)
READS = Kernel(neural_memory_reads, reads_plan, pairs_of)


def launch(kernel: Kernel, grid: tuple[int, ...], arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
    """Launch with those of the arguments and constants that the kernel takes."""
    names = kernel.function.arg_names
    given = {name: value for name, value in arguments.items() if name in names}
    own = {name: value for name, value in constants.items() if name in names}
    kernel(lambda _: grid, given, own)


def segments(length: int, constants: Mapping[str, Any], band: Band | None = None) -> int:
    """How many segments a sequence of at most ``length`` tokens can have; one at least. With a ``band``, which knows
    the tokens, ``length`` is of slots."""
    length, chunk = (length, constants["CHUNK"]) if band is None else (band.length, band.chunk)
    most = length + (chunk - 1 if constants["STATE"] else 0)
    return max(1, -(-most // (chunk * constants["EVERY"])))


def held_order(spec: MemorySpec) -> list[int]:
    """The matrices in the order in which kernels hold them: that whose outputs are the memory's comes last."""
    return [*(i for i in range(spec.layers) if i != spec.last), spec.last]


def pack(tensors: Sequence[Tensor], spec: MemorySpec) -> Tensor:
    """[..., in, out] of every layer, part by part as ``state_names`` has them, as one [..., ·], layer by layer."""
    layers = spec.layers
    parts = len(tensors) // layers
    return torch.cat([tensors[p * layers + i].flatten(-2) for i in held_order(spec) for p in range(parts)], -1)


def unpack(packed: Tensor, weights: Sequence[Tensor], spec: MemorySpec) -> list[Tensor]:
    """The inverse of :func:`pack`; every tensor its own."""
    layers, parts = len(weights), packed.shape[-1] // sum(w[0].numel() for w in weights)
    held = held_order(spec)
    flat = packed.split([weights[i][0].numel() for i in held for _ in range(parts)], -1)
    places = [held.index(i) * parts + p for p in range(parts) for i in range(layers)]
    return [
        flat[place].unflatten(-1, w.shape[1:]).clone(memory_format=torch.contiguous_format)
        for place, w in zip(places, list(weights) * parts, strict=True)
    ]


def settled(like: Tensor, state: Sequence[Tensor], rows: int, constants: Mapping[str, Any], spec: MemorySpec) -> Tensor:
    """Where a retention keeps what ``settled_size`` counts; of kl with the shifts of a state."""
    shape = rows, constants["H"], settled_size(constants)
    if spec.retention != "kl":
        return like.new_empty(shape)
    out = like.new_zeros(shape)
    if state:
        found = shifts(state, spec)
        columns = torch.cat([found[i] for i in held_order(spec)], -1)
        out[..., : columns.shape[-1]] = columns
    return out


def run_forward(
    tokens: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    norm: Tensor | None,
    state: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: MemorySpec,
    keep: bool,
    band: Band | None = None,
) -> list[Tensor]:
    """What the operator returns: o, the state's tensors after the call, the position, and W and S every EVERY chunks
    (none unless ``keep``). ``band``: of a memory with a window, of whose tokens these are the slots (``slots.py``)."""
    q, k, v, step, log_retain, log_momentum, delta = (None if x is None else x.contiguous() for x in tokens)
    assert q is not None and k is not None and v is not None and step is not None
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    constants = constants_of(q, weights, bool(state), cu_seqlens is not None, False, spec, band)
    parts = 3 if spec.has_momentum else 2
    o = torch.empty_like(v)
    heads, c, d = (constants[name] for name in "HCD")
    steps = constants["EVERY"] * spec.chunk_size // c
    size = sum(w[0].numel() for w in weights)
    final = step.new_empty((rows, heads, parts * size))
    slots = kept_slots(q.shape[0] * q.shape[1], rows, spec.chunk_size, constants["EVERY"])
    kept = step.new_empty((slots, heads, (parts - 1) * size))
    if band is not None:  # what no sequence reaches, for results must repeat
        kept[band.least // (spec.chunk_size * constants["EVERY"]) + rows :].zero_()
    gates = step, log_retain, log_momentum, position, cu_seqlens, rows, constants
    write, vectors, ends = run_gates(*gates, q.dtype, None if band is None else band.gamma)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "threshold_ptr": step if delta is None else delta,
        "write_ptr": write,
        "vectors_ptr": vectors,
        "ends_ptr": ends,
        "norm_ptr": q if norm is None else norm.contiguous(),
        "start_ptr": pack(enter(state, spec) if state else start(weights, spec), spec),
        "position_ptr": step if position is None else position,
        "cu_ptr": step if cu_seqlens is None else cu_seqlens,
        "o_ptr": o,
        "state_ptr": final,
        "kept_ptr": kept,
        "states_ptr": step.new_empty((rows, heads, steps, (parts - 1) * size)),
        "settled_ptr": settled(step, state, rows, constants, spec),
        "turned_ptr": step.new_empty((rows, heads, turned_size(constants))),
        "small_ptr": q.new_empty((rows, heads, steps, c * (d + constants["F"]))),
        # Of the backward alone:
        **dict.fromkeys(("d_o_ptr", "d_norm_ptr", "wide_ptr"), step),
        "zero_ptr": step.new_zeros(1, dtype=torch.int32),
        "T": q.shape[1],
        "zero": 0,
    }
    for segment in range(segments(q.shape[1], constants, band)):
        arguments["segment"] = segment
        launch(STATES, (rows * heads,), arguments, constants)
        launch(READS, (rows * heads, steps), arguments, constants)
    lengths = q.shape[1] if cu_seqlens is None else cu_seqlens.diff()
    before = torch.zeros(rows, dtype=torch.int32, device=q.device) if position is None else position
    after = torch.remainder(before + lengths, spec.chunk_size).to(torch.int32)
    held = [kept, *([final] if derives(spec) else [])]  # the backward needs D after the call, which leaves as W
    return [o, *leave(unpack(final, weights, spec), spec), after, *(held if keep else [])]
