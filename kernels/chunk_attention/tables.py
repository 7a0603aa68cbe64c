"""What the Triton kernels look up: runs of queries, and for each chunk the runs that chose it. Nothing is read back."""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from .selection import leaders


@dataclass(frozen=True)
class Tables:
    """Index tables of a call, int32.

    Attributes:
        starts: [runs + 1], the first query of each run of one leader, Q where there is none.
        pairs: [runs Hs K], places (run Hs + s) K + i of the choices of chunks, sorted by head s and chunk, of one chunk
            in the order of the queries; last those that chose nothing.
        offsets: [Hs M + 1], where those of a head and chunk begin.
    """

    starts: Tensor
    pairs: Tensor
    offsets: Tensor


def runs_of(q: Tensor, share: int, blocks: int) -> tuple[int, int]:
    """A layout's ``share`` and ``blocks`` for the kernels; of rows of one query, as in decoding, each leads itself."""
    return (1, q.shape[0]) if q.shape[1] == 1 else (share, blocks)


def starts_of(leader: Tensor, share: int, blocks: int) -> Tensor:
    """:attr:`Tables.starts`."""
    return leaders(leader, share, blocks)[0].to(torch.int32)


def invert(selection: Tensor, starts: Tensor, chunks: int) -> Tables:
    """The inverse of a selection [B, T, Hs, K] of ``chunks`` chunks: a stable sort on the device."""
    heads = selection.shape[2]
    count = selection.shape[0] * selection.shape[1]
    lead = starts[:-1].long()
    chosen = selection.flatten(0, 1)[lead.clamp(max=count - 1)]
    there = (chosen >= 0) & (lead < count)[:, None, None]
    head = torch.arange(heads, device=chosen.device, dtype=torch.int32)[:, None]
    key = torch.where(there, head * chunks + chosen, heads * chunks).flatten()
    ordered, pairs = torch.sort(key, stable=True)
    edges = torch.arange(heads * chunks + 1, device=key.device, dtype=key.dtype)
    return Tables(starts, pairs.to(torch.int32), torch.searchsorted(ordered, edges, out_int32=True))


def group_of(heads: int, shared: int, choosers: int) -> int:
    """Neighbouring heads that have both their keys and their choice in common."""
    return gcd(heads // shared, heads // choosers)
