"""Ablations: every run is planned once, kills and failures cost no finished run, tables say what the runs say."""

import csv
import fcntl
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from palimpsest.eval import ablate, ablation_run
from palimpsest.eval.sweep import Job, sweep
from palimpsest.models import build
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


def test_killed_in_the_middle_the_same_command_finishes_and_repeats_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    line = ["echoes.yaml", "--jobs", "1", "seeds=[0]"]
    # Forked from here, so that the command's process need not import torch again; its runs are processes of their own.
    first = multiprocessing.get_context("fork").Process(target=ablate.main, args=(line,))
    first.start()
    out = folder / "runs" / "ablations" / "echoes"
    while first.is_alive() and not list(out.glob("*/result.json")):
        time.sleep(0.01)
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    [done] = out.glob("*/result.json")
    began = done.stat().st_mtime_ns
    capsys.readouterr()

    assert ablate.main(line) == 0
    text = capsys.readouterr().out
    assert "2 runs, 1 of them done before" in text and done.stat().st_mtime_ns == began
    content = json.loads((out / "results.json").read_text())
    arms = {entry["arm"]: entry for entry in content["summary"]}
    assert [len(content["runs"]), arms["wide"]["n"], arms["narrow"]["n"]] == [2, 1, 1]
    assert arms["wide"]["measures"]["echo"]["mean"] > 0.9 > arms["narrow"]["measures"]["echo"]["mean"]
    table = (out / "table.md").read_text()
    assert table in text and "| wide" in table and re.search(r"2 runs, \d+ minutes", table)
    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert {row["arm"]: row["seed"] for row in rows} == {"wide": "0", "narrow": "0"}
    assert int(rows[0]["parameters"]) > int(rows[1]["parameters"])
    assert int(rows[0]["state_bytes"]) == 2 * 8 * 16 * 4 + 2 * 4 + 8  # k and v of 8 tokens, counters
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "Training loss" not in page and "http" not in page


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


PARENT = """
import signal, sys
from palimpsest.eval.sweep import Job, sweep
from pathlib import Path
here = Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored, and hands that on
try:
    sweep([Job("long", [sys.executable, str(here / "job.py"), str(here)], here / "no", here / "log")], 1, poll=0.01)
except KeyboardInterrupt:
    raise SystemExit(130)
"""
LONG = """
import signal, sys, time
from pathlib import Path
from palimpsest.eval.sweep import end_with_parent
here = Path(sys.argv[1])
def asked(*_):
    (here / "asked").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, asked)
end_with_parent()
(here / "began").touch()
for _ in range(6000):  # not one long sleep: a signal that comes just before it is acted on only after it
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill", "term", "ctrl-c"])
def test_however_a_sweep_ends_its_jobs_are_asked_to_stop(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "job.py").write_text(LONG)
    line = [sys.executable, "-c", PARENT, str(tmp_path)]
    parent = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(tmp_path / "began")
    parent.send_signal(how)
    _, said = parent.communicate(timeout=30)
    if how == signal.SIGKILL:
        until(tmp_path / "asked")
    else:
        assert parent.returncode == 130 and "the same command goes on from here" in said
    assert (tmp_path / "asked").exists()


def until(path: Path, seconds: float = 30.0) -> None:
    """Wait for a file."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists()


