"""Where the chunks of packed sequences lie, with shapes that depend on T and N alone: nothing is read on the host.

N sequences in a row of T tokens have at most T // C + N chunks. Each gets a slot, in order; the slots left over
belong to sequence N, which does not exist, and hold no token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..packing import document_of


def slot_count(batch: int, length: int, chunk: int, rows: int, packed: bool) -> int:
    """Chunks of a call: exact for B rows of one length, the bound for ``rows`` packed sequences."""
    return length // chunk + rows if packed else batch * -(-length // chunk)


@dataclass(frozen=True)
class Slots:
    """Chunk slots of packed sequences.

    ``sequence`` int64 [slots] (N where unused); ``first`` and ``stop`` int64 [slots], the tokens of a slot (equal where
    unused); ``offset`` int64 [N + 1], the first slot of each sequence and the number of used ones.
    """

    sequence: Tensor
    first: Tensor
    stop: Tensor
    offset: Tensor


def make_slots(cu_seqlens: Tensor, length: int, chunk: int) -> Slots:
    """The slots of packed sequences with borders ``cu_seqlens`` int32 [N + 1] in a row of ``length`` tokens."""
    borders = cu_seqlens.long()
    rows = borders.numel() - 1
    offset = F.pad(((borders.diff() + chunk - 1) // chunk).cumsum(0), (1, 0))
    slot = torch.arange(slot_count(1, length, chunk, rows, True), device=borders.device)
    sequence = torch.searchsorted(offset[1:].contiguous(), slot, right=True)
    row = sequence.clamp(max=rows - 1)
    first = borders[row] + (slot - offset[row]) * chunk
    stop = torch.minimum(first + chunk, borders[row + 1])
    used = sequence < rows
    return Slots(sequence, first * used, stop * used, offset)


class Layout:
    """Token tensors [B, T, H, ...] as chunks [n, M, C, ...], and back.

    Rows: n chunks of T each, M = B·H. Packed: n slots, M = H, each going on from its own sequence's memory. ``waves``
    are stretches of n to be worked off in order, the chunks of each at once: a row's chunk is a wave of its own. On a
    CPU, where sizes may be looked at, slots are sorted into waves by their number inside their sequence; elsewhere each
    is a wave.
    """

    def __init__(self, batch: int, length: int, chunk: int, cu_seqlens: Tensor | None) -> None:
        self.batch, self.length, self.chunk, self.slots = batch, length, chunk, None
        if cu_seqlens is None:
            self.count = -(-length // chunk)
            self.waves = [slice(i, i + 1) for i in range(self.count)]
            return
        self.slots = make_slots(cu_seqlens, length, chunk)
        self.count = self.slots.first.numel()
        self.waves = [slice(i, i + 1) for i in range(self.count)]
        document = document_of(cu_seqlens, length)
        number = torch.arange(length, device=cu_seqlens.device) - cu_seqlens[document]
        self.place = self.slots.offset[document] * chunk + number
        if cu_seqlens.device.type == "cpu":
            self._sort_into_waves(self.slots)
        self.index = self.slots.first[:, None] + torch.arange(chunk, device=cu_seqlens.device)
        self.empty = self.index >= self.slots.stop[:, None]
        self.index = self.index.masked_fill(self.empty, 0)

    def _sort_into_waves(self, slots: Slots) -> None:
        """Put the first chunks of all sequences first, then the second ones; unused slots go with the first."""
        before = slots.offset[slots.sequence.clamp(max=slots.offset.numel() - 2)]
        number = (torch.arange(self.count) - before).masked_fill_(slots.sequence == slots.offset.numel() - 1, 0)
        order = number.argsort(stable=True)
        self.slots = Slots(slots.sequence[order], slots.first[order], slots.stop[order], slots.offset)
        moved = torch.empty_like(order).scatter_(0, order, torch.arange(self.count))
        self.place = moved[self.place // self.chunk] * self.chunk + self.place % self.chunk
        ends = number.bincount().cumsum(0).tolist()
        self.waves = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]

    def lay(self, x: Tensor, kind: torch.dtype) -> Tensor:
        """Chunks of a token tensor; zero where there is no token, whatever the rest of the tensor holds."""
        if self.slots is not None:
            x = x[0, self.index].to(kind)
            x = x.masked_fill(self.empty[(...,) + (None,) * (x.dim() - 2)], 0.0)
            return rearrange(x, "n c h ... -> n h c ...").contiguous()
        missing = self.count * self.chunk - self.length
        if missing:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        return rearrange(x.to(kind), "b (n c) h ... -> n (b h) c ...", c=self.chunk).contiguous()

    def restore(self, x: Tensor, kind: torch.dtype) -> Tensor:
        """The inverse of :meth:`lay`, contiguous."""
        x = x.to(kind)
        if self.slots is not None:
            return rearrange(x, "n h c ... -> (n c) h ...")[self.place].unsqueeze(0)
        whole = rearrange(x, "n (b h) c ... -> b (n c) h ...", b=self.batch)
        return whole[:, : self.length].contiguous()

    def open(self, memory: Tensor) -> Tensor:
        """A memory per sequence [N, H, D, D_v] as what :meth:`read` and :meth:`write` work on; a copy."""
        return memory.flatten(0, 1).clone() if self.slots is None else F.pad(memory, (0, 0) * 3 + (0, 1))

    def close(self, memory: Tensor, heads: int) -> Tensor:
        """The inverse of :meth:`open`."""
        return memory.unflatten(0, (-1, heads)) if self.slots is None else memory[:-1].clone()

    def read(self, memory: Tensor, wave: slice) -> Tensor:
        """The memories [m · M, D, D_v] of the sequences of a wave of m chunks."""
        return memory if self.slots is None else memory.index_select(0, self.slots.sequence[wave]).flatten(0, 1)

    def write(self, memory: Tensor, wave: slice, new: Tensor) -> Tensor:
        """``memory`` with those of a wave replaced."""
        if self.slots is None:
            return new
        return memory.index_copy_(0, self.slots.sequence[wave], new.unflatten(0, (-1, memory.shape[1])))
