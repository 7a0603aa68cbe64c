"""The figures of an ablation: measures by test group, by the second number in a group's name, and by state bytes; and
the loss by step, tokens and FLOPs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..train import read_metrics
from ..train.config import RunConfig
from ..train.examples import open_task
from . import plots

Entry = Mapping[str, Any]
COLOURS = (*plots.COLOURS, "#444444", "#d98cb3", "#2e8b57", "#4169e1", "#a0522d", "#708090", "#e69f00", "#800000")
MARKS = "osD^vP*X"


def look(index: int) -> dict[str, Any]:
    """Colour and mark of an arm: no two arms of fewer than a hundred look alike."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)]}


def numbered(names: Sequence[str]) -> dict[int, list[int]] | None:
    """Second numbers by first of groups all named like ``2x16``, when every first has several; None when not."""
    pairs = [re.fullmatch(r"(\d+)x(\d+)", name) for name in names]
    found: dict[int, list[int]] = {}
    for pair in pairs:
        if pair is None:
            return None
        found.setdefault(int(pair[1]), []).append(int(pair[2]))
    return found if found and all(len(second) > 1 for second in found.values()) else None


def groups(summary: Sequence[Entry]) -> list[str]:
    """The measures that are drawn side by side: those of test groups, or the validation numbers."""
    names = list(summary[0]["measures"])
    return names[: names.index("mean")] if "mean" in names[1:] else names


def words(names: Sequence[str]) -> tuple[str, str]:
    """Labels of the axes: of what, and what is measured."""
    text = any(name.startswith("validation") for name in names)
    return ("held-out text", "loss") if text else ("test examples", "share of right answers")


def _bars(panel: Any, x: Sequence[float], cells: Sequence[Mapping[str, Any]], index: int, label: str | None) -> None:
    values, error = [cell["mean"] for cell in cells], [cell["sd"] or 0.0 for cell in cells]
    panel.errorbar(x, values, yerr=error, markersize=4, capsize=2, linewidth=1.4, label=label, **look(index))


def _legend(drawing: Any, panel: Any) -> None:
    """One legend for all panels, beside them."""
    handles, labels = panel.get_legend_handles_labels()
    drawing.legend(handles, labels, fontsize=8, frameon=False, loc="outside right upper")


def by_group(path: Path, summary: Sequence[Entry]) -> None:
    """Each measure of each arm with its standard deviation."""
    drawing, axes = plots.figure(1, 1, 9.0, 4.2)
    panel, names = axes[0][0], groups(summary)
    for index, entry in enumerate(summary):
        cells = [entry["measures"][name] for name in names]
        _bars(panel, range(len(names)), cells, index, f"{entry['arm']} ({entry['state_bytes']:,} state bytes)")
    panel.set_xticks(range(len(names)), names)
    panel.grid(axis="y", color=plots.FAINT, linewidth=0.5)
    _legend(drawing, panel)
    plots.plain(panel, "Mean ± sd over seeds", *words(names))
    plots.save(drawing, path)


def by_number(path: Path, summary: Sequence[Entry], axes_named: Sequence[str] | None) -> bool:
    """A panel for every first number of the groups' names, in it the measure by the second; False when they have
    none."""
    found = numbered(groups(summary))
    if found is None:
        return False
    first, second = axes_named or ("first number", "second number")
    drawing, axes = plots.figure(1, len(found), 3.4 * len(found) + 2.2, 3.8)
    for panel, (number, others) in zip(axes[0], found.items(), strict=True):
        for index, entry in enumerate(summary):
            _bars(panel, others, [entry["measures"][f"{number}x{x}"] for x in others], index, entry["arm"])
        panel.set_xscale("log", base=2)
        panel.set_xticks(others, [str(x) for x in others])
        panel.set_ylim(-0.03, 1.03)
        panel.grid(axis="y", color=plots.FAINT, linewidth=0.5)
        plots.plain(panel, f"{first}: {number}", second, "share of right answers")
    _legend(drawing, axes[0][0])
    plots.save(drawing, path)
    return True


