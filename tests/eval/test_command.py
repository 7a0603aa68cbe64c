"""``python -m palimpsest.eval RUN``: what it writes, that it repeats itself, and what it says to bad input."""

import builtins
import importlib.util
import json
import logging
import shutil

import pytest
import torch
import yaml

from palimpsest.eval import __main__ as command
from palimpsest.eval import choose, harness, plots, report
from palimpsest.eval.tasks import mqar
from palimpsest.kernels import backend
from palimpsest.models import MemoryLM
from palimpsest.train.examples import scores

SMALL = ("--factor", "8", "--tokens", "2048", "--examples", "1", "--batch", "2", "--device", "cpu")
ONE_DEPTH = ("--set", "passkey.depths=[0.5]")


@pytest.fixture(scope="module")
def results(run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert command.main([str(run_folder), *SMALL, *ONE_DEPTH, "--out", str(out)]) == 0
    return out


def test_it_writes_a_record_a_table_and_a_figure(results, run):
    record = json.loads((results / "eval.json").read_text())
    table = (results / "eval.md").read_text()
    assert (results / "eval.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert record["schema"] == 1 and set(record["tasks"]) == {"perplexity", "passkey"}
    assert record["model"] == {"parameters": sum(p.numel() for p in run.model.parameters()), "context": 64}
    assert {"cpu", "cores", "threads", "device", "system"} == set(record["machine"])
    assert {"python", "torch", "numpy", "palimpsest"} <= set(record["versions"])
    assert record["date"] and record["command"] and record["seconds"] >= 0
    perplexity = record["tasks"]["perplexity"]
    assert (perplexity["length"], perplexity["rows"]) == (512, 4)
    assert perplexity["buckets"][-1]["stop"] == 512
    assert {cell["length"] for cell in record["tasks"]["passkey"]["cells"]} == {256, 512}
    for bucket in perplexity["buckets"]:
        assert f"{bucket['start']:,}–{bucket['stop'] - 1:,}" in table and f"{bucket['bits_per_byte']:.3f}" in table


def test_two_runs_give_the_same_numbers(results, run_folder, tmp_path):
    assert command.main([str(run_folder), *SMALL, *ONE_DEPTH, "--out", str(tmp_path)]) == 0
    first, second = (json.loads((out / "eval.json").read_text())["tasks"] for out in (results, tmp_path))
    assert first == second


def test_one_task_alone(run_folder, tmp_path, capsys):
    assert command.main([str(run_folder), *SMALL, "--tasks", "perplexity", "--out", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "eval.json").read_text())["tasks"]) == ["perplexity"]
    said = capsys.readouterr().out
    assert "within the training context" in said and "beyond it" in said and "Passkey" not in said


def test_rows_are_real_held_out_text_and_do_not_overlap(run):
    rows, split = harness.held_out(run, 512, 4096)
    assert rows.shape == (8, 513)
    whole = split.read(0, split.tokens)
    starts = [i * (split.tokens // 8) for i in range(8)]
    for row, start in zip(rows, starts, strict=True):
        assert row.tolist() == whole[start : start + 513].tolist()
    assert split.tokens // 8 >= 513


def test_text_shorter_than_the_length_is_read_to_its_end_and_said(make_run, tmp_path, caplog):
    opened = harness.open_run(make_run(tmp_path / "short", sentences=120, documents=4), torch.device("cpu"))
    with caplog.at_level(logging.INFO, logger="palimpsest.eval"):
        rows, split = harness.held_out(opened, 64 * 100, 10**6)
    assert rows.shape == (1, split.tokens) and 65 < split.tokens < 6400
    assert f"held-out text has {split.tokens:,} tokens: positions end there and not at 6,400" in caplog.text


def test_text_shorter_than_one_context_is_refused(make_run, tmp_path, capsys):
    folder = make_run(tmp_path / "few", sentences=4, documents=4)
    assert command.main([str(folder), "--tasks", "perplexity"]) == 2
    said = capsys.readouterr().err
    assert "held-out text was" in said and "training context of 64" in said


def test_bad_input_is_named(run_folder, make_run, tmp_path, capsys):
    bare = make_run(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    damaged = make_run(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x00" * 100)
    cases = {
        (tmp_path / "gone",): "gone' not found",
        (bare,): "has no model.safetensors, which is written when training ends",
        (damaged,): "does not fit config.json",
        (
            run_folder,
            "--tasks",
            "perplexty",
        ): "did you mean 'perplexity'?",
        (run_folder, "--tasks", "mqra"): "did you mean 'mqar'?",
        (run_folder, "--tasks", "mqar"): "task 'mqar' needs a vocabulary of 8192; the model's has 256",
        (run_folder, "--tasks", "niah", "--set", "niah.filer=x"): "niah.filer is not known; niah takes lengths, depths",
        (run_folder, "--tasks", "passkey", "--set", "passkey.examples=many"): "option passkey.examples was 'many'",
        (run_folder, "--tasks", "mqar", "--set", "mqar.vocab=16"): "data.options had the key 'vocab'; mqar takes train",
        (run_folder, "--tasks", "niah", "--set", "mqar.seed=1"): "it must be TASK.OPTION=VALUE of a task that is run",
        (run_folder, "--tokenizer", "gone.json"): "gone.json",
        (run_folder, "--tasks", ""): "task was ''",
        (run_folder, "--factor", "0"): "factor was 0; it must be at least 1",
        (run_folder, "--tokens", "-3"): "tokens was -3",
        (run_folder, "--threads", "0"): "--threads was 0",
    }
    if not torch.cuda.is_available():
        cases[run_folder, "--device", "cuda"] = "device was 'cuda'"
    for arguments, message in cases.items():
        assert command.main([str(argument) for argument in arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert message in said and said.count("error: ") == 1, (arguments, said)


def test_a_missing_run_names_those_that_are_there(run_folder, capsys):
    assert command.main([str(run_folder.parent / "tinny")]) == 2
    assert "has tiny" in capsys.readouterr().err


def test_without_matplotlib_the_rest_is_written_and_one_line_says_so(run_folder, tmp_path, monkeypatch, caplog):
    find, real = importlib.util.find_spec, builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(backend, "_said", set())
    with caplog.at_level(logging.INFO, logger="palimpsest.kernels"):
        for _ in range(2):
            assert command.main([str(run_folder), *SMALL, "--tasks", "perplexity", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "eval.md"]
    assert caplog.text.count("PNG figures are not drawn") == 1 and "palimpsest[plot]" in caplog.text


def test_tables_align():
    lines = report.table(["a", "bb"], [["long name", "1"], ["x", "12345"]]).split("\n")
    assert len({len(line) for line in lines}) == 1 and lines[1].endswith("-:|")


def test_series_takes_the_later_record_of_a_step_written_twice():
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": None}]
    assert plots.series(records, "loss") == ([1, 2], [3.0, 1.0])


def test_running_mean_looks_back_only():
    assert plots.running_mean([4.0, 2.0, 0.0, 6.0], 2) == [4.0, 3.0, 1.0, 3.0]


def test_the_run_folder_needs_no_corpus_for_passkeys(make_run, tmp_path):
    folder = make_run(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved-text")
    assert command.main([str(folder), *SMALL, *ONE_DEPTH, "--tasks", "passkey"]) == 0


ALL = "niah,facts,retention"
GIVEN = ("niah.lengths=[512]", "facts.lengths=[512]", "facts.supports=[2]", "niah.depths=[1.0]")


def test_text_tasks_are_chosen_by_name_with_their_options(run_folder, tmp_path, capsys):
    given = [argument for item in (*GIVEN, "retention.gaps=[0, 32]") for argument in ("--set", item)]
    assert command.main([str(run_folder), *SMALL, "--tasks", ALL, *given, "--out", str(tmp_path)]) == 0
    tasks = json.loads((tmp_path / "eval.json").read_text())["tasks"]
    assert list(tasks) == ALL.split(",") and [item["gap"] for item in tasks["retention"]["gaps"]] == [0, 32]
    assert [(cell["length"], cell["supports"]) for cell in tasks["facts"]["cells"]] == [(512, 2)]
    assert [cell["depth"] for cell in tasks["niah"]["variants"][0]["cells"]] == [1.0]
    assert (tmp_path / "eval.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    for words in (
        "### S-NIAH-1, filler: own sentences",
        "official scores of bAbI or BABILong do not compare",
        "unread",
    ):
        assert words in said


def test_a_run_trained_on_a_task_is_asked_its_own(make_run, tmp_path, capsys, monkeypatch):
    options = {name: [[16, 2, 5]] for name in ("train", "validation")} | {"test": [[16, 2, 7], [24, 4, 3]]}
    folder, out = make_run(tmp_path / "pairs", documents=1), tmp_path / "out"
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    task = {"source": "task", "path": None, "task": "mqar", "options": options | {"vocabulary": 64}}
    path.write_text(yaml.safe_dump(config | {"data": config["data"] | task}))
    forward, widest = MemoryLM.forward, []
    with monkeypatch.context() as spying:
        spying.setattr(MemoryLM, "forward", lambda m, x, **o: (widest.append(x.shape[1]), forward(m, x, **o))[1])
        asked = []
        spying.setattr(choose, "scores", lambda m, g, **o: (asked.append((g.name, o["stream"])), scores(m, g, **o))[1])
        assert command.main([str(folder), "--out", str(out), "--set", "mqar.seed=5", "--set", "mqar.stream=8"]) == 0
    assert max(widest) == 8 and asked == [("16x2", 8), ("24x4", 8)]
    result = json.loads((out / "eval.json").read_text())["tasks"]["mqar"]
    assert result["options"] == options | {"vocabulary": 64, "seed": 5} and result["stream"] == 8
    opened, group = harness.open_run(folder, torch.device("cpu")), mqar.task(**result["options"]).test[1]
    entry = result["groups"][1]
    assert (entry["name"], entry["length"], entry["examples"]) == ("24x4", 24, 3)
    assert entry["accuracy"] == scores(opened.model, group)["accuracy"]
    assert entry["state_bytes"] == opened.model(group.read(0, 1)[0]).state.bytes
    assert "state bytes" in capsys.readouterr().out and (out / "eval.png").exists()
    assert command.main([str(folder), "--tasks", "passkey"]) == 2
    assert "was trained on the task 'mqar', whose tokens are no text" in capsys.readouterr().err
    short = ("--set", "passkey.lengths=[320]", "--set", "passkey.depths=[0]", "--examples", "1", "--out", str(out))
    assert command.main([str(folder), "--tasks", "passkey", "--tokenizer", "bytes", *short]) == 0


def test_every_task_has_a_name_and_a_report():
    assert set(report.TEXTS) == set(choose.TEXT) and {"mqar", "ballet", "needle"} <= set(choose.names())
    assert "haystack" not in choose.names()
    assert choose.check_tasks(["my.module", "passkey", "passkey"]) == ["my.module", "passkey"]
