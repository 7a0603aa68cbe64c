"""A run on one page: ``python -m palimpsest.train.report RUN [RUN …] [--against RUN] [--out page.html] [--text]``.

Its curves, its throughput and where it stalled, what happened to it (starts, kills, skipped steps, checkpoints), its
configuration and where that differs from another run's. The page is one HTML file that loads nothing; ``--text`` prints
the same for a terminal. Runs are only read, and may be still going on.
"""

import argparse
import fcntl
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..models.config import ConfigError, load_yaml
from .checkpoint import differences
from .events import BEGINNINGS, ENDS, Event, read_events
from .metrics import Record, read_metrics
from .report_curves import COLOURS, Panel, panels, points_of, smooth
from .report_page import page

STALL = 0.5
"""A record whose tokens per second are less than this share of the run's median is a stall."""
WORTH_A_MARK = {"resume": "#888888", "skipped": "#c0392b", "rollback": "#c0392b"}
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Told:
    """What a run folder holds: ``running``: a process holds it at this moment."""

    name: str
    folder: Path
    config: dict[str, Any]
    records: list[Record]
    events: list[Event]
    running: bool


def read_run(folder: str | Path, name: str | None = None) -> Told:
    """A run folder, whole or still growing.

    Raises:
        ConfigError: when there is none.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"run was {str(folder)!r}; it must be a run's folder, with its config.yaml")
    return Told(
        name or path.name, path, load_yaml(path / "config.yaml"), read_metrics(path), read_events(path), _held(path)
    )


def _held(folder: Path) -> bool:
    """Whether a process trains in the folder: it holds a lock on it, see ``launch.hold``."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def sessions(run: Told) -> list[tuple[Event, Event, str]]:
    """(first event, last event, how it ended) of each process's work: complete, stopped, failed, killed (it says
    nothing, and another one followed), running, or unknown (the last one says nothing, and none is at work)."""
    found: list[list[Event]] = []
    for event in run.events:
        if event["kind"] in BEGINNINGS or not found:
            found.append([])
        found[-1].append(event)
    told = []
    for number, events in enumerate(found):
        last = events[-1]
        if last["kind"] in ENDS:
            how = last["kind"]
        elif number < len(found) - 1:
            how = "killed"
        else:
            how = "running" if run.running else "unknown"
        told.append((events[0], last, how))
    return told


def throughput(run: Told) -> dict[str, Any]:
    """Of the records' tokens per second: ``median``, ``stalls`` (step, share of the median), ``seconds`` of all updates
    that the records tell of, with checkpoints left out as they are there; all None or [] without records."""
    speeds = points_of(run.records, "tokens_per_second")
    if not speeds:
        return {"median": None, "stalls": [], "seconds": None}
    median = statistics.median(y for _, y in speeds)
    settings = run.config.get("train", {})
    per_step = settings.get("batch_size", 0) * settings.get("seq_len", 0)
    steps = [step for step, _ in speeds]
    seconds = sum(
        per_step * (step - before) / speed
        for before, step, speed in zip([0, *steps], steps, (y for _, y in speeds), strict=False)
    )
    return {
        "median": median,
        "stalls": [(step, y / median) for step, y in speeds if y < STALL * median],
        "seconds": seconds,
    }


def summary(run: Told) -> dict[str, Any]:
    """A run in numbers, by what they are called in the report."""
    settings, speed = run.config.get("train", {}), throughput(run)
    last = run.records[-1] if run.records else {}
    validation = points_of(run.records, "validation_loss")
    best = min(validation, key=lambda p: p[1], default=None)
    counts = {kind: sum(event["kind"] == kind for event in run.events) for kind in {e["kind"] for e in run.events}}
    ends = [how for _, _, how in sessions(run)]
    stalls = speed["stalls"]
    slowest = min(stalls, key=lambda stall: stall[1], default=None)
    return {
        "run": run.name,
        "state": ends[-1] if ends else ("running" if run.running else "unknown"),
        "steps": f"{last.get('step', 0):,} of {settings.get('steps', 0):,}",
        "loss, last": last.get("loss"),
        "validation loss, last": validation[-1][1] if validation else None,
        "validation loss, best": None if best is None else f"{best[1]:.5g} at step {best[0]:,}",
        "tokens per second, median": None if speed["median"] is None else f"{speed['median']:,.0f}",
        f"stalls below {STALL:.0%} of it": f"{len(stalls)}"
        + (f", worst {slowest[1]:.0%} at step {slowest[0]:,}" if slowest else ""),
        "hours in updates": None if speed["seconds"] is None else f"{speed['seconds'] / 3600:,.3f}",
        "hours from first to last event": _hours(run.events),
        "starts": len(ends) or None,
        "killed": ends.count("killed"),
        "steps skipped": counts.get("skipped", 0),
        "rollbacks": counts.get("rollback", 0),
        "checkpoints saved": counts.get("checkpoint", 0),
        "checkpoints failed or damaged": counts.get("checkpoint_failed", 0) + counts.get("damaged", 0),
    }


def _hours(events: Sequence[Event]) -> str | None:
    if not events:
        return None
    first, last = (datetime.fromisoformat(e["time"].replace("Z", "+00:00")) for e in (events[0], events[-1]))
    return f"{(last - first).total_seconds() / 3600:,.3f}"