def test_jobs_are_spread_over_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def make(i: int) -> Job:
        tell = f"import os, time; time.sleep(0.1); open({str(tmp_path / str(i))!r}, 'w')"
        command = [sys.executable, "-S", "-c", tell + ".write(os.environ['CUDA_VISIBLE_DEVICES'])"]
        return Job(str(i), command, tmp_path / str(i), tmp_path / "log")

    assert sweep([make(i) for i in range(5)], 4, poll=0.01, devices=("3", "5")) == []
    seen = [(tmp_path / str(i)).read_text() for i in range(5)]
    assert seen[:4] == ["3", "5", "3", "5"] and seen[4] in ("3", "5")
    assert "5 runs, 0 of them done before, 4 at a time on 2 GPUs" in capsys.readouterr().out
    runs = ablate.plan(ablate.Ablation.model_validate(FILE), tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ablate.gpus(runs) == []  # they ask for the CPU
    free = ablate.Ablation.model_validate({**FILE, "arms": {"x": {"train.device": "auto"}}, "baseline": None})
    assert ablate.gpus(ablate.plan(free, tmp_path)) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-7")
    assert ablate.gpus(ablate.plan(free, tmp_path)) == ["4", "GPU-7"]


def test_a_run_that_a_killed_sweep_left_is_waited_for(tmp_path: Path) -> None:
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    waiting = threading.Thread(target=ablation_run.wait_until_free, args=(tmp_path,))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    os.close(held)
    waiting.join(5)
    assert not waiting.is_alive()


def test_every_run_is_planned_once_and_named_by_what_it_trains(tmp_path: Path) -> None:
    found = ablate.Ablation.model_validate({**FILE, "grid": {"train.lr": [1e-2, 2e-2], "model.layers": [1, 2]}})
    runs = ablate.plan(found, tmp_path)
    assert len({run.folder for run in runs}) == len(runs) == 16
    assert [run.folder for run in ablate.plan(found, tmp_path)] == [run.folder for run in runs]
    assert {(run.config.model.dim, run.config.train.lr, run.config.model.layers, run.config.seed) for run in runs} == {
        (dim, rate, layers, seed) for dim in (16, 4) for rate in (1e-2, 2e-2) for layers in (1, 2) for seed in (0, 1)
    }


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_ablations_are_valid_and_their_sizes_agree(path: Path) -> None:
    ablation = ablate.read_ablation(path)
    runs = ablate.plan(ablation, Path("runs"))
    assert len({run.folder for run in runs}) == len(runs) >= 2
    assert ablation.baseline in ablation.arms and ablation.about
    for run in runs:
        ask = ablation.match_of(run.arm)
        assert (ask is None) == (run.match is None)
        if ask is not None:
            assert abs(run.match.off) <= 100 * ask.within <= 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "thin"}, "baseline was 'thin'; it must be one of the arms"),
        ({"seeds": []}, "seeds was empty"),
        ({"arms": {"wide": {"model.dimm": 4}}, "baseline": None}, "arm 'wide': .*dimm"),
        ({"selects": "x"}, "selects"),
        ({"stream": 0}, "stream was 0"),
        ({"match": {"by": "bytes", "to": "wide"}}, "match.by was 'bytes'"),
        ({"match": {"by": "flops", "to": "thin"}}, "arm 'narrow': match.to was 'thin'; it must be a number or one of"),
        ({"arms": {"wide": {"match": 3}}, "baseline": None}, "arm 'wide': match was 3"),
    ],
)
def test_faulty_files(tmp_path: Path, changes: dict, words: str) -> None:
    path = tmp_path / "faulty.yaml"
    path.write_text(yaml.safe_dump(FILE | changes))
    with pytest.raises(ConfigError, match=words):
        ablate.plan(ablate.read_ablation(path), tmp_path)


def test_arms_may_have_bases_of_their_own_and_widths_are_solved_for(tmp_path: Path) -> None:
    """What is solved for is part of the config, and so of the name of the run's folder."""
    plain = {"base": "tiny/transformer", "model.vocab_size": 16, "model.dim": 16, "model.layers": 1}
    content = {
        **FILE,
        "arms": {
            "wide": {},
            "plain": plain | {"model.mixer.heads": 1},
            "state": {"model.mixer.heads": 2, "match": {"by": "state_bytes", "to": 4000, "within": 0.2}},
            "as it is": plain | {"model.mixer.heads": 1, "model.ffn_hidden": 40, "match": None},
        },
        "match": {"by": "parameters", "to": "wide"},
        "baseline": None,
        "seeds": [0],
    }
    found = ablate.Ablation.model_validate(content)
    runs = {run.arm: run for run in ablate.plan(found, tmp_path)}
    assert runs["wide"].match is None and runs["as it is"].match is None
    # `set` gives both 4 heads' base the same MLP as `wide` had: 8/3 of 16, rounded up.
    assert runs["plain"].config.model.ffn_hidden == 64 and runs["plain"].match.off == 0
    # Of attention after 8 tokens: 2 × 8 × dim × 4 bytes, and 16 of counters; heads of even width: steps of 4.
    assert runs["state"].config.model.dim == 64 and runs["state"].match.reached == 4112
    assert [run.folder for run in ablate.plan(found, tmp_path)] == [run.folder for run in runs.values()]
    given = {**content["arms"], "state": {"model.mixer.heads": 2, "model.dim": 64, "match": None}}
    same = ablate.plan(ablate.Ablation.model_validate({**content, "arms": given}), tmp_path)
    assert same[2].folder == runs["state"].folder
    told = ablate.matches(list(runs.values()))
    assert told[1] == "match: state: model.dim = 64: 4,112 state bytes for 4,000 (+2.80 %)" and len(told) == 2
    near = {**content["arms"], "state": {"model.mixer.heads": 2, "match": {"by": "state_bytes", "to": 4000}}}
    with pytest.raises(ConfigError, match=r"arm 'state': model\.dim = 64 gave 4,112 state bytes, the nearest"):
        ablate.plan(ablate.Ablation.model_validate({**content, "arms": near}), tmp_path)
    bases = {"a": {"base": "tiny/transformer"}, "b": {}}
    kinds = ablate.plan(ablate.Ablation(name="t", base="tiny/titans_lmm", arms=bases, seeds=[0]), tmp_path)
    assert [run.config.model.mixer[0].kind for run in kinds] == ["attention", "neural_memory"]
    chain = {**content["arms"], "as it is": {"match": {"to": "plain"}}}
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump({**content, "arms": chain}))
    with pytest.raises(ConfigError, match="arm 'as it is': match.to was 'plain', which is matched itself"):
        ablate.read_ablation(path)


