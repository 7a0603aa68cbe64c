"""Training speed of presets: the reader of presets, the figures, and that torch and pydantic are enough for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palimpsest.models.config import load_yaml
from palimpsest.train import throughput

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted(path for path in ROOT.glob("configs/**/*.yaml") if path.parent.name != "ablations")
TINY = ROOT / "configs" / "tiny" / "titans_mag.yaml"

ALONE = """
import sys
from importlib.machinery import ModuleSpec

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"yaml", "safetensors", "numpy", "tensorboard", "matplotlib", "tokenizers"}:
            return ModuleSpec(name, self)

    def create_module(self, spec):
        raise ModuleNotFoundError(f"No module named {spec.name!r}", name=spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Block())
from palimpsest.kernels.profile import __main__
from palimpsest.train.throughput import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_read_as_yaml_reads_them(path: Path) -> None:
    assert throughput.read_preset(path) == load_yaml(path)


def test_what_is_no_preset_is_refused(tmp_path: Path) -> None:
    for line in ("- a", "words"):
        (tmp_path / "a.yaml").write_text(f"a: 1\n{line}\n")
        with pytest.raises(ValueError, match=f"line 2 was '{line}'"):
            throughput.read_preset(tmp_path / "a.yaml")


def test_it_needs_torch_and_pydantic_alone(tmp_path: Path) -> None:
    """With every other package out of sight, as on a machine that has a GPU and little else."""
    words = [str(TINY), "--device", "cpu", "--steps", "2", "--batch", "1", "--length", "16", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words, str(tmp_path / "t.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "t.json").read_text())["tiny/titans_mag"]
    assert row["tokens_per_second"] > 0 and row["parameters"] == 828_224 and row["peak_bytes"] is None
    assert "tokens/s" in done.stdout


def test_speed_is_tokens_over_the_median_step(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(x for start in range(100) for x in (10.0 * start, 10.0 * start + (9.0 if start < 3 else 2.0)))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: None)
    content = throughput.read_preset(TINY)
    row = throughput.measure(content, torch.device("cpu"), 4, 2, 8)
    assert row["tokens_per_second"] == 2 * 8 / 2.0 and row["spread"] == 0 and row["mfu"] is None


def test_a_loss_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    true = throughput.adamw
    monkeypatch.setattr(throughput, "adamw", lambda model, **given: true(model, **{**given, "lr": 1e30}))
    with pytest.raises(RuntimeError, match="it must be finite"):
        throughput.measure(throughput.read_preset(TINY), torch.device("cpu"), 2, 1, 8)
