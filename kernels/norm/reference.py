"""Normalisation over the last dimension, one token at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor


def normalise(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool) -> Tensor:
    """x / sqrt(mean or sum of x^2 + eps), times the weight and silu(gate), in float32 for half precision."""
    kind = torch.promote_types(x.dtype, torch.float32)
    gates = None if gate is None else gate.reshape(-1, gate.shape[-1])
    outputs = []
    for t, token in enumerate(x.reshape(-1, x.shape[-1]).to(kind)):
        square = (token * token).sum() / (x.shape[-1] if mean else 1)
        y = token / torch.sqrt(square + eps)
        y = y if weight is None else y * weight.to(kind)
        y = y if gates is None else y * F.silu(gates[t].to(kind))
        outputs.append(y.to(x.dtype))
    return torch.stack(outputs).view(x.shape) if outputs else x.clone()