def shown_events(run: Told) -> list[dict[str, str]]:
    """The events as a table shows them: checkpoints in a row are one line, and a start that follows no end says so."""
    lines: list[dict[str, str]] = []
    before: Event | None = None
    for event in run.events:
        kind, step = event["kind"], event["step"]
        if kind in BEGINNINGS and before is not None and before["kind"] not in ENDS:
            what = "no end was recorded: killed, or the machine failed"
            lines.append({"time": before["time"][:19], "step": "", "kind": "killed", "detail": what})
        rest = {key: value for key, value in event.items() if key not in ("time", "kind", "step", "detail")}
        words = [str(event["detail"])] if "detail" in event else []
        words += [f"{key} {value}" for key, value in rest.items()]
        line = {
            "time": event["time"][:19],
            "step": "" if step is None else f"{step:,}",
            "kind": kind,
            "detail": ", ".join(words),
        }
        if kind == "checkpoint" and lines and lines[-1]["kind"] == kind and before is not None:
            first = lines[-1]["step"].split(" … ")[0]
            lines[-1] = line | {"step": f"{first} … {line['step']}"}
        else:
            lines.append(line)
        before = event
    return lines


def drawn(runs: Sequence[Told]) -> list[Panel]:
    """The panels of all runs, with marks at what happened."""
    made = panels([(run.name, run.records) for run in runs])
    marks = [
        (event["step"], colour if len(runs) == 1 else COLOURS[number % len(COLOURS)], f"{event['kind']}: {run.name}")
        for number, run in enumerate(runs)
        for event in run.events
        if (colour := WORTH_A_MARK.get(event["kind"])) and event["step"] is not None
    ]
    for panel in made:
        panel.marks = marks
    return made


def compared(runs: Sequence[Told]) -> dict[str, list[str]]:
    """Of each run but the first, the lines ``key: first -> its own`` of its configuration; names and places are not
    compared."""
    return {
        run.name: [
            line for line in differences(runs[0].config, run.config) if line.split(": ")[0] not in ("name", "train.out")
        ]
        for run in runs[1:]
    }


def page_of(runs: Sequence[Told]) -> str:
    """The page of runs."""
    title = "Training: " + ", ".join(run.name for run in runs)
    events = {run.name: shown_events(run) for run in runs}
    configs = {run.name: run.config for run in runs}
    return page(title, [summary(run) for run in runs], drawn(runs), events, configs, compared(runs))


def text(runs: Sequence[Told]) -> str:
    """The same for a terminal."""
    told = [summary(run) for run in runs]
    rows = [[key, *("–" if one[key] is None else _cell(one[key]) for one in told)] for key in told[0]]
    parts = [_columns(rows), "\n".join(_curves(runs))]
    for name, lines in compared(runs).items():
        parts.append("\n".join([f"{name} differs from {runs[0].name}", *(f"  {x}" for x in lines or ["in nothing"])]))
    for run in runs:
        events = [[event[key] for key in ("time", "step", "kind", "detail")] for event in shown_events(run)]
        parts.append(f"events of {run.name}\n" + (_columns(events) if events else "  none recorded"))
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)) for row in rows]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _curves(runs: Sequence[Told]) -> Iterator[str]:
    """A line for each curve: where it begins and ends, and its course."""
    found = [(panel.title, line.label, line.points) for panel in drawn(runs) for line in panel.lines]
    rows = [[title, label, f"{p[0][1]:.4g}", f"{p[-1][1]:.4g}", sparkline(p)] for title, label, p in found]
    yield _columns([["curve", "", "first", "last", "course"], *rows])


def sparkline(points: Sequence[tuple[int, float]], width: int = 40) -> str:
    """The course of points in ``width`` bars or less, from the least to the greatest."""
    ys = [y for _, y in smooth(list(points))]
    count = min(width, len(ys))
    means = [statistics.fmean(ys[i * len(ys) // count : (i + 1) * len(ys) // count]) for i in range(count)]
    low, high = min(means), max(means)
    return "".join(BARS[math.floor((y - low) / ((high - low) or 1.0) * (len(BARS) - 1) + 0.5)] for y in means)


def _named(folders: Sequence[str]) -> list[str]:
    """The folders' own names, or as much of the paths as tells them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"runs were {list(folders)}; each must be given once")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or print the text; 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="palimpsest-report", description="A run on one page: curves, events, config.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; several are drawn together")
    parser.add_argument("--against", metavar="RUN", help="one more, that the configurations are compared with")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (report.html in the first run's folder)")
    parser.add_argument("--text", action="store_true", help="print it for a terminal and write nothing")
    options = parser.parse_intermixed_args(arguments)
    folders = [*([options.against] if options.against else []), *options.runs]
    try:
        if options.text and options.out is not None:
            raise ConfigError(f"--out was {str(options.out)!r}; it must be left out with --text, which writes nothing")
        runs = [read_run(folder, name) for folder, name in zip(folders, _named(folders), strict=True)]
        if options.text:
            print(text(runs))
            return 0
        out = options.out or Path(options.runs[0]) / "report.html"
        if not out.parent.is_dir():
            raise ConfigError(f"--out was {str(out)!r}; its folder must exist")
        out.write_text(page_of(runs), encoding="utf-8")
    except (ValueError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
