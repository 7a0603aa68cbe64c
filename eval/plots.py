"""Figures. matplotlib is optional: without it the run goes on, and one log line says how to get it."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
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


def heat_map(axes: "Axes", result: Mapping[str, Any], score: str, title: str, down: str = "depth") -> None:
    """A score of cells by ``down`` and length (across), every cell with its number."""
    lengths = sorted({cell["length"] for cell in result["cells"]})
    places = sorted({cell[down] for cell in result["cells"]})
    grid = [[0.0] * len(lengths) for _ in places]
    for cell in result["cells"]:
        grid[places.index(cell[down])][lengths.index(cell["length"])] = cell[score]
    axes.imshow(grid, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axes.text(
                j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else INK
            )
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    names = [f"{100 * place:.0f} %" if down == "depth" else f"{place}" for place in places]
    axes.set_yticks(range(len(places)), names)
    plain(axes, title, "length (tokens)", "depth of the needle" if down == "depth" else "facts needed")


def retained(axes: "Axes", result: Mapping[str, Any]) -> None:
    """The loss of a passage read again, less that of the first reading and of one not read before, by gap."""
    gaps = [item["gap"] for item in result["gaps"]]
    for colour, key, error, name in (
        (COLOURS[0], "difference", "stderr", "minus the first reading"),
        (COLOURS[1], "remembered", "remembered_stderr", "minus the same behind the gap, unread"),
    ):
        values = [item[key] for item in result["gaps"]]
        spread = [item[error] or 0.0 for item in result["gaps"]]
        places = range(len(gaps))
        axes.errorbar(places, values, yerr=spread, color=colour, marker="o", markersize=4, capsize=2, label=name)
    axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(gaps)), [f"{gap:,}" for gap in gaps])
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.legend(fontsize=8, frameon=False)
    plain(axes, f"Retention of {result['passage']} tokens", "gap (tokens)", "nats per token (lower is better)")


def by_group(axes: "Axes", name: str, result: Mapping[str, Any]) -> None:
    """The accuracy of a task's groups, as bars."""
    groups = result["groups"]
    bars = axes.bar(range(len(groups)), [group["accuracy"] for group in groups], color=COLOURS[0])
    axes.bar_label(bars, [f"{group['accuracy']:.2f}" for group in groups], fontsize=8)
    axes.set_xticks(range(len(groups)), [group["name"] for group in groups], rotation=30, ha="right")
    axes.set_ylim(0, 1.08)
    plain(axes, name, "group", "accuracy")


def panels(name: str, run: str, result: Mapping[str, Any]) -> list[Callable[["Axes"], None]]:
    """What draws a task's result, a panel each."""
    if name == "perplexity":
        return [lambda axes: by_position(axes, {run: result})]
    if name == "passkey":
        return [
            lambda axes: heat_map(axes, result, "accuracy", "Passkey: number retrieved (%)"),
            lambda axes: heat_map(axes, result, "digits", "Passkey: digits right (%, chance 10)"),
        ]
    if name == "niah":
        return [partial(_needle, variant) for variant in result["variants"]]
    if name == "facts":
        return [
            lambda axes: heat_map(axes, result, "accuracy", f"Facts in {result['filler']}: said (%)", "supports"),
            lambda axes: heat_map(axes, result, "choice", "Facts: likeliest of six (%, chance 17)", "supports"),
        ]
    if name == "retention":
        return [lambda axes: retained(axes, result)]
    return [lambda axes: by_group(axes, name, result)]


def _needle(variant: Mapping[str, Any], axes: "Axes") -> None:
    heat_map(axes, variant, "accuracy", f"{variant['name']} (%)")


def evaluation(path: Path, name: str, tasks: Mapping[str, Any]) -> bool:
    """Draw what ``tasks`` holds into one PNG, up to three panels a row; False when matplotlib is missing."""
    if not available():
        return False
    found = [panel for task, result in tasks.items() for panel in panels(task, name, result)]
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    drawing, axes = figure(rows, columns, 5.6 * columns if columns > 1 else 7.0, 4.2 * rows)
    for place, panel in zip_longest(axes.flat, found):
        panel(place) if panel is not None else place.set_axis_off()
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
