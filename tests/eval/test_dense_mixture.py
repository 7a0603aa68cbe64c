"""The mixture of memories against itself computed densely: the same function, and no timing of anything else."""

import json

import pytest
import torch

from palimpsest.eval.peers import dense_mixture
from palimpsest.models.config import ModelConfig, validate
from palimpsest.models.mixers import make_mixer

SMALL = ["--dim", "16", "--heads", "2", "--memories", "3", "--seq-len", "40", "--rounds", "1", "--threads", "1"]


@pytest.mark.parametrize("rule", dense_mixture.RULES)
def test_both_compute_the_same(rule: str) -> None:
    torch.manual_seed(0)
    mixer = {"kind": "mixture", "rule": rule, "heads": 2, "memories": 4, "conv": 0, "chunk_size": 7}
    config = validate(ModelConfig, {"vocab_size": 8, "dim": 12, "layers": 1, "mixer": mixer, "init_std": 0.4})
    layer = make_mixer(config, config.mixer_of(0)).double()
    x = torch.randn(2, 23, 12, dtype=torch.float64)
    for a, b in zip(dense_mixture.step(layer, x, False), dense_mixture.step(layer, x, True), strict=True):
        assert (a - b).abs().max() <= 1e-11 * max(1.0, b.abs().max().item())


def test_the_command(tmp_path, capsys) -> None:
    assert dense_mixture.main([*SMALL, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ratio"] > 0 and set(found["tokens_per_second"]) == {"routed", "dense"}
    assert "times as fast as dense (3 memories, top 2, and a shared one)" in capsys.readouterr().out


def test_nothing_is_timed_that_differs(tmp_path, capsys, monkeypatch) -> None:
    right = dense_mixture.dense
    monkeypatch.setattr(dense_mixture, "dense", lambda layer, x: right(layer, x) * 1.01)
    assert dense_mixture.main([*SMALL, "--out", str(tmp_path / "found.json")]) == 2
    assert "they must agree to 0.0001" in capsys.readouterr().err and not (tmp_path / "found.json").exists()


def test_what_cannot_be_masked_is_refused() -> None:
    config = validate(ModelConfig, {"vocab_size": 8, "dim": 8, "layers": 1, "mixer": {"kind": "mixture", "heads": 2}})
    with pytest.raises(ValueError, match="layer had a convolution"):
        dense_mixture.dense(make_mixer(config, config.mixer_of(0)), torch.zeros(1, 3, 8))
