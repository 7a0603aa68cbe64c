"""Fira: GaLore, and the rest of the gradient scaled as Adam scales the projected part (Chen et al., 2024, arXiv
2410.01623)."""

from typing import Any

import torch
from torch import Tensor

from . import subspace
from .galore import GaLore

TINY = 1e-8
"""Added to the norm of a column of the projected gradient, which may be zero."""


class Fira(GaLore):
    """GaLore's update plus S, for m ≤ n (else rows where columns stand here):

    S = φ ⊙ (G − P R), φ_i = ‖N_{:,i}‖ / ‖R_{:,i}‖ (norm-based scaling, by column), and if ‖S‖ > γ ‖S_{t−1}‖ then S is
    scaled down to that norm (norm-growth limiter; γ = ``growth``; a norm before of zero limits nothing).
    W ← W − η (α P N + S). The residual is that of the projection itself, whatever α is.

    State of a matrix: GaLore's and ``residual_norm``, ‖S_{t−1}‖, 4 bytes more.
    """

    def __init__(self, *arguments: Any, growth: float, **options: Any):
        super().__init__(*arguments, **options)
        for group in self.param_groups:
            group["growth"] = growth

    def _whole(
        self, state: dict[str, Any], gradient: Tensor, low: Tensor, direction: Tensor, group: dict[str, Any]
    ) -> Tensor:
        along = 0 if subspace.is_wide(gradient) else 1
        ratio = direction.norm(dim=along, keepdim=True) / (low.norm(dim=along, keepdim=True) + TINY)
        rest = (gradient - subspace.up(low, state["projection"], gradient)).mul_(ratio)
        norm = rest.norm()
        before = state.setdefault("residual_norm", torch.zeros_like(norm))
        most = torch.where(before > 0, group["growth"] * before, norm)
        factor = torch.where(norm > most, most / norm, 1.0)  # on the device: nobody waits for it
        before.copy_(norm * factor)
        return super()._whole(state, gradient, low, direction, group).addcmul_(rest, factor)
