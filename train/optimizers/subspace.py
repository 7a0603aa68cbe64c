"""Subspaces of a gradient matrix, on its shorter side: first singular vectors, random ones; and random columns."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor


def is_wide(matrix: Tensor) -> bool:
    """Whether rows are projected (Pᵀ G, P [m, r]), as with m ≤ n; else columns are (G P, P [n, r])."""
    return matrix.shape[0] <= matrix.shape[1]


def down(matrix: Tensor, basis: Tensor) -> Tensor:
    """G [m, n] in the coordinates of an orthonormal basis of its shorter side: [r, n] or [m, r]."""
    return basis.mT @ matrix if is_wide(matrix) else matrix @ basis


def up(coordinates: Tensor, basis: Tensor, like: Tensor) -> Tensor:
    """Back from :func:`down` to the shape [m, n] of ``like``."""
    return basis @ coordinates if is_wide(like) else coordinates @ basis.mT


def singular(matrix: Tensor, rank: int) -> Tensor:
    """The first ``rank`` singular vectors on the shorter side, as columns.

    Signs, which a decomposition leaves open, are chosen so that the entry of largest magnitude is positive: moments
    that are kept from one subspace to the next then mean the same on every machine.
    """
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    basis = u[:, :rank] if is_wide(matrix) else vh[:rank].mT
    peak = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * peak.sign()


def random(like: Tensor, rank: int, key: int) -> Tensor:
    """An orthonormal basis of a random subspace of the shorter side, drawn on the CPU in float64 from ``key``."""
    draw = torch.Generator().manual_seed(key)
    normal = torch.randn(min(like.shape), rank, generator=draw, dtype=torch.float64)
    return torch.linalg.qr(normal)[0].to(like)


def columns(like: Tensor, count: int, key: int) -> Tensor:
    """The numbers of ``count`` different columns in order, int64, drawn from ``key``."""
    draw = torch.Generator().manual_seed(key)
    return torch.randperm(like.shape[1], generator=draw)[:count].sort().values.to(like.device)


def key_of(seed: int, number: int, name: str) -> int:
    """The key of draw ``number`` for a parameter: 63 bits of a hash of seed, number and name."""
    digest = hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def agree(basis: Tensor) -> Tensor:
    """The first process's basis, in every process: equal weights must not drift apart by the last bit of a
    decomposition."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(basis, src=0)
    return basis