def by_state(path: Path, summary: Sequence[Entry], name: str) -> None:
    """The measure ``name`` of every arm by the bytes of its state."""
    drawing, axes = plots.figure(1, 1, 8.2, 4.2)
    panel = axes[0][0]
    for index, entry in enumerate(summary):
        _bars(panel, [entry["state_bytes"]], [entry["measures"][name]], index, entry["arm"])
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.grid(color=plots.FAINT, linewidth=0.5)
    _legend(drawing, panel)
    label = words(groups(summary))[1] if name == "mean" else name
    plots.plain(panel, f"{name}, ± sd over seeds, by state", "state bytes of one sequence (log)", label)
    plots.save(drawing, path)


def tokens_per_step(config: RunConfig) -> float:
    """Tokens of an update. Examples of a task are of several lengths: the mean over an epoch's batches."""
    size = config.train.batch_size
    if config.data.task is None:
        return float(size * config.train.seq_len)
    train = open_task(config.data.task, config.data.options).train
    batches = [group.count // size for group in train]
    return size * sum(n * group.length for n, group in zip(batches, train, strict=True)) / max(1, sum(batches))


def curves(runs: Sequence[Entry], entry: Entry, folder: Path) -> tuple[list[int], list[float]]:
    """Steps, and the training loss of an arm at its chosen setting: the mean over seeds, where all recorded one."""
    chosen = [run for run in runs if run["arm"] == entry["arm"] and run["settings"] == entry["settings"]]
    found = []
    for run in chosen:
        steps, values = plots.series(read_metrics(folder / run["folder"]), "loss")
        smooth = plots.running_mean(values, max(1, len(values) // 25))
        found.append(dict(zip(steps, smooth, strict=True)))
    shared = sorted(set.intersection(*(set(one) for one in found))) if found else []
    return shared, [sum(one[step] for one in found) / len(found) for step in shared]


def by_work(path: Path, folder: Path, content: Mapping[str, Any], configs: Mapping[str, RunConfig]) -> bool:
    """The training loss by step, by tokens and by FLOPs; False without a curve."""
    drawing, axes = plots.figure(1, 3, 14.5, 4.0)
    any_drawn = False
    for index, entry in enumerate(content["summary"]):
        named = next(run["folder"] for run in content["runs"] if run["arm"] == entry["arm"])
        steps, values = curves(content["runs"], entry, folder)
        if named not in configs or not steps:
            continue
        any_drawn, tokens = True, tokens_per_step(configs[named])
        for panel, unit in zip(axes[0], (1.0, tokens, tokens * entry["flops_per_token"]), strict=True):
            x = [step * unit for step in steps]
            panel.plot(x, values, color=look(index)["color"], linewidth=1.4, label=entry["arm"])
    if not any_drawn:
        return False
    works = ("step", "tokens", "FLOPs, without the output head")
    for panel, work in zip(axes[0], works, strict=True):
        panel.grid(axis="y", color=plots.FAINT, linewidth=0.5)
        plots.plain(panel, f"Training loss by {work.split(',')[0]}", work, "loss (nats)")
    _legend(drawing, axes[0][0])
    plots.save(drawing, path)
    return True


def draw(folder: Path, content: Mapping[str, Any], configs: Mapping[str, RunConfig]) -> dict[str, Path]:
    """All figures, by title; none when matplotlib is missing."""
    if not plots.available():
        return {}
    summary, named = content["summary"], content["ablation"].get("axes")
    compared = "mean" if "mean" in summary[0]["measures"] else list(summary[0]["measures"])[-1]
    drawn = {"Measures": folder / "figure.png"}
    by_group(drawn["Measures"], summary)
    if by_number(folder / "numbers.png", summary, named):
        drawn[f"By {named[1] if named else 'second number'}"] = folder / "numbers.png"
    drawn["By state bytes"] = folder / "state.png"
    by_state(drawn["By state bytes"], summary, compared)
    if by_work(folder / "loss.png", folder, content, configs):
        drawn["Loss"] = folder / "loss.png"
    return drawn
