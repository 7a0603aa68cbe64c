"""The Newton-Schulz iteration, one matrix at a time."""

import torch
from torch import Tensor


def newton_schulz(x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """Of every matrix of x [N, m, n], in float32 for half precision."""
    outputs = []
    for matrix in x.to(torch.promote_types(x.dtype, torch.float32)):
        tall = matrix.shape[0] > matrix.shape[1]
        y = matrix.T if tall else matrix
        y = y / torch.sqrt((y * y).sum() + eps**2)
        for _ in range(steps):
            square = y @ y.T
            y = a * y + (b * square + c * square @ square) @ y
        outputs.append(y.T if tall else y)
    return torch.stack(outputs).to(x.dtype) if outputs else x.clone()
