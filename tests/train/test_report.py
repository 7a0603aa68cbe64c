"""Events and the report of a run: a run that was killed, stopped, and went on tells so; the page loads nothing."""

import dataclasses
import html.parser
import json
import os
import re
import signal
import xml.etree.ElementTree as ElementTree

import pytest
from training import STEPS, Runner

from palimpsest.train import events as events_module
from palimpsest.train import read_config, read_metrics, train
from palimpsest.train.events import note, read_events, recording
from palimpsest.train.report import (
    compared,
    main,
    page_of,
    read_run,
    sessions,
    shown_events,
    sparkline,
    summary,
    text,
    throughput,
)
from palimpsest.train.report_curves import Axes, Line, Panel, labels, panels, smooth, svg, thin, ticks

LOADS = re.compile(
    r"""(?:src|href|srcset|action|data)\s*=\s*["']?(?!data:)|@import|url\(|https?://|fetch\(|XMLHttp""", re.I
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Balance(html.parser.HTMLParser):
    """Whether every tag that opens is closed, in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(content)
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")


@pytest.fixture(scope="module")
def eventful(run: Runner, corpus, tmp_path_factory):
    """A run that was killed, then asked to stop, then went on to its end; and its config."""
    import yaml
    from training import MODEL, TRAIN

    folder = tmp_path_factory.mktemp("eventful")
    path = folder / "tiny.yaml"
    content = {"name": "tiny", "seed": 3, "model": MODEL, "data": corpus, "train": TRAIN | {"out": str(folder / "run")}}
    path.write_text(yaml.safe_dump(content))
    slow = "import palimpsest.train.loop as l, time; f = l.Run.update; "
    slow += "l.Run.update = lambda *a: (time.sleep(0.05), f(*a))[1]"
    assert run(path, signal=signal.SIGKILL, when="step 5/16", prelude=slow).codes == [-signal.SIGKILL]
    assert run(path, signal=signal.SIGTERM, when="step 8/16", prelude=slow).codes == [0]
    result = run(path)
    assert result.codes == [0], result.output
    return folder / "run"


def kinds(folder):
    return [event["kind"] for event in read_events(folder)]


def test_events_tell_the_story(eventful):
    told = kinds(eventful)
    assert told[0] == "start" and told[-1] == "complete"
    resumed = told.index("resume")
    assert "stopped" not in told[:resumed] and "failed" not in told
    assert told.index("signal") < told.index("stopped")
    assert told.count("resume") == 2
    found = read_events(eventful)
    assert next(e for e in found if e["kind"] == "resume")["step"] == 3  # the checkpoint before the kill at 5
    assert next(e for e in found if e["kind"] == "signal")["detail"].startswith("asked to stop")
    assert [e["step"] for e in found if e["kind"] == "complete"] == [STEPS]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", e["time"]) for e in found)
    assert [how for _, _, how in sessions(read_run(eventful))] == ["killed", "stopped", "complete"]


def test_a_report_shows_the_restarts(eventful, capsys):
    assert main([str(eventful), "--text"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"killed +1\n", said) and re.search(r"starts +3\n", said)
    assert "no end was recorded: killed, or the machine failed" in said
    assert re.search(r"resume +processes 1, device cpu", said)
    assert re.search(r"steps +16 of 16\n", said)
    assert not (eventful / "report.html").exists()
    run = read_run(eventful)
    found = summary(run)
    assert found["state"] == "complete" and found["loss, last"] == read_metrics(eventful)[-1]["loss"]
    saved = [e for e in run.events if e["kind"] == "checkpoint"]
    assert found["checkpoints saved"] == len(saved) >= 6


def test_the_page_is_whole_and_loads_nothing(eventful, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main([str(eventful), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    content = out.read_text(encoding="utf-8")
    assert Balance(content).wrong == []
    assert LOADS.findall(re.sub(r'data-told="[^"]*"', "", content).replace("runs/data", "")) == []
    drawings = re.findall(r"<svg.*?</svg>", content, re.DOTALL)
    titles = re.findall(r"<figcaption><b>(.*?)</b>", content)
    assert titles[:4] == ["loss, nats per token", "validation, bits per byte", "learning rate", "gradient norm"]
    assert "tokens per second" in titles and len(drawings) == len(titles)
    for drawing in drawings:
        assert ElementTree.fromstring(drawing).tag == "svg"
    assert drawings[0].count('class="mark"') == 2 and "resume: run" in drawings[0]
    assert len(re.findall(r"<td>resume</td>", content)) == 2 and "<td>killed</td>" in content
    assert "schedule: cosine" in content


def test_words_of_a_run_are_no_markup(eventful):
    """Names, messages and values are anybody's."""
    bad = "<script>alert(1)</script>"
    event = {"time": "2026-01-01T00:00:00.000Z", "kind": bad, "step": 0, "detail": bad}
    runs = []
    for name in (bad, f"{bad}2"):
        run = read_run(eventful, name=name)
        config = run.config | {"seed": name, bad: bad}
        records = [record | {f"layer.0/{bad}": 1.0} for record in run.records]
        runs.append(dataclasses.replace(run, events=[event], config=config, records=records))
    for shown in (runs[:1], runs):
        content = page_of(shown)
        assert "<script>alert" not in content and Balance(content).wrong == []


def test_configurations_are_compared(content, tmp_path):
    ways = {"a": {"train.lr": 0.01}, "b": {"train.lr": 0.02, "model.dim": 32}}
    for name, changed in ways.items():
        folder = tmp_path / name
        folder.mkdir()
        whole = read_config(content, changed | {"train.out": str(folder), "name": name})
        (folder / "config.yaml").write_text(whole.to_yaml())
    runs = [read_run(tmp_path / name) for name in ways]
    assert compared(runs) == {"b": ["model.dim: 16 -> 32", "train.lr: 0.01 -> 0.02"]}
    assert "train.lr: 0.01 -> 0.02" in text(runs)
    shown = page_of(runs)  # without a record so far
    assert "<td>train.lr</td><td>0.01</td><td>0.02</td>" in shown and "No line is in metrics.jsonl yet" in shown


def test_a_run_that_goes_on_is_reported(eventful, tmp_path):
    """Its folder is locked, and its last lines are torn."""
    import fcntl
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(eventful, folder)
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (folder / "events.jsonl").write_text("".join(lines[:2]) + lines[2][:10])
    metrics = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(metrics[:4]) + metrics[4][:7])
    assert summary(read_run(folder))["state"] == "unknown"
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        run = read_run(folder)
        assert summary(run)["state"] == "running" and len(run.events) == 2 and len(run.records) == 4
        assert "running" in page_of([run])
    finally:
        os.close(handle)
    # Read by the report, the folder is free again.
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_torn_line_takes_no_other_with_it(tmp_path):
    (tmp_path / "events.jsonl").write_text(
        '{"time": "2026-01-01T00:00:00.000Z", "kind": "start", "step": 0}\n{"time": "20'
    )
    with recording(tmp_path, first=True):
        note("resume", 7)
    assert [(e["kind"], e["step"]) for e in read_events(tmp_path)] == [("start", 0), ("resume", 7)]


