"""The state of a neural memory between calls: what it holds, and a fresh one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .retention import at_start, weights_of
from .spec import MemorySpec


def pack_state(
    weights: list[Tensor],
    momentum: list[Tensor],
    anchor: list[Tensor],
    position: Tensor,
    halo: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The state as a flat dict.

    ``weights.i`` (running weights W_t, as they are read), ``momentum.i`` (S_t; absent for the rule gd) and ``anchor.i``
    (the weights at the start of the current chunk; for the retentions lq and kl D there, from which they follow), each
    [N, H, in, out]; with a window of c > 1 the last c − 1 tokens' ``halo.k``, ``halo.v`` [N, c − 1, H, D],
    ``halo.gamma`` and, for huber, ``halo.delta`` [N, c − 1, H], γ = 0 where there was none yet; ``position`` int32 [N],
    the number of tokens already in the current chunk. A chunk that one call leaves unfinished goes on in the next.
    """
    parts = {"weights": weights, "momentum": momentum, "anchor": anchor}
    flat = {f"{name}.{i}": x for name, tensors in parts.items() for i, x in enumerate(tensors)}
    flat |= {f"halo.{name}": x for name, x in (halo or {}).items()}
    return flat | {"position": position}


def halo_names(spec: MemorySpec) -> list[str]:
    """What a state holds of the window's last tokens."""
    if spec.window == 1:
        return []
    return ["k", "v", "gamma"] + (["delta"] if spec.bias == "huber" else [])


def matrix_names(spec: MemorySpec) -> list[str]:
    """The matrices of a state, in the order :func:`pack_state` gives them."""
    parts = ("weights", "momentum", "anchor") if spec.has_momentum else ("weights", "anchor")
    return [f"{part}.{i}" for part in parts for i in range(spec.layers)]


def state_names(spec: MemorySpec) -> list[str]:
    """The floating tensors of a state, in the order :func:`pack_state` gives them."""
    return [*matrix_names(spec), *(f"halo.{name}" for name in halo_names(spec))]


def halo_shapes(weights: Sequence[Tensor], spec: MemorySpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the halo's tensors without the leading N, from those of W_0 [H, in, out]."""
    heads, width = weights[0].shape[0], weights[0].shape[-2]
    own = {"k": (width,), "v": (weights[spec.last].shape[-1],), "gamma": (), "delta": ()}
    return {name: (spec.window - 1, heads, *own[name]) for name in halo_names(spec)}


def fresh_state(weights: list[Tensor], rows: int, spec: MemorySpec) -> dict[str, Tensor]:
    """The state at the start of a sequence for ``rows`` rows: what W_0 (``weights``, [H, in, out]) makes, S = 0."""
    anchor = [at_start(w, spec) for w in weights]
    start = [weights_of(w, spec).expand(rows, *w.shape) for w in anchor]
    anchor = [w.expand(rows, *w.shape) for w in anchor]
    momentum = [torch.zeros_like(w) for w in start] if spec.has_momentum else []
    halo = {name: start[0].new_zeros(rows, *shape) for name, shape in halo_shapes(weights, spec).items()}
    return pack_state(start, momentum, anchor, torch.zeros(rows, dtype=torch.int32, device=weights[0].device), halo)
