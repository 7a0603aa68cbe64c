"""The step law's numbers, by hand, and what its command says of a config."""

import pytest

from palimpsest.models import build
from palimpsest.train import step_law
from palimpsest.train.config import read_config

# dim 64, no gates: 2 layers of 4 · 64² (attention) + 3 · 64 · 192 (MLP) + 2 norms, and a last norm.
MODEL = {"vocab_size": 100, "dim": 64, "layers": 2, "ffn_hidden": 192, "mixer": {"kind": "attention", "heads": 2}}
COUNTED = 2 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64
TRAIN = {"steps": 1000, "batch_size": 8, "seq_len": 128, "lr": 1e-3}


def test_the_law_by_hand():
    """10⁹ parameters and 10¹¹ tokens: 1.79 · 10^(−6.417 + 3.377), 0.58 · 10^6.281."""
    assert step_law.learning_rate(1e9, 1e11) == pytest.approx(1.79 * 10**-3.04, rel=1e-12)
    assert step_law.learning_rate(1e9, 1e11) == pytest.approx(1.6325e-3, rel=1e-4)
    assert step_law.batch_tokens(1e11) == pytest.approx(0.58 * 10**6.281, rel=1e-12)
    assert step_law.batch_tokens(1e11) == pytest.approx(1.1077e6, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_neither_embedding_nor_head_is_counted(tied):
    config = read_config({"name": "x", "model": MODEL | {"tie_embeddings": tied}, "train": TRAIN})
    advice = step_law.advise(config)
    whole = sum(p.numel() for p in build(config.plain()).parameters())
    assert advice.parameters == COUNTED == whole - (1 if tied else 2) * 100 * 64
    assert advice.tokens == 1000 * 8 * 128 and advice.own_batch == 8 * 128
    assert advice.lr == pytest.approx(1.79 * COUNTED**-0.713 * 1_024_000**0.307)
    assert advice.batch == pytest.approx(0.58 * 1_024_000**0.571)
    assert advice.beyond == ["N = 1.07e+05 (fitted: 2.1e+08 to 1.08e+09)", "D = 1.02e+06 (fitted: 4e+09 to 1e+11)"]


def test_inside_of_what_it_was_fitted_on_it_says_nothing_of_that():
    inside = step_law.Advice(5 * 10**8, 5 * 10**10, 1e-3, 5e5, 2e-3, 10**6, 1000, "adamw")
    assert inside.beyond == []
    assert "0.5" not in inside.text() and "config 0.002, 2 of the law's" in inside.text()
    assert "train.batch_size=500 train.steps=100000" in inside.text() and "extrapolation" not in inside.text()


def test_the_command(capsys):
    assert step_law.main(["tiny/titans_mag", "train.optimizer=muon", "train.lr=1.0"]) == 0
    printed = capsys.readouterr().out
    assert "D  4,096,000 tokens" in printed and "an extrapolation: N = 7.95e+05" in printed
    assert "config 1, 84" in printed and "the law is AdamW's; this config has train.optimizer muon" in printed
    assert step_law.main(["tiny/titans_mag", "train.lr=0"]) == 2
    assert "error: train.lr was 0" in capsys.readouterr().err
