"""Time against a swept size, one panel per workload."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(path: Path, rows: Sequence[Mapping[str, Any]], swept: Mapping[str, int]) -> None:
    """Write a PNG: median seconds of forward with backward against the swept size, a line per implementation.

    Raises:
        ValueError: when nothing was swept.
    """
    if not swept:
        raise ValueError("plot needs a sweep, as in --sweep T=1k..64k")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (letter,) = swept
    timed = [row for row in rows if "seconds" in row and row["pass"] == "forward+backward"]
    names = list(dict.fromkeys(row["workload"] for row in timed))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5.5 * len(names), 4), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        here = [row for row in timed if row["workload"] == name]
        for implementation in dict.fromkeys(row["implementation"] for row in here):
            line = [row for row in here if row["implementation"] == implementation]
            x = [row["sizes"][letter] for row in line]
            panel.plot(x, [row["seconds"]["median"] for row in line], marker="o", label=implementation)
        panel.set(xscale="log", yscale="log", xlabel=letter, ylabel="seconds, forward and backward", title=name)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
