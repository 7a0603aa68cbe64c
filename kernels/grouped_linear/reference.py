"""Grouped linear map, one slot at a time."""

from itertools import pairwise

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, token: Tensor, slot: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sequence n belongs to memory n mod M'."""
    tokens, matrices = x.flatten(0, 1), weight.to(x.dtype)
    outputs = []
    for n, (first, last) in enumerate(pairwise(cu_seqlens.tolist())):
        outputs += [tokens[t] @ matrices[n % len(matrices)] for t in token[first:last].tolist()]
    return torch.stack(outputs)[None]
