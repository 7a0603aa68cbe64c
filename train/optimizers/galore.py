"""GaLore: Adam on the gradient's projection onto its first singular vectors (Zhao et al., 2024, arXiv 2403.03507)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import adam, subspace


class GaLore(torch.optim.Optimizer):
    """Algorithm 2 of the paper, for matrices.

    Every ``refresh_every`` updates, from the first on, P is the first r singular vectors of G [m, n] on its shorter
    side. With m ≤ n: R = Pᵀ G; N = Adam's direction of R; W ← W − η α P N (m > n: R = G P, N Pᵀ). The moments are kept
    when P changes, as in the paper; decay is AdamW's.

    State of a matrix: ``exp_avg`` and ``exp_avg_sq`` [r, max(m, n)] (or its transpose), ``projection`` [min(m, n), r],
    ``step``: 4 (2 r max(m, n) + r min(m, n) + 1) bytes in float32.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        rank: int,
        refresh_every: int,
        scale: float,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, {**defaults, "rank": rank, "refresh_every": refresh_every, "scale": scale})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._update(self.state[parameter], parameter.grad, group)
                    adam.apply(parameter, update, group["lr"], group["weight_decay"])

    def _update(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        if not state:
            rows, columns = gradient.shape
            short, rank = min(rows, columns), group["rank"]
            state |= adam.fresh((rank, columns) if subspace.is_wide(gradient) else (rows, rank), gradient)
            state["projection"] = gradient.new_zeros(short, rank)
        state["step"] += 1
        count = int(state["step"])
        if (count - 1) % group["refresh_every"] == 0:
            state["projection"].copy_(subspace.singular(gradient, group["rank"]))
            subspace.agree(state["projection"])
        low = subspace.down(gradient, state["projection"])
        return self._whole(state, gradient, low, adam.direction(state, low, count, group["betas"], group["eps"]), group)

    def _whole(
        self, state: dict[str, Any], gradient: Tensor, low: Tensor, direction: Tensor, group: dict[str, Any]
    ) -> Tensor:
        """The update [m, n], from the gradient's coordinates in the subspace and Adam's direction there."""
        return subspace.up(direction, state["projection"], gradient).mul_(group["scale"])
