"""The omega window for the Triton kernels: every step is given its halo, and is then the step of a memory without one.

In place of θ_t g_t stands θ_t Σ γ_i g_i over the last c tokens, each differentiated at t's own anchor; so a step needs
the keys of the c − 1 tokens before it, too. Here the tokens of a call are laid out anew, in *slots*: a step is a tile
of slots, the first of them its halo and the rest, ``new`` of them, tokens of its own. To the kernels these are
sequences like any others, packed, with longer chunks; only the gates know of the window: slots of a halo have θ = 0,
a = η = 1 and do not add S to W, and Λ and P are multiplied by γ's band (``window_gates.py``).

Halo slots before the first token of all, or older than the window, are zeros. A token lies in a slot of its own and in
the halos of at most ⌈(c − 1) / ``new``⌉ steps after, and its gradient is the sum over them. All of it is gathers, by
indices that are computed on the device.
"""

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from ..launch import is_planning
from .spec import MemorySpec

#: Fewer new tokens than this in a step are not worth a tile.
FEWEST = 8


def widest_window(width: int) -> int:
    """The longest window that there are tiles for."""
    return (64 if width <= 64 else 32) - FEWEST + 1


def tile_of(spec: MemorySpec, width: int) -> tuple[int, int] | None:
    """Slots of a step and how many of them are tokens of its own, for heads of ``width``; None where no tile is wide
    enough."""
    most = 64 if width <= 64 else 32  # as forward.step_length
    new = gcd(spec.step_size, most // 2)
    while new > FEWEST and new + spec.window - 1 > most:
        new //= 2
    if new < FEWEST or spec.window > widest_window(width):
        return None
    slots = 2 * new
    while slots < new + spec.window - 1:
        slots *= 2
    return slots, new


def _tile(spec: MemorySpec, width: int) -> tuple[int, int]:
    """The tile of a memory that the kernels cover."""
    tile = tile_of(spec, width)
    assert tile is not None, "coverage.py names such a window"
    return tile


def inner_of(spec: MemorySpec, width: int) -> MemorySpec:
    """The memory without a window whose tokens are the slots of one with it."""
    slots, new = _tile(spec, width)
    every = None if spec.ns_every is None else spec.ns_every // new * slots
    return replace(spec, window=1, chunk_size=spec.chunk_size // new * slots, ns_every=every)


def slots_of(batch: int, length: int, rows: int, state: bool, packed: bool, spec: MemorySpec, width: int) -> int:
    """How many slots the sequences of a call have at most, from shapes alone."""
    slots, new = _tile(spec, width)
    if packed:
        return batch * length + (slots - new) * (batch * length // new + rows * (2 if state else 1))
    return batch * (length + (slots - new) * ((length + new - 1 + (new - 1 if state else 0)) // new))


@dataclass(frozen=True)
class Band:
    """What the kernels' launch code needs of a window: γ of every slot [1, T′, H], c, slots of a step that are its
    halo; the longest sequence that there can be, in tokens; the tokens of a chunk; and the fewest slots that a call of
    as many tokens can fill."""

    gamma: Tensor
    window: int
    halo: int
    length: int
    chunk: int
    least: int


class Layout:
    """Where the tokens of one call lie in slots.

    Rows of a *pool* are all tokens of the call, then its state's halos, c − 1 for each sequence, then one of zeros.
    """

    def __init__(
        self,
        k: Tensor,
        spec: MemorySpec,
        position: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        batch, length, _, width = k.shape
        self.spec, self.shape = spec, k.shape[:2]
        self.slots, self.new = _tile(spec, width)
        self.before = self.slots - self.new  # slots of a step that are its halo
        self.tokens, self.device = batch * length, k.device
        self.rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.held = 0 if position is None else self.rows * (spec.window - 1)
        borders = self._range(self.rows + 1) * length if cu_seqlens is None else cu_seqlens.long()
        self.first, self.lengths = borders[:-1], borders.diff()
        place = torch.zeros_like(self.lengths) if position is None else position.long()
        self.inside = place % self.new  # own tokens of the first step that earlier calls had
        filled = (self.inside + self.lengths + self.new - 1) // self.new
        self.steps = torch.where(self.lengths > 0, filled, 0)
        inner = self.lengths + self.before * self.steps
        self.borders = torch.nn.functional.pad(inner.cumsum(0), (1, 0))
        self.cu_seqlens = self.borders.to(torch.int32)
        at = place // self.new * self.slots + self.inside
        self.position = None if position is None else at.to(torch.int32)
        self.after = ((place + self.lengths) % spec.chunk_size).to(torch.int32)
        state, packed = position is not None, cu_seqlens is not None
        self.total = slots_of(batch, length, self.rows, state, packed, spec, width)
        self.keys, self.own = self._of_slots()
        self.sequence = torch.searchsorted(borders[1:].contiguous(), self._range(self.tokens), right=True)
        self.time = self._range(self.tokens) - self.first[self.sequence]  # of each token in its sequence

    def _range(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device)

    def _of_slots(self) -> tuple[Tensor, Tensor]:
        """Rows of the pool that lie in each slot [T′]: as keys, and as tokens of the step's own."""
        slot = self._range(self.total)
        n = torch.searchsorted(self.borders[1:].contiguous(), slot, right=True).clamp(max=self.rows - 1)
        number = slot - self.borders[n]
        step = (self.inside[n] + number) // self.slots
        time = number - (step + 1) * self.before
        begins = (step * self.new - self.inside[n]).clamp(min=0)  # the step's first token of its own
        there = slot < self.borders[-1]
        nothing = self.tokens + self.held
        row = torch.where(time >= 0, self.first[n] + time, self._held_row(n, time))
        keys = torch.where(there & (time > begins - self.spec.window), row, nothing)
        return keys, torch.where(there & (time >= begins), row, nothing)

    def _held_row(self, n: Tensor, time: Tensor) -> Tensor:
        """Where the pool has a token before the call, at ``time`` -1, -2, …; that of zeros where it has none."""
        if not self.held:
            return torch.full_like(time, self.tokens)
        older = self.spec.window - 1
        return self.tokens + n * older + (older + time).clamp(min=0)

    def pool(self, x: Tensor, held: Tensor | None = None) -> Tensor:
        """Rows of tokens x [B, T, ...], of the halos of a state [N, c − 1, ...] (zeros, if None), and one of zeros."""
        parts = [x.flatten(0, 1)]
        if self.held and held is not None:
            parts.append(held.flatten(0, 1).to(x.dtype))
        missing = self.tokens + self.held + 1 - sum(len(part) for part in parts)
        return torch.cat([*parts, x.new_zeros((missing, *x.shape[2:]))])

    def as_keys(self, x: Tensor, held: Tensor | None) -> tuple[Tensor, Tensor]:
        """In slots [1, T′, ...], those of halos too; and the last c − 1 of every sequence [N, c − 1, ...], in float32,
        where the state's halo is."""
        older = self.spec.window - 1
        if is_planning():
            return x.new_empty((1, self.total, *x.shape[2:])), x.new_empty((self.rows, older, *x.shape[2:])).float()
        pool = self.pool(x, held)
        time = self.lengths[:, None] - older + self._range(older)
        place = torch.where(time >= 0, self.first[:, None] + time, self.tokens + self.held)
        after = pool[place].float()
        if held is not None:
            old = held[self._range(self.rows)[:, None], (time + older).clamp(max=older - 1)]
            after = torch.where(_beside(time >= 0, old), after, old)
        return pool.index_select(0, self.keys)[None], after

    def as_own(self, x: Tensor | None) -> Tensor | None:
        """In slots [1, T′, ...], zero in those of halos."""
        if x is None:
            return None
        if is_planning():
            return x.new_empty((1, self.total, *x.shape[2:]))
        return self.pool(x).index_select(0, self.own)[None]

    def from_own(self, x: Tensor) -> Tensor:
        """Tokens [B, T, ...] from slots [1, T′, ...]."""
        if is_planning():
            return x.new_empty((*self.shape, *x.shape[2:]))
        step = (self.time + self.inside[self.sequence]) // self.new
        place = self.borders[self.sequence] + self.time + (step + 1) * self.before
        return x[0].index_select(0, place).unflatten(0, self.shape)

    def from_keys(self, x: Tensor, d_after: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of tokens [B, T, ...] and of a state's halo [N, c − 1, ...] from those of slots [1, T′, ...]
        and of the halo after the call."""
        older = self.spec.window - 1
        if is_planning():
            return x.new_empty((*self.shape, *x.shape[2:])), torch.empty_like(d_after) if self.held else None
        n, time = self.sequence, self.time
        if self.held:
            n = torch.cat([n, self._range(self.rows).repeat_interleave(older)])
            time = torch.cat([time, (self._range(older) - older).repeat(self.rows)])
        inside, first = self.inside[n], (time + self.inside[n]).div(self.new, rounding_mode="floor").clamp(min=0)
        place = time - self.lengths[n] + older
        found = d_after[n, place.clamp(min=0)]
        found = torch.where(_beside(place >= 0, found), found, 0.0)
        for later in range(2 + (older - 1) // self.new):
            step = first + later
            there = (step < self.steps[n]) & (time > (step * self.new - inside).clamp(min=0) - self.spec.window)
            place = torch.where(there, self.borders[n] + time + (step + 1) * self.before, 0)
            part = x[0].index_select(0, place).float()
            found += torch.where(_beside(there, part), part, 0.0)
        of_tokens = found[: self.tokens].to(x.dtype).unflatten(0, self.shape)
        if not self.held:
            return of_tokens, None
        return of_tokens, found[self.tokens :].unflatten(0, (self.rows, older)).clone()


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of x's first dimensions, for all of the others."""
    return mask[(...,) + (None,) * (x.dim() - mask.dim())]
