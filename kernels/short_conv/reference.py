"""Short convolution, one token at a time."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
    inverse: Tensor | None,
) -> Tensor:
    """Every row, or every packed document, by itself, after its last K - 1 inputs (zeros at the start)."""
    width = weight.shape[1]
    if index is not None:
        x = x.flatten(0, 1)[index][None]
    if cu_seqlens is None:
        pieces = list(x)
    else:
        borders = cu_seqlens.tolist()
        pieces = [x[0, a:b] for a, b in pairwise(borders)]
    outputs = []
    for n, tokens in enumerate(pieces):
        past = x.new_zeros(width - 1, x.shape[2]) if state is None else state[n].to(x.dtype)
        inputs = torch.cat([past, tokens])
        for t in range(tokens.shape[0]):
            y = (inputs[t : t + width] * weight.T).sum(0)
            y = y if bias is None else y + bias
            outputs.append((F.silu(y) if silu else y).to(x.dtype))
    return torch.stack(outputs).view(x.shape)
