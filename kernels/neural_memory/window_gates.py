"""The omega window in the gates of a step, in Triton: γ's band, by which Λ and P are multiplied, and back.

Γ = diag(θ) G with G[s, i] = γ_i for s − c < i ≤ s, else 0; so Λ and P with a window are those without one times G.
A step's slots are its halo and then tokens of its own (``slots.py``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Kernel, Pairs, interpreted
from .tiles import sequence, step_slot, step_tokens


@triton.jit
def own_slots(j, place, valid, C: tl.constexpr, HALO: tl.constexpr):
    """Which slots of a step hold tokens of its own. The first step's halo is not at its first slots where earlier calls
    had some of its tokens."""
    if HALO == 0:
        return valid
    else:
        i = tl.arange(0, C)
        return valid & (i >= HALO) & (j * C + i - place >= HALO)


@triton.jit
def band(gamma, C: tl.constexpr, WINDOW: tl.constexpr):
    """G [C, C] from γ [C]."""
    i = tl.arange(0, C)
    seen = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - WINDOW)
    return tl.where(seen, gamma[None, :], 0.0)


@triton.jit
def over_window(vector, spread):
    """A row times G."""
    return tl.sum(vector[:, None] * spread, 0)


@triton.jit(do_not_specialize=["T"])
def neural_memory_window_backward(
    gamma_ptr, position_ptr, cu_ptr, write_ptr, vectors_ptr, d_write_ptr, d_vectors_ptr, d_gamma_ptr, d_single_ptr,
    d_singles_ptr, T, H: tl.constexpr, C: tl.constexpr, WINDOW: tl.constexpr, MOMENTUM: tl.constexpr,
    TURN: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, GATE_PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """From the gradients of Λ and of ``vectors`` to those without a window, ``d_single`` and ``d_singles``, and that of
    γ. ``write`` and ``vectors`` are those of γ = 1, of which the ones with γ are multiples, column by column: γ may be
    zero. Of muon (``TURN``) there is P_c alone."""
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    begin, length, place = sequence(n, cu_ptr, position_ptr, T, PACKED, STATE)
    i = tl.arange(0, C)
    seen_t = (i[:, None] <= i[None, :]) & (i[:, None] > i[None, :] - WINDOW)
    spread_t = tl.where(seen_t, 1.0, 0.0)
    for j in range(place // C + tl.program_id(1), tl.where(length > 0, tl.cdiv(place + length, C), 0), PARTS):
        token, valid = step_tokens(j, begin, length, place, C)
        gamma = tl.load(gamma_ptr + token * H + h, mask=valid, other=0.0)
        slot = step_slot(j, n, begin, place, C) * H + h
        square = slot * (C * C) + i[:, None] * C + i[None, :]
        at = slot * (4 * C) + i
        d_gamma = tl.zeros([C], tl.float32)
        tl.store(d_singles_ptr + at, tl.load(d_vectors_ptr + at))
        if TURN[0] == "none":
            d_write = tl.load(d_write_ptr + square).to(tl.float32)
            d_end = tl.load(d_vectors_ptr + at + 2 * C)
            d_gamma += tl.sum(d_write * tl.load(write_ptr + square).to(tl.float32), 0)
            d_gamma += d_end * tl.load(vectors_ptr + at + 2 * C)
            tl.store(d_singles_ptr + at + 2 * C, over_window(d_end * gamma, spread_t))
            d_single = tl.dot(d_write * gamma[None, :], spread_t, input_precision=GATE_PRECISION)
            tl.store(d_single_ptr + square, d_single.to(d_single_ptr.dtype.element_ty))
        if MOMENTUM:
            d_end = tl.load(d_vectors_ptr + at + 3 * C)
            d_gamma += d_end * tl.load(vectors_ptr + at + 3 * C)
            tl.store(d_singles_ptr + at + C, tl.load(d_vectors_ptr + at + C))
            tl.store(d_singles_ptr + at + 3 * C, over_window(d_end * gamma, spread_t))
        tl.store(d_gamma_ptr + token * H + h, d_gamma, mask=valid)


def run_window_backward(
    gamma: Tensor,
    of_steps: Sequence[Tensor],
    gradients: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    constants: Mapping[str, Any],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """γ's gradient, and those of what ``run_gates`` would return without a window, from the ``gradients`` of what it
    returns; ``of_steps``: that for γ = 1."""
    d_gamma, d_single, d_singles = (torch.empty_like(x) for x in (gamma, *gradients[:2]))
    arguments = {
        "gamma_ptr": gamma,
        "position_ptr": gamma if position is None else position,
        "cu_ptr": gamma if cu_seqlens is None else cu_seqlens,
        "write_ptr": of_steps[0],
        "vectors_ptr": of_steps[1],
        "d_write_ptr": gradients[0],
        "d_vectors_ptr": gradients[1],
        "d_gamma_ptr": d_gamma,
        "d_single_ptr": d_single,
        "d_singles_ptr": d_singles,
        "T": gamma.shape[1],
    }
    WINDOW_BACKWARD(lambda c: (rows * c["H"], c["PARTS"]), arguments, {name: constants[name] for name in NAMES})
    return d_gamma, (d_single, d_singles, gradients[2])


def _configs(constants: Mapping[str, Any]) -> list[Config]:
    """As the gates' own."""
    return [Config((("PARTS", 1 if interpreted() else 16),), 8, 1)]


def _pairs(constants: Mapping[str, Any]) -> Pairs:
    """Two steps of one row, of random numbers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    c, heads, turned = constants["C"], constants["H"], constants["TURN"][0] != "none"
    parts = (0, 3) if turned else (0, 1, 2, 3) if constants["MOMENTUM"] else (0, 2)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    gamma = new(1, 2 * c, heads)
    position = torch.zeros(1, dtype=torch.int32, device=device) if constants["STATE"] else None
    borders = torch.tensor([0, 2 * c], dtype=torch.int32, device=device) if constants["PACKED"] else None
    # Slots beyond the two steps stay unread.
    of_steps, gradients = ((new(4, heads, c, c), new(4, heads, 4, c), new(4, heads, 4)) for _ in range(2))
    d_gamma, d_single = run_window_backward(gamma, of_steps, gradients, position, borders, 1, constants)
    (write, vectors), (d_write, d_vectors) = ([x[:2] for x in every[:2]] for every in (of_steps, gradients))
    by_slot = gamma.unflatten(1, (2, c))[0].transpose(1, 2)
    spread = torch.ones(c, c, device=device).tril().triu(1 - constants["WINDOW"])
    last = [part for part in parts if part > 1]
    wanted = (d_vectors * vectors)[:, :, last].sum(-2)
    if not turned:
        wanted += (d_write * write).sum(-2)
    pairs = [(d_gamma.unflatten(1, (2, c))[0].transpose(1, 2), wanted)]
    if not turned:
        pairs.append((d_single[0][:2], d_write * by_slot.unsqueeze(-2) @ spread.mT))
    for part in parts:
        own = d_vectors[:, :, part]
        pairs.append((d_single[1][:2, :, part], (own * by_slot) @ spread.mT if part > 1 else own))
    return pairs


WINDOW_BACKWARD = Kernel(neural_memory_window_backward, _configs, _pairs)
NAMES = ("H", "C", "WINDOW", "MOMENTUM", "TURN", "STATE", "PACKED", "GATE_PRECISION")
