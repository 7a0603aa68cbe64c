"""The gates of every step, forward and backward, in Triton: what gates.py does in plain torch.

Nothing here depends on the state, so all steps are computed at once, and the programs that walk the steps in order load
coefficients instead of computing them. A program takes every PARTS-th step of one memory. Where the coefficients of a
step lie: ``tiles.step_slot``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel, Pairs, interpreted
from .gates import GateGradients, gates_backward, make_gates
from .slots import Band
from .tiles import sequence, step_slot, step_tokens
from .window_gates import band, over_window, own_slots, run_window_backward


@triton.jit
def step_gates(theta_ptr, retain_ptr, momentum_ptr, at, valid, RETENTION: tl.constexpr, MOMENTUM: tl.constexpr):
    """θ, log a and log η of a step [C]: 0, which changes nothing, in slots without a token and for absent gates."""
    theta = tl.load(theta_ptr + at, mask=valid, other=0.0)
    log_a = tl.zeros_like(theta)
    log_n = tl.zeros_like(theta)
    if RETENTION:
        log_a = tl.load(retain_ptr + at, mask=valid, other=0.0)
    if MOMENTUM:
        log_n = tl.load(momentum_ptr + at, mask=valid, other=0.0)
    return theta, log_a, log_n


SIDE = tl.constexpr(16)  # tokens that a product takes at a time


@triton.jit
def decays(later, earlier, mask):
    """exp(later − earlier) where ``mask``, else 0; nothing is divided by a cumulative product."""
    return tl.where(mask, tl.exp(tl.where(mask, later - earlier, 0.0)), 0.0)


@triton.jit(do_not_specialize=["T"])
def neural_memory_gates(
    theta_ptr, retain_ptr, momentum_ptr, gamma_ptr, position_ptr, cu_ptr, write_ptr, vectors_ptr, ends_ptr, T,
    H: tl.constexpr, C: tl.constexpr, WINDOW: tl.constexpr, HALO: tl.constexpr, RETENTION: tl.constexpr,
    MOMENTUM: tl.constexpr, TURN: tl.constexpr, LATE: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
    GATE_PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``write`` [slots, H, C, C]: Λ as reads use it (LATE: one token late, where reads come before writes);
    ``vectors`` [slots, H, 4, C]: A and f of the reads, Λ_c and P_c of the update; ``ends`` [slots, H, 4]: A_c, f_c and
    E_c. Of muon (``TURN``, see orthogonal.py) Λ and f are zero: they are neither made nor read."""
    n = tl.program_id(0) // H
    GATED: tl.constexpr = MOMENTUM and TURN[0] != "muon_gd"
    h = tl.program_id(0) % H
    begin, length, place = sequence(n, cu_ptr, position_ptr, T, PACKED, STATE)
    i = tl.arange(0, C)
    for j in range(place // C + tl.program_id(1), tl.where(length > 0, tl.cdiv(place + length, C), 0), PARTS):
        token, valid = step_tokens(j, begin, length, place, C)
        theta, log_a, log_n = step_gates(theta_ptr, retain_ptr, momentum_ptr, token * H + h, valid, RETENTION, GATED)
        own = own_slots(j, place, valid, C, HALO)
        total = tl.cumsum(log_a, 0)
        read = total - log_a if LATE else total
        decay = decays(read[:, None], total[None, :], (i[None, :] <= i[:, None] - LATE) & own[None, :])
        last = tl.sum(log_a, 0)
        ending = decays(last, total, own)
        slot = step_slot(j, n, begin, place, C) * H + h
        if WINDOW > 1:
            spread = band(tl.load(gamma_ptr + token * H + h, mask=valid, other=0.0), C, WINDOW)
        if TURN[0] != "none":
            inner = tl.cumsum(log_n, 0)
            inner_last = tl.sum(log_n, 0)
            inertia = tl.exp(inner_last)
            if TURN[0] == "muon_gd":  # S starts at zero again where an earlier step of the call has turned it
                inertia = tl.where((j * C % TURN[1] == 0) & (j > place // C), 0.0, inertia)
            end_momentum = tl.exp(inner_last - inner) * theta
            if WINDOW > 1:
                end_momentum = over_window(end_momentum, spread)
            tl.store(vectors_ptr + slot * (4 * C) + 3 * C + i, end_momentum)
            tl.store(ends_ptr + slot * 4 + 2, inertia)
        elif MOMENTUM:
            inner = tl.cumsum(log_n, 0)
            momentum_write = decays(inner[:, None], inner[None, :], i[None, :] <= i[:, None]) * theta[None, :]
            inertia = tl.exp(inner)
            write = tl.dot(decay, momentum_write, input_precision=GATE_PRECISION)
            end_write = tl.sum(ending[:, None] * momentum_write, 0)
            inner_last = tl.sum(log_n, 0)
            end_momentum = tl.exp(inner_last - inner) * theta
            if WINDOW > 1:
                end_momentum = over_window(end_momentum, spread)
            tl.store(vectors_ptr + slot * (4 * C) + C + i, tl.sum(decay * inertia[None, :], 1))
            tl.store(vectors_ptr + slot * (4 * C) + 3 * C + i, end_momentum)
            tl.store(ends_ptr + slot * 4 + 1, tl.sum(ending * inertia, 0))
            tl.store(ends_ptr + slot * 4 + 2, tl.exp(inner_last))
        else:
            write = decay * theta[None, :]
            end_write = ending * theta
        if WINDOW > 1 and TURN[0] == "none":
            write = tl.dot(write, spread, input_precision=GATE_PRECISION)
            end_write = over_window(end_write, spread)
        if TURN[0] == "none":
            tl.store(write_ptr + slot * (C * C) + i[:, None] * C + i[None, :], write.to(write_ptr.dtype.element_ty))
            tl.store(vectors_ptr + slot * (4 * C) + 2 * C + i, end_write)
        tl.store(vectors_ptr + slot * (4 * C) + i, tl.exp(read))
        tl.store(ends_ptr + slot * 4, tl.exp(last))


@triton.jit(do_not_specialize=["T"])
def neural_memory_gates_backward(
    theta_ptr, retain_ptr, momentum_ptr, position_ptr, cu_ptr, d_write_ptr, d_vectors_ptr, d_ends_ptr, d_theta_ptr,
    d_retain_ptr, d_momentum_ptr, T, H: tl.constexpr, C: tl.constexpr, HALO: tl.constexpr, RETENTION: tl.constexpr,
    MOMENTUM: tl.constexpr, TURN: tl.constexpr, LATE: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
    GATE_PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of θ, log a and log η from those of what :func:`neural_memory_gates` computes, laid out alike: without
    a window, as ``window_gates.py`` leaves them.

    Every L is exp of a difference, so its gradient times itself flows to the later sum and from the earlier one.
    Products go through their depth SIDE tokens at a time: operands as wide as a step do not fit in registers.
    """
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    GATED: tl.constexpr = MOMENTUM and TURN[0] != "muon_gd"
    begin, length, place = sequence(n, cu_ptr, position_ptr, T, PACKED, STATE)
    i = tl.arange(0, C)
    for j in range(place // C + tl.program_id(1), tl.where(length > 0, tl.cdiv(place + length, C), 0), PARTS):
        token, valid = step_tokens(j, begin, length, place, C)
        at = token * H + h
        theta, log_a, log_n = step_gates(theta_ptr, retain_ptr, momentum_ptr, at, valid, RETENTION, GATED)
        own = own_slots(j, place, valid, C, HALO)
        slot = step_slot(j, n, begin, place, C) * H + h
        square = d_write_ptr + slot * (C * C)
        d_retain = tl.load(d_vectors_ptr + slot * (4 * C) + i)
        d_end_write = tl.load(d_vectors_ptr + slot * (4 * C) + 2 * C + i)
        total = tl.cumsum(log_a, 0)
        read = total - log_a if LATE else total
        last = tl.sum(log_a, 0)
        seen = i[None, :] <= i[:, None] - LATE
        decay = decays(read[:, None], total[None, :], seen & own[None, :])
        ending = decays(last, total, own)
        if TURN[0] != "none":
            inner = tl.cumsum(log_n, 0)
            inner_last = tl.sum(log_n, 0)
            remaining = tl.exp(inner_last - inner)
            d_end_momentum = tl.load(d_vectors_ptr + slot * (4 * C) + 3 * C + i)
            d_theta = d_end_momentum * remaining
            if GATED:
                ended = d_theta * theta
                d_log = tl.sum(ended, 0) - tl.cumsum(ended, 0, reverse=True)
                d_log += tl.load(d_ends_ptr + slot * 4 + 2) * tl.exp(inner_last)
                tl.store(d_momentum_ptr + at, d_log, mask=valid)
        elif MOMENTUM:
            d_carry = tl.load(d_vectors_ptr + slot * (4 * C) + C + i)
            d_end_momentum = tl.load(d_vectors_ptr + slot * (4 * C) + 3 * C + i)
            d_end_carry = tl.load(d_ends_ptr + slot * 4 + 1)
            d_end_inertia = tl.load(d_ends_ptr + slot * 4 + 2)
            inner = tl.cumsum(log_n, 0)
            inner_last = tl.sum(log_n, 0)
            inertia = tl.exp(inner)
            d_decay, d_kept = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
            earlier_a, earlier_n = 0.0, 0.0
            for part in range(C // SIDE):
                tokens, there = step_tokens(j * (C // SIDE) + part, begin, length, place, SIDE)
                theta_s, log_a_s, log_n_s = step_gates(
                    theta_ptr, retain_ptr, momentum_ptr, tokens * H + h, there, RETENTION, MOMENTUM
                )
                inner_s = earlier_n + tl.cumsum(log_n_s, 0)
                read_s = earlier_a + tl.cumsum(log_a_s, 0)
                if LATE:
                    read_s -= log_a_s
                earlier_a, earlier_n = earlier_a + tl.sum(log_a_s, 0), earlier_n + tl.sum(log_n_s, 0)
                s = part * SIDE + tl.arange(0, SIDE)
                # Transposes are computed as such: a product's operand is never the transpose of another's result.
                momentum_write_t = decays(inner[None, :], inner_s[:, None], s[:, None] <= i[None, :]) * theta_s[:, None]
                columns = tl.load(square + i[:, None] * C + s[None, :]).to(tl.float32)
                d_decay = tl.dot(columns, momentum_write_t, d_decay, input_precision=GATE_PRECISION)
                decay_t = decays(read_s[None, :], total[:, None], (i[:, None] <= s[None, :] - LATE) & own[:, None])
                lines = tl.load(square + s[:, None] * C + i[None, :]).to(tl.float32)
                d_kept = tl.dot(decay_t, lines, d_kept, input_precision=GATE_PRECISION)
            d_decay += d_carry[:, None] * inertia[None, :]
            flow = d_decay * decay
            flow_in, flow_out = tl.sum(flow, 1), tl.sum(flow, 0)
            d_inertia = tl.sum(decay * d_carry[:, None], 0) + ending * d_end_carry
            d_kept += ending[:, None] * d_end_write[None, :]
            kept = decays(inner[:, None], inner[None, :], i[None, :] <= i[:, None])
            momentum_write = kept * theta[None, :]
            d_ending = tl.sum(momentum_write * d_end_write[None, :], 1) + d_end_carry * inertia
            remaining = tl.exp(inner_last - inner)
            d_theta = tl.sum(d_kept * kept, 0) + d_end_momentum * remaining
            flow = d_kept * momentum_write
            ended = d_end_momentum * remaining * theta
            d_inner = tl.sum(flow, 1) - tl.sum(flow, 0) + d_inertia * inertia - ended
            d_log = tl.cumsum(d_inner, 0, reverse=True) + tl.sum(ended, 0) + d_end_inertia * tl.exp(inner_last)
            tl.store(d_momentum_ptr + at, d_log, mask=valid)
        else:
            d_write = tl.load(square + i[:, None] * C + i[None, :]).to(tl.float32)
            d_theta = tl.sum(d_write * decay, 0) + d_end_write * ending
            d_ending = d_end_write * theta
            flow = d_write * decay * theta[None, :]
            flow_in, flow_out = tl.sum(flow, 1), tl.sum(flow, 0)
        tl.store(d_theta_ptr + at, d_theta, mask=valid)
        if RETENTION:
            d_read = d_retain * tl.exp(read)
            if TURN[0] != "none":
                d_log = tl.cumsum(d_read, 0, reverse=True)
            else:
                ended = d_ending * ending
                d_read += flow_in
                d_log = tl.cumsum(d_read - flow_out - ended, 0, reverse=True) + tl.sum(ended, 0)
            d_log += tl.load(d_ends_ptr + slot * 4) * tl.exp(last)
            if LATE:  # the sum at a read stops one token short
                d_log -= d_read
            tl.store(d_retain_ptr + at, d_log, mask=valid)


def _configs(constants: Mapping[str, Any]) -> list[Config]:
    """Eight warps, with which nothing spills; the interpreter pays for every program, also for one without a step."""
    return [Config((("PARTS", 1 if interpreted() else 16),), 8, 1)]


def _grid(rows: int) -> Any:
    return lambda c: (rows * c["H"], c["PARTS"])


def _arguments(
    step: Tensor, log_retain: Tensor | None, log_momentum: Tensor | None, position: Tensor | None, cu: Tensor | None
) -> dict[str, Any]:
    """Run-time arguments that both kernels take; ``step`` stands in for what is absent and not read."""
    given = {"retain_ptr": log_retain, "momentum_ptr": log_momentum, "position_ptr": position, "cu_ptr": cu}
    return {"theta_ptr": step, **{name: step if x is None else x for name, x in given.items()}, "T": step.shape[1]}


#: θ, log a, log η, position, borders, rows and constants: what a step's gates are made of.
Given = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, Mapping[str, Any]]


def run_gates(
    step: Tensor,
    log_retain: Tensor | None,
    log_momentum: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    constants: Mapping[str, Any],
    dtype: torch.dtype,
    gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`neural_memory_gates` documents; Λ in ``dtype``. ``gamma``: γ, with a window."""
    slots, heads, c = step.shape[0] * step.shape[1] // constants["C"] + 2 * rows, step.shape[2], constants["C"]
    write = step.new_empty((slots, heads, c, c), dtype=dtype)
    vectors, ends = step.new_empty((slots, heads, 4, c)), step.new_empty((slots, heads, 4))
    arguments = _arguments(step, log_retain, log_momentum, position, cu_seqlens)
    arguments |= {"gamma_ptr": step if gamma is None else gamma}
    arguments |= {"write_ptr": write, "vectors_ptr": vectors, "ends_ptr": ends}
    GATES(_grid(rows), arguments, {name: constants[name] for name in ("WINDOW", *NAMES)})
    return write, vectors, ends


def run_gates_backward(
    gradients: Sequence[Tensor],
    step: Tensor,
    log_retain: Tensor | None,
    log_momentum: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    constants: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of θ, log a and log η from those of what :func:`run_gates` returns without a window."""
    found = [None if x is None else torch.empty_like(x) for x in (step, log_retain, log_momentum)]
    arguments = _arguments(step, log_retain, log_momentum, position, cu_seqlens)
    arguments |= dict(zip(("d_write_ptr", "d_vectors_ptr", "d_ends_ptr"), gradients, strict=True))
    names = ("d_theta_ptr", "d_retain_ptr", "d_momentum_ptr")
    arguments |= {name: step if x is None else x for name, x in zip(names, found, strict=True)}
    GATES_BACKWARD(_grid(rows), arguments, {name: constants[name] for name in NAMES})
    assert found[0] is not None
    return found[0], found[1], found[2]


def run_all_gates_backward(
    gradients: Sequence[Tensor], gates: Given, dtype: torch.dtype, band: Band | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of θ, log a, log η and γ; ``gates``: what :func:`run_gates` took first."""
    of_gamma = None
    if band is not None:
        once = run_gates(*gates, dtype, torch.ones_like(band.gamma))
        of_gamma, gradients = run_window_backward(band.gamma, once, gradients, *gates[3:])
        del once
    return *run_gates_backward(gradients, *gates), of_gamma


def _problem(constants: Mapping[str, Any]) -> tuple[list[Any], Tensor | None, Tensor | None, Tensor | None]:
    """Two steps of one row: θ, log a, log η [1, 2C, H]; position and borders where the kernel is built for them; and
    which slots of [2H, C] are no halo, where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2 * constants["C"], constants["H"])
    drawn = [torch.empty(shape).uniform_(low, high, generator=generator) for low, high in ((0, 1), (-0.3, 0), (-2, 0))]
    wanted = (True, constants["RETENTION"], constants["MOMENTUM"] and constants["TURN"][0] != "muon_gd")
    own = torch.arange(constants["C"]) >= constants["HALO"]
    gates = [(x * own.repeat(2)[:, None]).to(device) if want else None for x, want in zip(drawn, wanted, strict=True)]
    position = torch.zeros(1, dtype=torch.int32, device=device) if constants["STATE"] else None
    borders = torch.tensor([0, shape[1]], dtype=torch.int32, device=device) if constants["PACKED"] else None
    return gates, position, borders, own.to(device).expand(2 * shape[2], -1) if constants["HALO"] else None


def _flat(x: Tensor | None, c: int) -> Tensor | None:
    """[1, 2C, H] to one row per (step, head), [2H, C]."""
    return None if x is None else x.unflatten(1, (2, c)).permute(0, 1, 3, 2).flatten(0, 2)


def _forward_pairs(constants: Mapping[str, Any]) -> Pairs:
    (step, log_retain, log_momentum), position, borders, own = _problem(constants)
    assert step is not None
    generator = torch.Generator().manual_seed(1)
    gamma = torch.rand(step.shape, generator=generator).to(step.device) if constants["WINDOW"] > 1 else None
    made = run_gates(step, log_retain, log_momentum, position, borders, 1, constants, torch.float32, gamma)
    theta, log_a, log_n, weight = (_flat(x, constants["C"]) for x in (step, log_retain, log_momentum, gamma))
    assert theta is not None
    square = torch.ones((constants["C"],) * 2, device=theta.device).tril().triu(1 - constants["WINDOW"])

    def spread(x: Tensor) -> Tensor:
        """[2H, ·, C] times γ's band."""
        return x if weight is None else x @ square * weight.unsqueeze(1)

    if constants["TURN"][0] != "none":
        return _turned_pairs(constants, theta, log_a, log_n, own, spread, *(x[:2].flatten(0, 1) for x in made[1:]))
    wanted = make_gates(theta, log_a, log_n, own, constants["LATE"])
    write, vectors, ends = (x[:2].flatten(0, 1) for x in made)
    found = [(write, spread(wanted.read_write)), (vectors[:, 0], wanted.read_retain)]
    found += [(vectors[:, 2:3], spread(wanted.write[:, -1:])), (ends[:, 0], wanted.retain[:, -1])]
    if wanted.carry is not None and wanted.momentum_write is not None and wanted.inertia is not None:
        assert wanted.read_carry is not None
        found += [(vectors[:, 1], wanted.read_carry), (vectors[:, 3:], spread(wanted.momentum_write[:, -1:]))]
        found += [(ends[:, 1], wanted.carry[:, -1]), (ends[:, 2], wanted.inertia[:, -1])]
    return found


def _turned_pairs(
    constants: Mapping[str, Any],
    theta: Tensor,
    log_a: Tensor | None,
    log_n: Tensor | None,
    own: Tensor | None,
    spread: Callable[[Tensor], Tensor],
    vectors: Tensor,
    ends: Tensor,
) -> Pairs:
    """With muon: S of muon_gd begins the second step at zero, if a step is what it turns after."""
    wanted = make_gates(theta, log_a, torch.zeros_like(theta) if log_n is None else log_n, own, constants["LATE"])
    assert wanted.momentum_write is not None and wanted.inertia is not None
    inertia = wanted.inertia[:, -1]
    if log_n is None and constants["C"] == constants["TURN"][1]:
        inertia = inertia * (torch.arange(len(theta), device=theta.device) < constants["H"])
    found = [(vectors[:, 0], wanted.read_retain), (vectors[:, 3:], spread(wanted.momentum_write[:, -1:]))]
    return [*found, (ends[:, 0], wanted.retain[:, -1]), (ends[:, 2], inertia)]


def _backward_pairs(constants: Mapping[str, Any]) -> Pairs:
    (step, log_retain, log_momentum), position, borders, own = _problem(constants)
    theta, log_a, log_n = (_flat(x, constants["C"]) for x in (step, log_retain, log_momentum))
    assert step is not None and theta is not None
    c, heads, momentum = constants["C"], constants["H"], constants["MOMENTUM"]
    generator = torch.Generator().manual_seed(1)
    # Slots beyond the two steps stay unread.
    d_write, d_vectors, d_ends = (
        torch.randn((4, heads, *shape), generator=generator).to(theta.device) for shape in ((c, c), (4, c), (4,))
    )
    d_write = d_write.tril(-int(constants["LATE"]))
    of_steps = d_write, d_vectors, d_ends
    found = run_gates_backward(of_steps, step, log_retain, log_momentum, position, borders, 1, constants)
    write, vectors, ends = (x[:2].flatten(0, 1).clone() for x in (d_write, d_vectors, d_ends))
    if constants["TURN"][0] != "none":  # W sees S only orthogonalised
        write.zero_(), vectors[:, 1:3].zero_(), ends[:, 1].zero_()
        log_n = torch.zeros_like(theta) if log_n is None else log_n
    if constants["LATE"]:
        vectors[:, :2, 0] = 0.0  # a read before the first write depends on no gate
    gradients = GateGradients(
        write.clone(), vectors[:, 0], vectors[:, 1] if momentum else None, vectors[:, 2], ends[:, 0],
        ends[:, 1] if momentum else None, vectors[:, 3] if momentum else None, ends[:, 2] if momentum else None,
    )  # fmt: skip
    wanted = gates_backward(make_gates(theta, log_a, log_n, own, constants["LATE"]), gradients, theta, log_a, log_n)
    seen = slice(constants["HALO"], None)  # nothing looks at the gates of halos
    pairs = zip(found, wanted, strict=True)
    return [(_flat(a, c)[:, seen], b[:, seen]) for a, b in pairs if a is not None and b is not None]  # type: ignore[index]


GATES = Kernel(neural_memory_gates, _configs, _forward_pairs)
GATES_BACKWARD = Kernel(neural_memory_gates_backward, _configs, _backward_pairs)
NAMES = ("H", "C", "HALO", "RETENTION", "MOMENTUM", "TURN", "LATE", "STATE", "PACKED", "GATE_PRECISION")
