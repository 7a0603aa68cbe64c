"""What a sweep shows: where every run stands, in a terminal and elsewhere."""

import io
import json
from pathlib import Path

import pytest

from palimpsest.eval import live
from palimpsest.eval.sweep import Job


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def write(path: Path, *records: dict, rest: str = "") -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records) + rest)


def test_the_last_whole_record_with_a_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert live.last_record(path) is None and live.last_record(None) is None
    write(path, {"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, rest='{"step": 3, "lo')
    assert live.last_record(path) == {"step": 1, "loss": 3.0}
    write(path, *({"step": step, "loss": 0.5, "more": "x" * 500} for step in range(100)))
    assert live.last_record(path)["step"] == 99


def test_lines_are_drawn_anew_in_a_terminal_and_plain_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "metrics.jsonl", [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "60")
    run, other = (
        Job("one", [], path, path, path, 50),
        Job("a name longer than the terminal is wide " * 3, [], path, path),
    )
    screen, text = Terminal(), io.StringIO()
    tables = [live.Table(screen, every=0.0), live.Table(text, every=0.0)]
    for step, after in ((10, 0.0), (20, 30.0)):
        write(path, {"step": step, "loss": 1.5})
        now[0] += after
        for table in tables:
            table.show([run, other], "1 of 3 done")
    plain = text.getvalue()
    assert "one: step 10/50  loss 1.5000  ETA –\n" in plain  # nothing to go by yet
    assert "one: step 20/50  loss 1.5000  ETA 1:30\n" in plain  # ten steps in 30 s, 30 to go
    assert f"{other.label}: starting" in plain and "\x1b" not in plain and plain.count("1 of 3 done\n") == 2
    shown = screen.getvalue()
    assert shown.count("\x1b[3A\x1b[J") == 1 and max(map(len, shown.splitlines())) <= 59 + len("\x1b[3A\x1b[J")
    tables[0].say("stays")
    assert screen.getvalue().endswith("\x1b[3A\x1b[Jstays\n")
    tables[0].clear()
    assert screen.getvalue().endswith("stays\n")  # nothing of the table is left to take away
    table = live.Table(text, every=60.0)
    table.show([run], "too early")
    assert "too early" not in text.getvalue()
    assert [live.clock(x) for x in (9.6, 61, 3725)] == ["0:10", "1:01", "1:02:05"]
