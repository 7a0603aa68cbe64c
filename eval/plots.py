"""Figures. matplotlib is optional: without it the run goes on, and one log line says how to get it."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..kernels.backend import log_once

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#222222", "#cccccc"
COLOURS = ("#1f6f8b", "#c8553d", "#6b8e23", "#7b5ea7", "#b8860b")
DPI = 140


def available() -> bool:
    """Whether figures can be drawn; when not, says so once."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    log_once("PNG figures are not drawn: matplotlib is not installed; pip install 'palimpsest[plot]' and run again")
    return False


def figure(rows: int, columns: int, width: float, height: float) -> tuple["Figure", Any]:
    """An empty figure that needs no display, with an array [rows, columns] of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def save(drawing: "Figure", path: Path) -> None:
    """Write the PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    drawing.savefig(beside, format="png")
    beside.replace(path)


def plain(axes: "Axes", title: str, x: str, y: str) -> None:
    """The look of every panel: two spines, a faint grid, labels."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def by_position(axes: "Axes", results: Mapping[str, Mapping[str, Any]]) -> None:
    """Bits per byte by position, one line for each named result of the perplexity task; dashed: fresh state."""
    context = next(iter(results.values()))["context"]
    for colour, (name, result) in zip(COLOURS * len(results), results.items(), strict=False):
        spans = result["buckets"]
        x = [(span["start"] + span["stop"]) / 2 for span in spans]
        y = [span["bits_per_byte"] for span in spans]
        error = [span["stderr"] or 0.0 for span in spans]
        axes.errorbar(x, y, yerr=error, color=colour, marker="o", markersize=4, capsize=2, linewidth=1.6, label=name)
        if spans[0]["fresh_bits_per_byte"] is not None:
            fresh = [span["fresh_bits_per_byte"] for span in spans]
            axes.plot(
                x, fresh, color=colour, linestyle="--", linewidth=1.0, label=f"{name}, fresh state each {context}"
            )
    axes.axvline(context, color=INK, linewidth=0.8, linestyle=":")
    axes.annotate(
        " training context", (context, 0), xycoords=("data", "axes fraction"), fontsize=8, color=INK, va="bottom"
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.legend(fontsize=8, frameon=False)
    plain(
        axes, "Held-out bits per byte by position", "position in the text (tokens)", "bits per byte (lower is better)"
    )


def heat_map(axes: "Axes", result: Mapping[str, Any], score: str, title: str) -> None:
    """A passkey score by depth (down) and length (across), every cell with its number."""
    lengths = sorted({cell["length"] for cell in result["cells"]})
    depths = sorted({cell["depth"] for cell in result["cells"]})
    grid = [[0.0] * len(lengths) for _ in depths]
    for cell in result["cells"]:
        grid[depths.index(cell["depth"])][lengths.index(cell["length"])] = cell[score]
    axes.imshow(grid, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axes.text(
                j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else INK
            )
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    plain(axes, title, "length (tokens)", "depth of the number")


def evaluation(path: Path, name: str, tasks: Mapping[str, Any]) -> bool:
    """Draw what ``tasks`` holds (perplexity, passkey) into one PNG; False when matplotlib is missing."""
    if not available():
        return False
    panels = ("perplexity" in tasks) + 2 * ("passkey" in tasks)
    drawing, axes = figure(1, panels, 5.6 * panels if panels > 1 else 7.0, 4.2)
    row = list(axes[0])
    if "perplexity" in tasks:
        by_position(row.pop(0), {name: tasks["perplexity"]})
    if "passkey" in tasks:
        heat_map(row.pop(0), tasks["passkey"], "accuracy", "Passkey: number retrieved (%)")
        heat_map(row.pop(0), tasks["passkey"], "digits", "Passkey: digits right (%, chance 10)")
    save(drawing, path)
    return True


def comparison(path: Path, results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Bits per byte by position of several models in one panel; False when matplotlib is missing."""
    if not available():
        return False
    drawing, axes = figure(1, 1, 7.5, 4.5)
    by_position(axes[0][0], results)
    save(drawing, path)
    return True


def losses(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    """Training loss (faint, its running mean strong) and validation loss (dots) of runs by name, from their metrics.

    False when matplotlib is missing.
    """
    if not available():
        return False
    drawing, axes = figure(1, 1, 7.5, 4.5)
    panel = axes[0][0]
    lowest, start = math.inf, 0.0
    for colour, (name, records) in zip(COLOURS * len(runs), runs.items(), strict=False):
        steps, values = series(records, "loss")
        panel.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
        smooth = running_mean(values, max(1, len(values) // 25))
        panel.plot(steps, smooth, color=colour, linewidth=1.6, label=f"{name}, training")
        at, held = series(records, "validation_loss")
        panel.plot(
            at, held, color=colour, marker="o", markersize=4, linestyle="--", linewidth=1, label=f"{name}, held out"
        )
        lowest, start = min([lowest, *values, *held]), max([start, *values[:1]])
    if math.isfinite(lowest):
        panel.set_ylim(max(0.0, lowest - 0.1), max(start, lowest + 0.5))
    panel.grid(axis="y", color=FAINT, linewidth=0.5)
    panel.legend(fontsize=8, frameon=False)
    plain(panel, "Loss during training", "step", "loss (nats per token)")
    save(drawing, path)
    return True


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and up to ``width - 1`` before it."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of ``key``; where a resumed run recorded a step again, the later record counts."""
    found = {record["step"]: record[key] for record in records if record.get(key) is not None and "step" in record}
    steps = sorted(found)
    return steps, [found[step] for step in steps]
