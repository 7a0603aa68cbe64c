"""The commands that measure the loop: they count right, and notice what they are for."""

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from palimpsest.train import equivalence, loop, overhead, stress
from palimpsest.train.processes import Life


def life(code, *steps, after=None):
    lines = [f"INFO going on after step {after}, from x"] if after is not None else []
    lines += [f"step {step}/40  loss 1.0  1k tok/s  ETA 0:00" for step in steps]
    return Life([code], "\n".join(lines) + "\n", 1.0)


def test_steps_that_a_later_life_repeats_are_counted():
    tally = stress.Tally("alone")
    furthest = stress._account(tally, life(-9, 1, 2, 3, 4, 5, 6, 7), 0, 0)
    furthest = stress._account(tally, life(-9), 5, furthest)  # killed before it did anything
    furthest = stress._account(tally, life(-9, 6, 7, 8, after=5), 5, furthest)
    assert stress._account(tally, life(0, 6, 7, 8, 9, after=5), 5, furthest) == 9
    assert (tally.kills, tally.done, tally.repeated, tally.most, tally.faults) == (3, 14, 5, 3, [])


@pytest.mark.parametrize(
    ("ended", "before", "message"),
    [
        (life(-9, 6, after=5), 10, "went on from step 5, with a whole checkpoint of step 10"),
        (life(-9, 1), 10, "began with update 1, with a whole checkpoint of step 10"),
        (life(1), 0, "ended by itself with [1]"),
    ],
)
def test_a_lost_checkpoint_or_a_crash_is_a_fault(ended, before, message):
    tally = stress.Tally("alone")
    stress._account(tally, ended, before, 12)
    assert any(message in fault for fault in tally.faults)


def test_the_stress_command_kills_and_compares(tmp_path):
    command = [sys.executable, "-m", "palimpsest.train.stress", "--kills", "2", "--processes", "1"]
    command += ["--out", str(tmp_path / "stress"), "--updates", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith("| yes |")]
    assert len(rows) == 2 and "2 kills, a checkpoint every 5 of 12 updates" in done.stdout


def test_differences_of_runs_are_relative(tmp_path):
    for name, loss, value in (("one", 2.0, 1.0), ("other", 2.2, 1.1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss}}}\n')
        save_file({"w": np.full(4, value, dtype=np.float32)}, tmp_path / name / "model.safetensors")
    found = equivalence.difference(tmp_path / "other", tmp_path / "one")
    assert found == pytest.approx((0.1, 0.1), rel=1e-6)


def test_the_loop_and_bare_updates_are_timed_in_turns(monkeypatch):
    """By a clock that only bare updates and the loop's optimizer move: 3 s and 4 s."""
    clock = [0.0]
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(overhead.time, "process_time", lambda: 2 * clock[0] ** 0.5)
    monkeypatch.setattr(loop, "peak_flops", lambda *_: None)  # which has a clock of its own to read
    bare = overhead.bare_update

    def slow_bare(*arguments):
        bare(*arguments)
        clock[0] += 3.0

    update = overhead.Run.update

    def slow_update(self, *arguments):
        clock[0] += 4.0
        return update(self, *arguments)

    monkeypatch.setattr(overhead, "bare_update", slow_bare)
    monkeypatch.setattr(overhead.Run, "update", slow_update)
    row = overhead.measure("tiny/transformer", steps=4, batch=1, length=16)
    assert row.pop("processor") == pytest.approx(0.75, abs=0.05), "of a processor that is the slower the later"
    assert row == {"bare": 3.0, "loop": 4.0, "ratio": 0.75, "low": 0.75, "high": 0.75}
