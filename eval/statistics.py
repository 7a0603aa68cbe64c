"""Means over seeds, and a paired comparison of two arms."""

import math
from collections.abc import Sequence


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation of a sample (n − 1); None for the latter of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def student_tail(t: float, freedom: int) -> float:
    """P(|X| > |t|) of Student's distribution with so many degrees of freedom.

    The finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4, exact for whole degrees.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    term = total = 1.0
    if freedom % 2:
        term = total = math.cos(angle) if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= square * (k - 1) / k
            total += term
        inside = (angle + sine * total) * 2 / math.pi
    else:
        for k in range(2, freedom - 1, 2):
            term *= square * (k - 1) / k
            total += term
        inside = sine * total
    return max(0.0, 1.0 - inside)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Two-sided p-value of a paired t-test; None for fewer than two pairs.

    Raises:
        ValueError: for samples of different sizes.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"samples were of {len(ours)} and {len(theirs)} values; a paired test needs equal sizes")
    if len(ours) < 2:
        return None
    mean, sd = mean_sd([a - b for a, b in zip(ours, theirs, strict=True)])
    assert sd is not None
    if sd == 0:
        return 1.0 if mean == 0 else 0.0
    return student_tail(mean / sd * math.sqrt(len(ours)), len(ours) - 1)
