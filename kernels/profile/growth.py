"""How measured time grows with a swept size."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """``p`` and r² of seconds ∝ size^p, by least squares on the logarithms.

    Raises:
        ValueError: for fewer than three different sizes.
    """
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    if len(set(x)) < 3:
        raise ValueError(f"sizes were {list(sizes)}; a fit takes three different ones at least")
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    square = sum((a - mean_x) ** 2 for a in x)
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    power, whole = product / square, sum((b - mean_y) ** 2 for b in y)
    left = sum((b - mean_y - power * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return power, 1.0 - left / whole if whole else 1.0


def growth(rows: Sequence[Mapping[str, Any]], letter: str) -> list[dict[str, Any]]:
    """The fit of every implementation and pass of a workload that was timed at three sizes or more."""
    lines: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "seconds" in row:
            lines.setdefault((row["workload"], row["pass"], row["implementation"]), []).append(row)
    found = []
    for (workload, kind, implementation), line in lines.items():
        sizes = [row["sizes"][letter] for row in line]
        if len(set(sizes)) >= 3:
            power, r2 = fit(sizes, [row["seconds"]["median"] for row in line])
            found.append({"workload": workload, "pass": kind, "implementation": implementation, "size": letter,
                          "from": min(sizes), "to": max(sizes), "power": power, "r2": r2})  # fmt: skip
    return found


def text(found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each fit."""
    return "\n".join(
        f"{row['workload']} {row['implementation']}, {row['pass']}: time ∝ {row['size']}^{row['power']:.2f} "
        f"(r² {row['r2']:.3f}) from {row['from']} to {row['to']}"
        for row in found
    )
