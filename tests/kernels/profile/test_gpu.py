"""The command for a machine with a GPU, as far as a CPU can try it: its steps, its verdicts, its page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sample
import torch

from palimpsest.kernels.profile import __main__ as command
from palimpsest.kernels.profile import gpu

ROOT = Path(__file__).resolve().parents[3]


def run_in(folder: Path, root: Path = ROOT, seconds: float = 60.0, **more: object) -> gpu.Run:
    """Where a step runs."""
    return replace(gpu.Run(root, "cpu", folder, seconds, 2), **more)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose conformance suite has two tests of Triton, one of them red, and one of another backend."""
    folder = tmp_path / "checkout" / "tests" / "kernels"
    folder.mkdir(parents=True)
    told = "def test_triton_good(): pass\ndef test_triton_bad(): assert 1 == 2\ndef test_torch(): assert False\n"
    (folder / "test_conformance.py").write_text(told)
    return tmp_path / "checkout"


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["gpu"]) == 1
    assert "make gpu needs a GPU that torch can use" in capsys.readouterr().out


def test_it_needs_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["gpu", "--device", "cpu", "--root", str(tmp_path)]) == 1
    assert "has no tests/kernels/test_conformance.py" in capsys.readouterr().out


def test_steps_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One check of one operation in the interpreter, and one workload; every other step has a test of its own."""
    words = ["--select", "short_conv/triton and autocast", "--bench", "l2_norm", "--processes", "1"]
    words += ["--out", str(tmp_path), "--root", str(ROOT)]
    assert command.main(["gpu", "--device", "cpu", "--steps", "conformance", "bench", *words]) == 0
    assert "conformance: right" in capsys.readouterr().out
    whole = json.loads((tmp_path / "cpu.json").read_text())
    assert whole["steps"]["conformance"] == {"right": True, "tests": 1, "failures": 0, "errors": 0, "failed": []}
    assert {row["workload"] for row in whole["steps"]["bench"]["rows"]} == {"l2_norm/d64"}
    page = (tmp_path / "cpu.md").read_text()
    assert "## bench: right" in page and "× torch" in page


def test_a_red_test_is_named(checkout: Path, tmp_path: Path) -> None:
    found = gpu.conformance(run_in(tmp_path, checkout, processes=1))
    assert not found["right"] and found["failed"] == ["test_triton_bad"]
    assert found["failures"] == 1 and "test_torch" not in str(found)
    words = ["--processes", "1", "--steps", "conformance", "--root", str(checkout), "--out", str(tmp_path / "out")]
    told = command.main(["gpu", "--device", "cpu", *words])
    assert told == 1 and "## conformance: NOT RIGHT" in (tmp_path / "out" / "cpu.md").read_text()


def test_what_runs_out_of_time_is_not_right(tmp_path: Path) -> None:
    run = run_in(tmp_path, seconds=0.3)
    words = ["-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert [status for status, _ in run.finish([run.start(words, "slow")])] == [None]
    found = gpu.conformance(run)
    assert not found["right"] and len(found["failed"]) == 2 and "ran out of time" in found["failed"][0]
    assert not gpu.bench(run)["right"] and not gpu.training(run)["right"] and not gpu.canaries(run)["right"]


def test_training_runs_the_presets(checkout: Path, tmp_path: Path) -> None:
    folder = checkout / "configs" / "tiny"
    folder.mkdir(parents=True)
    text = (ROOT / "configs" / "tiny" / "transformer.yaml").read_text()
    (folder / "one.yaml").write_text(text)
    found = gpu.training(run_in(tmp_path, checkout, training=["--steps", "2", "--batch", "1", "--length", "16"]))
    assert found["right"], found
    assert found["rows"]["tiny/one"]["tokens_per_second"] > 0
    (folder / "two.yaml").write_text(text.replace("layers: 4", "layers: many"))
    found = gpu.training(run_in(tmp_path, checkout, training=["--steps", "2", "--batch", "1", "--length", "16"]))
    assert not found["right"] and "model.layers" in found["output"]


def test_the_page_tells_what_is_wrong() -> None:
    row = {"kernel": "memory_forward", "config": "warps=4", "found": "RMS-relative distance 0.9"}
    steps = {
        "conformance": {"right": False, "tests": 9, "failures": 1, "errors": 1, "failed": ["test_a[x]", "test_b[y]"]},
        "canaries": {"right": False, "configurations": 5, "wrong": [row], "broken": ["memory_forward"]},
        "bench": {"right": False, "rows": [], "output": "CUDA error"},
        "training": {"right": True, "rows": {"tiny/a": {"parameters": 1000, "tokens_per_second": 12345.6, "mfu": 0.25,
                                                        "peak_bytes": 2**30}}},
    }  # fmt: skip
    about = {"gpu": "NVIDIA H200", "cpu": "c", "date": "2026-01-01", "torch": "2", "python": "3"}
    page = gpu.page({"machine": about, "triton": "3.7.1", "seconds": 100.0, "steps": steps})
    told = ("# NVIDIA H200", "9 tests, 2 failed", "- test_b[y]", "1 wrong and not used", "distance 0.9")
    told += ("- broken: memory_forward", "CUDA error", "| tiny/a | 1,000 | 12,346 | 25.0% | 1.00 GiB |")
    assert [words for words in told if words not in page] == []


def test_canaries_run_in_the_interpreter(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["canaries", "--modules", "sample", "--only", "product_bf16", "--json", str(tmp_path / "c.json")]
    assert command.main(words) == 0
    rows = json.loads((tmp_path / "c.json").read_text())["canaries"]
    assert [row["passed"] for row in rows] == [True, True]
    assert "2 of 2 configurations are right" in capsys.readouterr().out
    right = sample.product_canary

    def spoilt(constants: dict, wrong: tuple = sample.CONFIGS[:1]) -> list:
        from palimpsest.kernels import launch

        ((found, wanted),) = right(constants)
        return [(found + (launch._forced["sample_product"] in wrong), wanted)]

    monkeypatch.setattr(sample.PRODUCT, "canary", spoilt)
    assert command.main(words) == 0, "one of two is right"
    assert "WRONG, not used: sample_product [BLOCK=64" in capsys.readouterr().out
    monkeypatch.setattr(sample.PRODUCT, "canary", lambda constants: spoilt(constants, tuple(sample.CONFIGS)))
    assert command.main(words) == 1
    assert "BROKEN sample_product: no configuration is right" in capsys.readouterr().out


def test_canaries_are_dealt_out(tmp_path: Path) -> None:
    """Four plans, three different sets of constants; both parts together have them all."""
    kernels = []
    for part in ("0/2", "1/2"):
        words = ["canaries", "--modules", "sample", "--shard", part, "--json", str(tmp_path / "c.json")]
        command.main(words)
        rows = json.loads((tmp_path / "c.json").read_text())["canaries"]
        kernels += [(row["kernel"], str(row["constants"])) for row in rows]
    assert len(set(kernels)) == 3 and len(kernels) == 2 + 2 + 1
