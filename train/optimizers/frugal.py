"""FRUGAL: Adam in a subspace that keeps changing, sign descent in the rest (Zmushko et al., 2024, arXiv 2411.07837)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import adam, subspace


class Frugal(torch.optim.Optimizer):
    """Algorithm 1 of the paper with Adam and signSGD, for matrices G [m, n].

    Every T = ``refresh_every`` updates, from the first on, another subspace is chosen and Adam begins anew in it:
    ``columns``, round(ρ n) random columns; ``random``, a random subspace of round(ρ min(m, n)) dimensions of the
    shorter side; ``svd``, as many first singular vectors. With R the gradient's part in it and P⁻¹ the way back,
    W ← W − η (P⁻¹ Adam(R) + s · sign(G − P⁻¹ R)), s = ``free_lr_scale``; decay is AdamW's.

    State of a matrix: ``exp_avg`` and ``exp_avg_sq`` [m, k] with k columns, or as GaLore's, ``step``, and with
    ``random`` and ``svd`` the ``projection`` [min(m, n), r]. Columns are drawn again from their key, not kept.

    Args:
        names: the name of every parameter, which together with ``seed`` and the number of the choice is the key of what
            is drawn.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        density: float,
        refresh_every: int,
        space: str,
        free_lr_scale: float,
        seed: int,
        names: Mapping[Tensor, str],
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "free_lr_scale": free_lr_scale}
        super().__init__(groups, {**defaults, "density": density, "refresh_every": refresh_every, "space": space})
        self.seed, self.names = seed, dict(names)
        self._columns: dict[Tensor, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    self._begin(state, gradient, group)
                state["step"] += 1
                done = int(state["step"]) - 1
                number, since = done // group["refresh_every"], done % group["refresh_every"]
                key = subspace.key_of(self.seed, number, self.names[parameter])
                if since == 0:
                    self._choose(state, gradient, key, group)
                if group["space"] == "columns":
                    update = self._by_columns(state, gradient, self._drawn(parameter, number, key, group), since, group)
                else:
                    update = self._by_basis(state, gradient, since, group)
                adam.apply(parameter, update, group["lr"], group["weight_decay"])

    def _begin(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> None:
        rows, columns = gradient.shape
        if group["space"] == "columns":
            state |= adam.fresh((rows, share(columns, group["density"])), gradient)
            return
        rank = share(min(rows, columns), group["density"])
        state |= adam.fresh((rank, columns) if subspace.is_wide(gradient) else (rows, rank), gradient)
        state["projection"] = gradient.new_zeros(min(rows, columns), rank)

    def _choose(self, state: dict[str, Any], gradient: Tensor, key: int, group: dict[str, Any]) -> None:
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
        if group["space"] == "columns":
            return
        rank = state["projection"].shape[1]
        svd = group["space"] == "svd"
        basis = subspace.singular(gradient, rank) if svd else subspace.random(gradient, rank, key)
        state["projection"].copy_(basis)
        subspace.agree(state["projection"])

    def _drawn(self, parameter: Tensor, number: int, key: int, group: dict[str, Any]) -> Tensor:
        """The columns of choice ``number``, kept until the next."""
        if parameter not in self._columns or self._columns[parameter][0] != number:
            count = share(parameter.shape[1], group["density"])
            self._columns[parameter] = number, subspace.columns(parameter, count, key)
        return self._columns[parameter][1]

    def _by_columns(
        self, state: dict[str, Any], gradient: Tensor, chosen: Tensor, since: int, group: dict[str, Any]
    ) -> Tensor:
        adamed = adam.direction(state, gradient[:, chosen], since + 1, group["betas"], group["eps"])
        return gradient.sign().mul_(group["free_lr_scale"]).index_copy_(1, chosen, adamed)

    def _by_basis(self, state: dict[str, Any], gradient: Tensor, since: int, group: dict[str, Any]) -> Tensor:
        basis = state["projection"]
        low = subspace.down(gradient, basis)
        rest = (gradient - subspace.up(low, basis, gradient)).sign_().mul_(group["free_lr_scale"])
        adamed = adam.direction(state, low, since + 1, group["betas"], group["eps"])
        return rest.add_(subspace.up(adamed, basis, gradient))


def share(size: int, density: float) -> int:
    """A share of a size, at least one."""
    return max(1, round(size * density))
