"""What happened to a run, beside what it learnt: ``events.jsonl`` in its folder, a line of JSON for each event.

    {"time": "2026-01-31T12:00:00.123Z", "kind": "resume", "step": 200, "processes": 8, …}

Kinds: ``start`` and ``resume`` (a process began), ``complete``, ``stopped``, ``failed`` (it ended, and how),
``checkpoint`` (saved), and every WARNING and ERROR line of the training log, by what it says: ``NAMES``, else as
``warning`` or ``error``. A killed process leaves no event: a ``start`` or ``resume`` that follows no end tells of it.

The first process appends each line in one write, so that a kill tears the last one at most. The file only grows: it
tells of every start, where metrics.jsonl is cut back to what the weights contain.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

logger = logging.getLogger("palimpsest.train")

FILE = "events.jsonl"
BEGINNINGS = ("start", "resume")
ENDS = ("complete", "stopped", "failed")
NAMES = {
    "asked to stop": "signal",
    "the update is skipped": "skipped",
    "back to the weights of step": "rollback",
    "is damaged and skipped": "damaged",
    "NOT SAVED": "checkpoint_failed",
}
"""What a line of the log says by which its event is called."""

Event = dict[str, Any]


class _Log(logging.Handler):
    """An open events.jsonl; it is there from the first event on. A disk that refuses is said once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.WARNING)
        self.path, self.file, self.broken = folder / FILE, -1, False

    def write(self, kind: str, step: int | None, detail: dict[str, Any]) -> None:
        """Append an event."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": now, "kind": kind, "step": step, **detail}, default=str) + "\n"
        if self.broken:
            return
        try:
            if self.file < 0:
                torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
                self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                line = "\n" * torn + line  # a line that a kill cut short must not take this one with it
            os.write(self.file, line.encode())
        except OSError as error:
            self.broken = True
            logger.error("EVENTS NOT WRITTEN from here on: %s", error)

    def emit(self, record: logging.LogRecord) -> None:
        """A line of the log, under the step that it names."""
        if not self.broken:
            message = record.getMessage()
            step = re.search(r"\bstep[ -]0*(\d+)", message, re.IGNORECASE)
            kind = next((name for words, name in NAMES.items() if words in message), record.levelname.lower())
            self.write(kind, int(step[1]) if step else None, {"detail": message})

    def close(self) -> None:
        """Close the file."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
        super().close()


_open: _Log | None = None


@contextmanager
def recording(folder: Path, first: bool) -> Iterator[None]:
    """Inside, :func:`note` and the log's warnings go to ``folder``; nothing is written unless this is the ``first``
    process. An exception that leaves a run that had begun is a ``failed`` event."""
    global _open
    if not first:
        yield
        return
    before, log = _open, _Log(folder)
    _open = log
    logger.addHandler(log)
    try:
        yield
    except BaseException as error:
        if log.file >= 0:
            log.write("failed", None, {"detail": f"{type(error).__name__}: {error}"})
        raise
    finally:
        logger.removeHandler(log)
        log.close()
        _open = before


def note(kind: str, step: int | None = None, **detail: Any) -> None:
    """Append an event to the run that is recorded in this process, if one is."""
    if _open is not None:
        _open.write(kind, step, detail)


def read_events(folder: str | Path) -> list[Event]:
    """The events of a run in order, [] without the file. A line that a kill tore is left out."""
    path = Path(folder) / FILE
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # empty, or torn
        if isinstance(event, dict) and "kind" in event and "time" in event:
            found.append(event)
    return found
