"""Ablations: every run is planned once, kills and failures cost no finished run, tables say what the runs say."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from palimpsest.eval import ablate, ablation_report
from palimpsest.eval.sweep import Job, sweep
from palimpsest.models.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ECHO = """
import torch
from palimpsest.train.examples import Group, Task

def task(step=1):
    def read(start, some):
        tokens = (torch.arange(8) * 5 + torch.arange(start, start + some)[:, None] * 3) % 16
        labels = (tokens + step) % 16
        labels[:, ::2] = -100
        return tokens, labels
    groups = [Group("echo", 8, 48, read)]
    return Task("echo", 16, groups, groups, groups)
"""
FILE = {
    "name": "echoes",
    "set": {
        "model": {"vocab_size": 16, "dim": 16, "layers": 1, "mixer": {"kind": "attention", "heads": 1}},
        "data": {"source": "task", "task": "own_tasks.echo"},
        "train": {"steps": 30, "batch_size": 16, "seq_len": 8, "warmup_steps": 0, "tensorboard": False, "device": "cpu",
                  "threads": 1, "validate_every": 30},
    },
    "arms": {"wide": {}, "narrow": {"model.dim": 4}},
    "grid": {"train.lr": [2.0e-2]},
    "seeds": [0, 1],
    "select": "validation_accuracy",
    "baseline": "narrow",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an ablation's file and a task of its own."""
    (tmp_path / "own_tasks").mkdir()
    (tmp_path / "own_tasks" / "echo.py").write_text(ECHO)
    (tmp_path / "echoes.yaml").write_text(yaml.safe_dump(FILE, sort_keys=False))
    return tmp_path


def command(folder: Path, *more: str) -> subprocess.Popen:
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "palimpsest.eval.ablate", "echoes.yaml", "--jobs", "2", *more]
    return subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_stopped_in_the_middle_the_same_command_finishes_and_repeats_nothing(folder: Path) -> None:
    first = command(folder)
    out = folder / "runs" / "ablations" / "echoes"
    while first.poll() is None and not list(out.glob("*/result.json")):
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    text, _ = first.communicate(timeout=120)
    assert first.returncode == 130 and "4 runs, 0 of them done before" in text, text
    done = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    assert 1 <= len(done) < 4

    second = command(folder)
    text, _ = second.communicate(timeout=240)
    assert second.returncode == 0 and f"4 runs, {len(done)} of them done before" in text, text
    assert {path: path.stat().st_mtime_ns for path in done} == done

    content = json.loads((out / "results.json").read_text())
    arms = {entry["arm"]: entry for entry in content["summary"]}
    assert [len(content["runs"]), arms["wide"]["n"], arms["narrow"]["n"]] == [4, 2, 2]
    assert arms["wide"]["measures"]["echo"]["mean"] > 0.9 > arms["narrow"]["measures"]["echo"]["mean"]
    assert arms["narrow"]["measures"]["mean"]["p"] is None and 0 <= arms["wide"]["measures"]["mean"]["p"] <= 1
    table = (out / "table.md").read_text()
    assert table in text and "| wide" in table and re.search(r"4 runs, \d+ minutes", table)
    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert sorted((row["arm"], row["seed"]) for row in rows) == [(a, s) for a in ("narrow", "wide") for s in "01"]
    assert {row["arm"]: int(row["parameters"]) for row in rows}["wide"] > int(rows[-1]["parameters"])


def test_a_failing_job_is_started_twice_and_named_and_the_others_go_on(tmp_path: Path, capsys) -> None:
    count = tmp_path / "count"
    fails = f"open({str(count)!r}, 'a').write('x'); print('no luck'); raise SystemExit(3)"
    works = f"open({str(tmp_path / 'made')!r}, 'w').write('x')"
    again = (
        f"import os; p = {str(tmp_path / 'tried')!r}; ok = os.path.exists(p); open(p, 'w').close(); 1 / ok; " + works
    )
    jobs = [
        Job("never", [sys.executable, "-c", fails], tmp_path / "nothing", tmp_path / "never.log"),
        Job("works", [sys.executable, "-c", works], tmp_path / "made", tmp_path / "works.log"),
        Job("late", [sys.executable, "-c", again], tmp_path / "made", tmp_path / "late.log"),
    ]
    failed = sweep(jobs, 2, poll=0.01)
    assert [text.split(":")[0] for text in failed] == ["never"] and "exit code 3: no luck" in failed[0]
    assert count.read_text() == "xx" and (tmp_path / "tried").exists()
    said = capsys.readouterr().out
    assert "late: exit code 1, started again" in said and re.search(r"\[2/3\] \w+: ", said)
    assert sweep(jobs[1:], 2) == [] and "2 runs, 2 of them done before" in capsys.readouterr().out


