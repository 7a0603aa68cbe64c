"""How rows or packed documents of any length, each somewhere inside a chunk, become one list of chunk steps.

Sequences are taken longest first, so that those still active at step c are always the first ``rows`` of the order:
the work is proportional to the tokens, however unequal the lengths are.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One chunk, or a part of one, of every active sequence.

    ``rows`` sequences are active. Their tokens are ``index`` [rows, width] into the flat token axis, with ``valid``
    [rows, width] false where a slot holds no token; or, where all rows of a dense batch agree, ``span`` (start, end)
    along T and no mask. ``ended`` says which chunks are complete: for all rows at once, or bool [rows]. Where a step is
    a part of a chunk, ``turned`` says which parts are.
    """

    rows: int
    index: Tensor | None
    valid: Tensor | None
    span: tuple[int, int] | None
    ended: bool | Tensor
    turned: bool | Tensor


@dataclass(frozen=True)
class Schedule:
    """``steps`` in order, the ``order`` [N] of sequences they refer to (None: as given), the ``position`` [N] after."""

    steps: list[Step]
    order: Tensor | None
    position: Tensor


def dense_schedule(batch: int, length: int, chunk: int, start: int, part: int, device: torch.device) -> Schedule:
    """All rows of one length, at one position ``start`` inside their chunk: plain slices."""
    borders = [0, *range(min(part - start % part, length), length, part), length] if length else [0]
    after = [start + b for b in borders]
    steps = [
        Step(batch, None, None, span, end % chunk == 0, end % part == 0)
        for span, end in zip(pairwise(borders), after[1:], strict=True)
    ]
    position = torch.full((batch,), (start + length) % chunk, dtype=torch.int32, device=device)
    return Schedule(steps, None, position)


def ragged_schedule(
    starts: Tensor, lengths: Tensor, position: Tensor, chunk: int, part: int, device: torch.device
) -> Schedule:
    """Sequences of unequal ``lengths`` [N] beginning at flat token ``starts`` [N], each at its own ``position`` [N].

    All three are int64 on the CPU; the index tensors of the steps lie on ``device``.
    """
    chunks = (position % part * (lengths > 0) + lengths + part - 1) // part  # of ``part`` tokens
    order = torch.argsort(chunks, descending=True, stable=True)
    starts, lengths, position, chunks = (x[order] for x in (starts, lengths, position, chunks))
    inside = position % part
    steps = []
    for c in range(int(chunks[0]) if len(chunks) else 0):
        rows = int((chunks > c).sum())
        # Slot s of part c holds token number c·part + s − inside of its sequence.
        number = torch.arange(c * part, (c + 1) * part) - inside[:rows, None]
        valid = (number >= 0) & (number < lengths[:rows, None])
        used = valid.any(0).nonzero()
        low, high = int(used[0]), int(used[-1]) + 1
        index = (starts[:rows, None] + number).clamp(min=0) * valid
        turned = (inside + lengths)[:rows] >= (c + 1) * part
        ended = turned & (((position - inside)[:rows] + (c + 1) * part) % chunk == 0)
        flags = ended.to(device), turned.to(device)
        steps.append(Step(rows, index[:, low:high].to(device), valid[:, low:high].to(device), None, *flags))
    after = torch.empty_like(position)
    after[order] = (position + lengths) % chunk
    return Schedule(steps, order.to(device), after.to(device, torch.int32))


def make_schedule(
    batch: int,
    length: int,
    chunk: int,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
    part: int | None = None,
) -> Schedule:
    """The schedule of a call, in steps of ``part`` tokens, which divides ``chunk`` (None: whole chunks).

    Reads ``position`` and ``cu_seqlens`` on the host when they are given.
    """
    part = part or chunk
    where = [0] * batch if position is None else position.tolist()
    if cu_seqlens is None and len(set(where)) <= 1:
        return dense_schedule(batch, length, chunk, where[0] if where else 0, part, device)
    if cu_seqlens is None:
        starts = torch.arange(batch) * length
        lengths = torch.full((batch,), length)
    else:
        borders = cu_seqlens.to("cpu", torch.int64)
        starts, lengths = borders[:-1], borders[1:] - borders[:-1]
        where = [0] * len(lengths) if position is None else where
    return ragged_schedule(starts, lengths, torch.tensor(where), chunk, part, device)