def test_only_the_first_process_of_a_run_records(tmp_path):
    with recording(tmp_path, first=False):
        note("start", 0)
    note("start", 1)
    assert read_events(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_the_logs_warnings_are_events(tmp_path):
    with recording(tmp_path, first=True):
        events_module.logger.info("step 1: nothing")
        events_module.logger.warning("step %d: odd", 12)
        events_module.logger.error("CHECKPOINT OF STEP 3 NOT SAVED: full")
    events_module.logger.warning("later")
    found = [(e["kind"], e["step"], e["detail"]) for e in read_events(tmp_path)]
    assert found == [("warning", 12, "step 12: odd"), ("checkpoint_failed", 3, "CHECKPOINT OF STEP 3 NOT SAVED: full")]


def test_failures_and_skipped_steps_are_events(content, tmp_path, monkeypatch):
    from palimpsest.train import TrainingDiverged
    from palimpsest.train.loop import Run

    true = Run.backward
    monkeypatch.setattr(Run, "backward", lambda self, *a: true(self, *a) * (float("nan") if self.step > 5 else 1.0))
    with pytest.raises(TrainingDiverged):
        train(read_config(content, {"train.max_bad_steps": 2}))
    found = read_events(tmp_path / "run")
    assert [(e["kind"], e["step"]) for e in found if e["kind"] == "skipped"] == [("skipped", 6), ("skipped", 7)]
    assert found[-1]["kind"] == "failed" and "TrainingDiverged: step 7" in found[-1]["detail"]
    assert summary(read_run(tmp_path / "run"))["steps skipped"] == 2


def test_a_disk_that_refuses_is_said_once(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    with recording(tmp_path, first=True):
        monkeypatch.setattr(events_module.os, "write", full)
        note("start", 0)
        note("checkpoint", 1)
    assert caplog.text.count("EVENTS NOT WRITTEN") == 1


def test_checkpoints_in_a_row_are_one_line(eventful):
    run = read_run(eventful)
    event = {"time": "2026-01-01T00:00:00.000Z", "kind": "checkpoint"}
    steps = [event | {"step": step} for step in (200, 400, 600)]
    run = dataclasses.replace(run, events=[event | {"kind": "start", "step": 0}, *steps])
    assert [(e["kind"], e["step"]) for e in shown_events(run)] == [("start", "0"), ("checkpoint", "200 … 600")]


def test_throughput_is_of_the_records(eventful):
    run = read_run(eventful)
    speeds = [100.0, 100.0, 40.0, 110.0]
    records = [{"step": 5 * (i + 1), "tokens_per_second": speed} for i, speed in enumerate(speeds)]
    found = throughput(dataclasses.replace(run, records=records))
    assert found["median"] == 100.0 and found["stalls"] == [(15, 0.4)]
    assert found["seconds"] == pytest.approx(sum(5 * 4 * 16 / speed for speed in speeds))  # 4 sequences of 16 tokens


def test_several_runs_share_panels():
    runs = [
        (name, [{"step": s, "loss": 3.0 - i, "layer.0/gate": 1.0, "layer.1/gate": 3.0} for s in (1, 2)])
        for i, name in enumerate("ab")
    ]
    told = {panel.title: panel for panel in panels(runs)}
    assert [line.label for line in told["loss, nats per token"].lines] == ["a: loss", "b: loss"]
    assert told["gate"].lines[0].points == [(1, 2.0), (2, 2.0)]  # the mean of the layers
    alone = {panel.title: panel for panel in panels(runs[:1])}
    assert [line.label for line in alone["gate"].lines] == ["layer.0", "layer.1"]


def test_lines_are_thinned_by_their_extremes():
    points = [(i, float(i == 777)) for i in range(5000)]
    kept = thin(points, 100)
    assert len(kept) <= 100 and (777, 1.0) in kept
    flat = smooth([(i, float(i % 2)) for i in range(400)])
    assert max(y for _, y in flat[20:-20]) - min(y for _, y in flat[20:-20]) < 0.1


def test_axes():
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10] and ticks(3.0, 3.0) == [3.0]
    wide = Axes(Panel("norm", [Line("a", "#000", [(1, 0.001), (2, 10.0)])]))
    assert wide.log and wide.y(10.0) < wide.y(0.001)
    for points in ([(5, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -1.0), (9, -1.0)]):  # one point, or no spread at all
        ElementTree.fromstring(svg(Panel("a", [Line("a", "#000", points)])))
    assert labels([0.99991, 0.99992]) == ["0.99991", "0.99992"] and labels([2500.0, 5000.0]) == ["2,500", "5,000"]
    assert labels([0.0, 1e-4, 12.5]) == ["0", "0.0001", "12.5"] and labels([20000.0]) == ["20,000"]
    assert sparkline([(i, float(i)) for i in range(8)]) == "▁▂▃▄▅▆▇█" and sparkline([(0, 1.0)]) == "▁"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "run was 'nowhere'; it must be a run's folder, with its config.yaml"),
        (["{run}", "{run}"], "each must be given once"),
        (["{run}", "--out", "nowhere/page.html"], "--out was 'nowhere/page.html'; its folder must exist"),
        (["{run}", "--text", "--out", "a.html"], "--out was 'a.html'; it must be left out with --text"),
    ],
)
def test_what_is_refused(eventful, words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(run=eventful) for word in words]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_damaged_metrics_are_named(eventful, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((eventful / "config.yaml").read_text())
    (tmp_path / "metrics.jsonl").write_text("{broken\n" + json.dumps({"step": 1}) + "\n")
    assert main([str(tmp_path), "--text"]) == 2
    assert "line 1 of" in capsys.readouterr().err
