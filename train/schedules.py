"""Learning-rate schedules: pure functions of the update's number, so that resuming needs no scheduler state."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainConfig

SCHEDULES = ("cosine", "wsd", "constant", "infinite")


def learning_rate(
    step: int,
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    schedule: str,
    min_ratio: float,
    decay_fraction: float = 0.2,
    cooldown_steps: int = 0,
    constant_ratio: float = 1.0,
) -> float:
    """The learning rate of update ``step`` (1 … ``steps``).

    Linear warm-up reaches ``peak`` at update ``warmup_steps``. Then, with r = ``min_ratio``,
    ``cosine``: peak · (r + (1 − r)(1 + cos π x)/2), x from 0 to 1 at the last update;
    ``wsd`` (warm-up, stable, decay): peak until the last ``decay_fraction`` of the updates, then linear to r · peak;
    ``constant``: peak;
    ``infinite``: half a cosine over ``cooldown_steps`` from peak to c · peak, c = ``constant_ratio``; constant; and
    over the last ``decay_fraction`` of the updates (0: not at all) exponential from there, c · (r/c)^x · peak. Until
    that anneal begins no rate depends on ``steps``, so that a run can be prolonged from there (Ibrahim et al., 2024,
    arXiv 2403.08763; Singh et al., 2025, arXiv 2503.02844).

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule was {schedule!r}; it must be one of {list(SCHEDULES)}")
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "cosine":
        x = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return peak * _half_cosine(1.0, min_ratio, x)
    if schedule == "wsd":
        return peak * (1 - (1 - min_ratio) * _last(step, steps, max(1, round(decay_fraction * steps))))
    if schedule == "infinite":
        x = min(1.0, (step - warmup_steps) / max(1, cooldown_steps))
        ratio = _half_cosine(1.0, constant_ratio, x)
        length = round(decay_fraction * steps)
        return peak * ratio * (min_ratio / constant_ratio) ** (_last(step, steps, length) if length else 0.0)
    return peak


def rate_of(settings: "TrainConfig", step: int) -> float:
    """:func:`learning_rate` of update ``step`` under a run's ``train`` section."""
    return learning_rate(
        step,
        peak=settings.lr,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        schedule=settings.schedule,
        min_ratio=settings.min_lr_ratio,
        decay_fraction=settings.decay_fraction,
        cooldown_steps=settings.cooldown_steps or 0,
        constant_ratio=settings.constant_lr_ratio or 1.0,
    )


def _half_cosine(start: float, end: float, x: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * x))


def _last(step: int, steps: int, length: int) -> float:
    """From 0 before the last ``length`` updates to 1 at the last one."""
    return min(1.0, max(0.0, (step - (steps - length)) / length))
