"""Adam's moments and direction, which the memory-efficient methods compute in fewer dimensions."""

from typing import Any

import torch
from torch import Tensor


def fresh(shape: torch.Size | tuple[int, ...], like: Tensor) -> dict[str, Any]:
    """Moments of zero of a shape, and a count of updates (a float32 scalar on the CPU, as torch's own have)."""
    moments = {name: torch.zeros(shape, dtype=like.dtype, device=like.device) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32), **moments}


def direction(state: dict[str, Any], gradient: Tensor, count: int, betas: tuple[float, float], eps: float) -> Tensor:
    """Update the moments by a gradient of their shape and return m̂/(√v̂ + ε) (Kingma & Ba, 2015, algorithm 1).

    m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ), with t = ``count`` from 1.
    """
    first, second = betas
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m.lerp_(gradient, 1 - first)
    v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = (v / (1 - second**count)).sqrt_().add_(eps)
    return (m / (1 - first**count)).div_(root)


def apply(parameter: Tensor, update: Tensor, rate: float, weight_decay: float) -> None:
    """w ← (1 − rate · decay) w − rate · update: decay is decoupled (Loshchilov & Hutter, 2019)."""
    parameter.mul_(1 - rate * weight_decay).add_(update, alpha=-rate)