def test_every_run_is_planned_once_and_named_by_what_it_trains(tmp_path: Path) -> None:
    found = ablate.Ablation.model_validate({**FILE, "grid": {"train.lr": [1e-2, 2e-2], "model.layers": [1, 2]}})
    runs = ablate.plan(found, tmp_path)
    assert len({run.folder for run in runs}) == len(runs) == 16
    assert [run.folder for run in ablate.plan(found, tmp_path)] == [run.folder for run in runs]
    assert {(run.config.model.dim, run.config.train.lr, run.config.model.layers, run.config.seed) for run in runs} == {
        (dim, rate, layers, seed) for dim in (16, 4) for rate in (1e-2, 2e-2) for layers in (1, 2) for seed in (0, 1)
    }


def test_shipped_ablations_are_valid() -> None:
    files = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
    assert files
    for path in files:
        runs = ablate.plan(ablate.read_ablation(path), Path("runs"))
        assert len({run.folder for run in runs}) == len(runs) >= 2, path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "thin"}, "baseline was 'thin'; it must be one of the arms"),
        ({"seeds": []}, "seeds was empty"),
        ({"arms": {"wide": {"model.dimm": 4}}, "baseline": None}, "arm 'wide': .*dimm"),
        ({"selects": "x"}, "selects"),
    ],
)
def test_faulty_files(tmp_path: Path, changes: dict, words: str) -> None:
    path = tmp_path / "faulty.yaml"
    path.write_text(yaml.safe_dump(FILE | changes))
    with pytest.raises(ConfigError, match=words):
        ablate.plan(ablate.read_ablation(path), tmp_path)


def row(arm: str, rate: float, seed: int, checked: float, tested: float) -> dict:
    sizes = {"parameters": 1, "flops_per_token": 2, "state_bytes": 3, "seconds": 4.0}
    tests = {"a": tested, "b": tested + 0.2}
    return {"arm": arm, "settings": {"lr": rate}, "seed": seed, "validation_accuracy": checked, "test": tests, **sizes}


def test_settings_are_chosen_on_validation_and_not_on_the_test() -> None:
    rows = [row("x", 1.0, seed, 0.9, 0.3 + 0.1 * seed) for seed in (0, 1)]
    rows += [row("x", 2.0, seed, 0.8, 0.7) for seed in (0, 1)]  # better on the test, worse on validation
    rows += [row("y", 1.0, seed, 0.5, 0.1 + 0.2 * seed) for seed in (0, 1)]
    x, y = ablation_report.summarise(rows, "validation_accuracy", True, "y")
    assert x["settings"] == {"lr": 1.0} and x["measures"]["a"]["mean"] == pytest.approx(0.35)
    assert x["measures"]["mean"]["mean"] == pytest.approx(0.45) and x["measures"]["a"]["sd"] == pytest.approx(
        0.0707, abs=1e-4
    )
    # Differences 0.2 and 0.1: t = 3 with one degree of freedom, p = 1 − 2 atan(3) / π.
    assert x["measures"]["a"]["p"] == pytest.approx(0.20483, abs=1e-5) and y["measures"]["a"]["p"] is None
    about = {"machine": {"cpu": "c", "device": "cpu"}, "versions": {}, "date": "2"}
    text = [{**x, **about, "test": {}, "validation_loss": 2.0} for x in rows[:2]]
    content = {"ablation": {"name": "t", "about": "", "select": "validation_loss", "baseline": None}, "runs": text}
    content["summary"] = ablation_report.summarise(text, "validation_loss", False, None)
    assert "reported on the same held-out text" in ablation_report.markdown(content)
    assert ablation_report.summarise(rows, "validation_accuracy", False, None)[0]["settings"] == {"lr": 2.0}
    with pytest.raises(ValueError, match="select was 'loss'; the runs have validation_accuracy"):
        ablation_report.summarise(rows, "loss", True, None)
