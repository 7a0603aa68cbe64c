"""What a sweep shows while it runs: a line for every run that is at work, drawn anew in a terminal, plain elsewhere."""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

TAIL = 16_384  # bytes of metrics.jsonl that hold the last records


class Running(Protocol):
    """A run at work: its name, where its metrics are (None: it has none), and how many steps it takes."""

    label: str
    metrics: Path | None
    steps: int


def last_record(path: Path | None) -> dict[str, Any] | None:
    """The last whole record of a metrics.jsonl that has a step and a loss; None without one."""
    if path is None or not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # empty; cut short; or where the tail begins, in the middle of a line
            continue
        if record.get("step") is not None and record.get("loss") is not None:
            return record
    return None


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Table:
    """The lines. ``every``: seconds between two drawings, None: half a second in a terminal, a minute elsewhere."""

    def __init__(self, stream: TextIO | None = None, every: float | None = None):
        self.stream = stream or sys.stdout
        self.tty = self.stream.isatty()
        self.every = (0.5 if self.tty else 60.0) if every is None else every
        self.drawn, self.lines = time.monotonic(), 0
        self.first: dict[str, tuple[int, float]] = {}  # of each run: the first step seen, and when

    def line(self, run: Running) -> str:
        """Where a run stands. The time left goes by the steps seen since this table first saw it: a resumed run has
        others behind it."""
        record = last_record(run.metrics)
        if record is None:
            return f"{run.label}: starting"
        step, now = int(record["step"]), time.monotonic()
        begin, since = self.first.setdefault(run.label, (step, now))
        left = "–" if step == begin else clock((now - since) / (step - begin) * (run.steps - step))
        return f"{run.label}: step {step}/{run.steps}  loss {record['loss']:.4f}  ETA {left}"

    def show(self, running: Sequence[Running], head: str) -> None:
        """Draw, when it is time: ``head``, then every run."""
        now = time.monotonic()
        if now - self.drawn < self.every:
            return
        self.drawn = now
        lines = [head, *(f"  {self.line(run)}" for run in running)]
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            lines = [line[:width] for line in lines]
            self.clear()
            self.lines = len(lines)
        self._put("".join(f"{line}\n" for line in lines))

    def say(self, text: str) -> None:
        """A line that stays, above the table."""
        self.clear()
        self._put(f"{text}\n")

    def clear(self) -> None:
        """Take the table off the terminal."""
        if self.lines:
            self._put(f"\x1b[{self.lines}A\x1b[J")
            self.lines = 0

    def _put(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
