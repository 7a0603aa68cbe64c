"""The command that trains every preset with other chunks and depths."""

import json
from pathlib import Path

import pytest

from palimpsest.eval import stability

SMALL = ["--steps", "2", "--presets", "transformer", "swla", "--chunks", "64", "--depths", "3", "--jobs", "1"]


def entries(*argv: str) -> dict[tuple[str, str], stability.Planned]:
    told = stability.planned(stability.parser().parse_args(["--out", "runs/tried", *argv]))
    return {(name, variant): run for name, variant, run in told}


def test_chunks_and_depths_of_every_memory_are_changed_one_at_a_time() -> None:
    found = entries("--presets", "titans_lmm", "memora_hybrid", "tnt", "lact", "transformer", "swla")
    own = found["titans_lmm", "as it is"].config
    assert (own.train.seq_len, own.train.steps, own.train.max_bad_steps) == (256, 1000, 1)
    assert found["titans_lmm", "chunk 64"].folder == found["titans_lmm", "depth 2"].folder == own.folder
    for name in ("titans_lmm", "memora_hybrid", "tnt"):
        long = found[name, "chunk 256"].config
        assert long.train.seq_len == 384 and long.plain()["model"]["mixer"][0]["memory"]["chunk_size"] == 256
        four, one = (found[name, f"depth {depth}"].config.plain()["model"]["mixer"][0]["memory"] for depth in (4, 1))
        assert (four["network"], four["depth"]) == ("mlp", 4)
        assert (one["network"], one["depth"], one["norm"], one["residual"]) == ("linear", None, True, True)
    local = found["tnt", "depth 4"].config.plain()["model"]["mixer"][0]["local"]
    assert local["depth"] == 4 and local["chunk_size"] == 16
    assert found["tnt", "chunk 64"].config.plain()["model"]["mixer"][0]["local"]["chunk_size"] == 16
    kinds = {name: [variant for other, variant in found if other == name] for name in ("transformer", "lact", "swla")}
    assert kinds["transformer"] == ["as it is"]
    assert entries("--changed", "--presets", "titans_lmm", "lact", "transformer").keys() == {
        *(("titans_lmm", variant) for variant in ("chunk 16", "chunk 256", "depth 1", "depth 3", "depth 4")),
        *(("lact", variant) for variant in ("chunk 16", "chunk 64", "chunk 256")),
    }
    assert kinds["lact"] == kinds["swla"] == ["as it is", "chunk 16", "chunk 64", "chunk 256"]


def test_it_trains_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("a few words, again and again\n" * 2000)
    out = tmp_path / "out"
    told = ["--out", str(out), *SMALL, "--length", "32"]
    for line in ("data.source=text", "data.path=words.txt", "model.layers=1"):
        told += ["--set", line]
    assert stability.main(told) == 0
    said = capfd.readouterr().out
    assert "2 of 2 runs trained 2 updates" in said and "[2/2]" in said
    written = json.loads((out / "stability.json").read_text())
    assert [(row["preset"], row["variant"]) for row in written["rows"]] == [
        ("transformer", "as it is"),
        ("swla", "as it is"),
        ("swla", "chunk 64"),
    ]
    assert all(row["finite"] and row["finished"] and row["steps"] == 2 for row in written["rows"])
    assert all(row["validation_loss"] > 0 and row["largest_grad_norm"] > 0 for row in written["rows"])
    assert stability.main(told) == 0
    assert "2 runs, 2 of them done before" in capfd.readouterr().out
    there = tmp_path / "there"
    told = ["--out", str(there), *told[2:], "--done", str(out / "stability.json")]
    assert stability.main(told) == 0
    assert "0 runs, 0 of them done before" in capfd.readouterr().out
    assert json.loads((there / "stability.json").read_text())["rows"] == written["rows"]
    assert stability.main([*told, "--steps", "3"]) == 2
    assert "whose runs were of {'size': 'tiny', 'steps': 2," in capfd.readouterr().err
    assert stability.main([*told[:-1], "words.txt", "--report"]) == 2
    assert "--done was words.txt; it must be a stability.json" in capfd.readouterr().err


def test_a_run_that_is_not_finite_is_named(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    told = ["--out", str(tmp_path), "--presets", "transformer", "--steps", "3"]
    args = stability.parser().parse_args(told)
    folder = stability.planned(args)[0][2].folder
    folder.mkdir(parents=True)
    lines = [{"step": 1, "loss": 2.0, "grad_norm": 4.0}, {"step": 2, "loss": 2.0, "grad_norm": float("nan")}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert stability.main([*told, "--report"]) == 1
    said = capfd.readouterr().out
    assert "not finite at 2" in said and "0 of 1 runs" in said


def test_bad_input(capsys: pytest.CaptureFixture) -> None:
    assert stability.main(["--presets", "titan", "--report"]) == 2
    assert "--presets had 'titan'; it must be of transformer, atlas" in capsys.readouterr().err
