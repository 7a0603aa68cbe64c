"""Equal parameters for two architectures."""

import pytest

from palimpsest.eval.match import match, parameters
from palimpsest.models import build

SHAPE = {"vocab_size": 256, "dim": 32, "layers": 2}
MEMORY = {"model": SHAPE | {"mixer": {"kind": "titans_mag", "heads": 2, "memory": {"heads": 2}}, "ffn_hidden": 32}}
PLAIN = {"model": SHAPE | {"mixer": {"kind": "window_attention", "heads": 2}}}


def test_the_count_is_that_of_the_real_model():
    assert parameters(MEMORY) == sum(p.numel() for p in build(MEMORY).parameters())


def test_the_baseline_has_as_many_within_a_percent():
    target = parameters(MEMORY)
    matched = match(PLAIN, target, multiple=1)
    assert abs(parameters(matched) - target) <= 0.01 * target
    assert matched["model"]["ffn_hidden"] > 96
    widths = [
        parameters({"model": matched["model"] | {"ffn_hidden": matched["model"]["ffn_hidden"] + d}}) for d in (-1, 1)
    ]
    assert all(abs(width - target) >= abs(parameters(matched) - target) for width in widths)


def test_a_target_out_of_reach_is_named():
    with pytest.raises(ValueError, match=r"model\.ffn_hidden = 8 gave .* within 1 % of 100"):
        match(PLAIN, 100)
