"""The state of a neural memory between calls: what it holds, and a fresh one."""

import torch
from torch import Tensor

from .spec import MemorySpec


def pack_state(
    weights: list[Tensor], momentum: list[Tensor], anchor: list[Tensor], position: Tensor
) -> dict[str, Tensor]:
    """The state as a flat dict.

    ``weights.i`` (running weights W_t), ``momentum.i`` (S_t; absent for the rule gd) and ``anchor.i`` (the weights at
    the start of the current chunk), each [N, H, in, out]; ``position`` int32 [N], the number of tokens already in the
    current chunk. A chunk that one call leaves unfinished goes on in the next.
    """
    parts = {"weights": weights, "momentum": momentum, "anchor": anchor}
    flat = {f"{name}.{i}": x for name, tensors in parts.items() for i, x in enumerate(tensors)}
    return flat | {"position": position}


def state_names(spec: MemorySpec) -> list[str]:
    """The floating tensors of a state, in the order :func:`pack_state` gives them."""
    parts = ("weights", "momentum", "anchor") if spec.has_momentum else ("weights", "anchor")
    return [f"{part}.{i}" for part in parts for i in range(spec.layers)]


def fresh_state(weights: list[Tensor], rows: int, spec: MemorySpec) -> dict[str, Tensor]:
    """The state at the start of a sequence for ``rows`` rows: W = anchor = W_0 (``weights``, [H, in, out]), S = 0."""
    start = [w.expand(rows, *w.shape) for w in weights]
    momentum = [torch.zeros_like(w) for w in start] if spec.has_momentum else []
    return pack_state(start, momentum, start, torch.zeros(rows, dtype=torch.int32, device=weights[0].device))
