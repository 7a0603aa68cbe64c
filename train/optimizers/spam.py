"""SPAM: Adam that clips spikes of single gradients and forgets its moments now and then (Huang et al., 2025, arXiv
2501.06842)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import adam


class Spam(torch.optim.Optimizer):
    """Algorithm 1 of the paper with full moments, element by element, so that it works on shards as on whole tensors.

    At update t with t mod ΔT = 0 (ΔT = ``reset_every``) m and v become zero. Then, where g² > θ v (θ = ``threshold``),
    g ← sign(g) √(θ v), and Adam's update follows, bias-corrected by t. Over the first N = ``warmup_steps`` updates from
    a reset on, the k-th of them is multiplied by (1 − cos(π k/N))/2. Decay is AdamW's.

    A v of zero would make a spike of every gradient, so nothing is clipped before v has seen ``clip_after`` gradients
    since the start or the last reset. The paper's sparse moments (of a random mask) are not here.

    State of a parameter: ``exp_avg`` and ``exp_avg_sq`` of its shape, and ``step``.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        threshold: float,
        reset_every: int,
        warmup_steps: int,
        clip_after: int,
    ):
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "threshold": threshold}
        defaults |= {"reset_every": reset_every, "warmup_steps": warmup_steps, "clip_after": clip_after}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state |= {"step": torch.zeros((), dtype=torch.float32), **zeros}
        state["step"] += 1
        count, every = int(state["step"]), group["reset_every"]
        local = {name: _local(state[name]) for name in ("exp_avg", "exp_avg_sq")}
        gradient, since = _local(parameter.grad), count % every  # type: ignore[arg-type]
        if since == 0:
            local["exp_avg"].zero_()
            local["exp_avg_sq"].zero_()
        if (count - 1 if count < every else since) >= group["clip_after"]:
            limit = (group["threshold"] * local["exp_avg_sq"]).sqrt_()
            gradient = torch.where(gradient.abs() > limit, gradient.sign() * limit, gradient)
        update = adam.direction(local, gradient, count, group["betas"], group["eps"])
        if count >= every:
            update.mul_(warmth(since + 1, group["warmup_steps"]))
        adam.apply(_local(parameter), update, group["lr"], group["weight_decay"])


def warmth(number: int, length: int) -> float:
    """(1 − cos(π k/N))/2 for the k-th update from a reset on; 1 from the N-th on."""
    return 1.0 if number >= length else 0.5 * (1 - math.cos(math.pi * number / length))


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which it shares memory with."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