def test_arms_are_varied_over_lists() -> None:
    content = {**FILE, "vary": {"model.dim": [4, 8], "model.layers": [1, 2]}, "baseline": None}
    found = ablate.varied(ablate.Ablation.model_validate(content))
    assert list(found.arms)[:4] == [f"wide, dim {dim}, layers {layers}" for dim in (4, 8) for layers in (1, 2)]
    assert found.arms["narrow, dim 8, layers 2"] == {"model.dim": 8, "model.layers": 2} and len(found.arms) == 8
    alone = ablate.varied(ablate.Ablation.model_validate({**content, "arms": {}, "vary": {"model.dim": [4, 8]}}))
    assert alone.arms == {"dim 4": {"model.dim": 4}, "dim 8": {"model.dim": 8}}


def test_a_plan_is_told_and_a_stream_has_a_result_of_its_own(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert ablate.main(["--plan", "echoes.yaml", "stream=4"]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 runs to do" in said and "wide, train.lr 0.02, seed 1\n" in said
    [run, *_] = ablate.plan(ablate.read_ablation("echoes.yaml"), Path("out"))
    assert ablate.job(run, 4).result == run.folder / "result-stream-4.json"
    assert ablate.job(run, 4).command[-2:] == ["--stream", "4"] and ablate.job(run, None).result.name == "result.json"
    assert ablate.job(run, None).steps == 30 and ablate.job(run, None).metrics == run.folder / "metrics.jsonl"
    assert ablate.main(["echoes.yaml", "--jobs", "0"]) == 2 and "at least one job" in capsys.readouterr().err


def test_all_scores_of_a_task_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy under `test`, the others under `scores`; the stream reaches the task."""
    monkeypatch.syspath_prepend(folder)
    [run, *_] = ablate.plan(ablate.Ablation.model_validate(FILE), folder)
    torch.manual_seed(0)
    model = build(run.config.plain())
    asked = []

    def scores(model: object, group: object, *, stream: int | None) -> dict[str, float]:
        asked.append(stream)
        return {"accuracy": 0.5, "legal": 0.75}

    done = SimpleNamespace(status="complete", loss=1.0)
    monkeypatch.setattr(ablation_run, "train", lambda config: done)
    monkeypatch.setattr(ablation_run, "load", lambda path, device: model)
    monkeypatch.setattr(ablation_run, "scores", scores)
    found = ablation_run.measure(run.config, stream=4)
    assert found["test"] == {"echo": 0.5} and found["scores"] == {"echo": {"legal": 0.75}} and asked == [4]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert found["state_bytes"] == model(tokens).state.bytes
    assert found["flops_per_token"] == model.flops_per_token(8) - 6 * 16 * 16
    done.status = "stopped"
    with pytest.raises(KeyboardInterrupt):
        ablation_run.measure(run.config)


def test_runs_of_another_machine_count_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A row counts for the run whose arm was made alike, whatever else the other ablation held; never for another."""
    monkeypatch.chdir(tmp_path)
    data = {"source": "text", "path": "words.txt"}
    content = {**FILE, "set": {**FILE["set"], "data": data}, "select": "validation_loss"}
    Path("words.txt").write_text("a few words\n")
    Path("both.yaml").write_text(yaml.safe_dump(content))
    row = {
        "settings": {"train.lr": 2.0e-2},
        "folder": "f" * 12,
        "parameters": 10,
        "flops_per_token": 20.0,
        "state_bytes": 30,
        "validation_loss": 2.5,
        "test": {},
        "seconds": 60.0,
        "date": "2026-11-22T00:00:00+00:00",
        "machine": {"cpu": "Another", "device": "cpu"},
        "versions": {"python": "3.11"},
    }
    wide = {key: content[key] for key in ("name", "set", "select")} | {"arms": {"wide": {}}, "seeds": [0]}
    Path("a.json").write_text(json.dumps({"ablation": wide, "runs": [{**row, "arm": "wide", "seed": 0}]}))
    told = ["both.yaml", "--done", "a.json"]
    assert ablate.main([*told, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "a.json: 1 of the 4 runs are done" in said and "3 of 4 runs to do" in said
    assert "wide, train.lr 0.02, seed 0" not in said and "wide, train.lr 0.02, seed 1" in said
    assert ablate.main([*told, "--report", "baseline=null"]) == 0
    assert "1 runs, 1 minutes of one process on Another (cpu), 2026-11-22, python 3.11." in capsys.readouterr().out
    kept = json.loads(Path("runs/ablations/echoes/results.json").read_text())
    assert [(r["arm"], r["seed"], r["validation_loss"]) for r in kept["runs"]] == [("wide", 0, 2.5)]
    for changes in ({"set": {**wide["set"], "seed": 1}}, {"arms": {"wide": {"model.dim": 8}}}, {"seeds": [0]}):
        rows = [{**row, "arm": "wide", "seed": 7 if "seeds" in changes else 0}]
        Path("b.json").write_text(json.dumps({"ablation": {**wide, **changes}, "runs": rows}))
        assert ablate.main(["both.yaml", "--done", "b.json", "--plan"]) == 2
        assert "none of its 1 runs is one of the 4 planned here" in capsys.readouterr().err
    Path("b.json").write_text("{}")
    assert ablate.main(["both.yaml", "--done", "b.json", "--plan"]) == 2
    assert "--done was b.json; it must be an ablation's results.json" in capsys.readouterr().err
