"""What becomes of an update whose loss or gradient is bad, judged on the device that computed it.

The host never waits for a step's numbers: the verdict is a flag on the device, the optimizer's own ``found_inf`` makes
the update a no-op where the flag is 1, and the numbers follow by a copy that is read some steps later. The verdict and
the statistics behind it are functions of numbers that all processes share, so that all of them decide alike.
"""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..models.config import Count, Positive, Strict

logger = logging.getLogger("palimpsest.train")

GOOD, NOT_FINITE, SPIKE = 0, 1, 2
LAG: Mapping[str, int] = {"cuda": 2}
"""Steps that a device may run ahead of the host before the host reads a verdict; 0 where reading costs nothing."""
LEAST_SIGMA = 0.01
"""The deviation is taken as no smaller than this share of the mean: a loss that hardly moves has no spikes."""


class FaultConfig(Strict):
    """The ``train.faults`` section: what is done about an update whose numbers are bad.

    ``skip``: weights and optimizer stay bit for bit as they were, and the next batch follows. ``rollback``: the newest
    sound checkpoint comes back, and the batches since then, the bad one among them, are not seen again. ``stop``:
    training ends with an error; nothing is saved. ``allow``: the update is done.
    """

    nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """Of a loss or global gradient norm that is infinite or NaN."""
    spike: Literal["allow", "skip", "rollback", "stop"] = "allow"
    """Of a finite one above the running mean + ``sigma`` standard deviations of the updates that were done."""
    sigma: Positive = 6.0
    watch: Literal["loss", "grad_norm", "both"] = "both"
    """Which of the two numbers can be a spike."""
    window: Count = 128
    """Updates that the running mean and deviation remember, about: weights fall off as (1 − 1/window)^n."""
    settle: Annotated[int, Field(ge=2)] = 32
    """Updates that are done before any can be a spike."""
    max_rollbacks: Count = 3
    """Rollbacks with no due checkpoint between them, after which training stops instead of a further one."""


@dataclass(frozen=True)
class Verdict:
    """What a step's numbers were: ``kind`` is GOOD (0), NOT_FINITE (1) or SPIKE (2); ``level`` the spike threshold of
    (loss, gradient norm) then, infinite while it has not settled."""

    step: int
    loss: float
    norm: float
    kind: int
    level: tuple[float, float]

    def __str__(self) -> str:
        text = f"step {self.step}: loss {self.loss}, gradient norm {self.norm}"
        return text if self.kind != SPIKE else f"{text} (spike: above {self.level[0]:.4g} or {self.level[1]:.4g})"


class Watch:
    """Judges each step's loss and gradient norm, and keeps the statistics of those that were accepted.

    With x = (loss, norm), n the accepted steps so far and a = max(1/(n + 1), 1/window), an accepted step updates
    m ← m + a (x − m) and v ← (1 − a)(v + a (x − m)²): plain mean and variance at first, exponential ones later.
    A spike is x > m + sigma · max(√v, LEAST_SIGMA |m|) once n ≥ settle.

    Args:
        device: where losses are; the statistics live there as float64 [5]: m, v and n.
    """

    def __init__(self, config: FaultConfig, device: torch.device):
        self.config, self.device = config, device
        self.lag = LAG.get(device.type, 0)
        self.stats = torch.zeros(5, dtype=torch.float64, device=device)
        watched = {"loss": [True, False], "grad_norm": [False, True], "both": [True, True]}[config.watch]
        self.watched = torch.tensor(watched, device=device) & (config.spike != "allow")
        self.waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    @torch.no_grad()
    def judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the update of ``step`` must not be done: a boolean scalar on the device, which nobody has read.

        Args:
            loss, norm: scalars on the device, the same in every process.
        """
        x = torch.stack([loss.double(), norm.double()])
        mean, variance, count = self.stats[:2], self.stats[2:4], self.stats[4]
        sigma = torch.maximum(variance.sqrt(), LEAST_SIGMA * mean.abs())
        level = torch.where(count >= self.config.settle, mean + self.config.sigma * sigma, torch.inf)
        broken = ~x.isfinite().all()
        spike = ((x > level) & self.watched).any() & ~broken
        bad = broken | spike

        share = torch.clamp(1 / (count + 1), min=1 / self.config.window)
        away = x - mean
        after = torch.cat([mean + share * away, (1 - share) * (variance + share * away**2), (count + 1)[None]])
        self.stats = torch.where(bad, self.stats, after)
        self._send(step, torch.cat([x, broken[None] * NOT_FINITE + spike[None] * SPIKE, level]))
        return bad

    def _send(self, step: int, row: Tensor) -> None:
        """Start a row's way to the host."""
        if self.device.type != "cuda":
            self.waiting.append((step, row, None))
            return
        there = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
        there.copy_(row, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.waiting.append((step, there, arrived))

    def read(self, lag: int = 0) -> list[Verdict]:
        """The verdicts that were not read yet, in order, but for those of the newest ``lag`` steps."""
        verdicts = []
        while len(self.waiting) > lag:
            step, row, arrived = self.waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, norm, kind, *level = row.tolist()
            verdicts.append(Verdict(step, loss, norm, int(kind), (level[0], level[1])))
        return verdicts

    def state(self) -> list[float]:
        """The statistics, for a checkpoint; float64 survives JSON exactly."""
        return self.stats.tolist()

    def restore(self, state: Any = None) -> None:
        """Go on from :meth:`state` (None: from nothing), and forget the verdicts that nobody read.

        Raises:
            ValueError: for what is no such state.
        """
        numbers = torch.as_tensor([0.0] * 5 if state is None else state, dtype=torch.float64)
        if numbers.shape != (5,) or not bool(numbers.isfinite().all()):
            raise ValueError(f"state of the loss statistics was {state!r}; it must be five finite numbers")
        self.stats = numbers.to(self.device)
        self.waiting.clear()


def heeds_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer leaves everything as it is where ``found_inf`` (a float scalar) is 1, step counters too.

    That is the protocol of ``torch.amp.GradScaler``, which torch's fused optimizers follow.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def update_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One update of the optimizer, or none: then weights, moments and step counters keep their bits.

    An optimizer that knows ``found_inf`` is told on the device. Of another one the host reads the flag, and does not
    call it: exact for any optimizer, at the price of waiting for the device once a step. So it is with the first update
    of all: torch's fused SGD leaves the momentum that it then makes unset where ``found_inf`` is 1.

    Args:
        bad: boolean scalar on the device.
    """
    if heeds_found_inf(optimizer) and optimizer.state:
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(bad):
        optimizer.step()
