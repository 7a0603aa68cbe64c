"""Every memory stays finite over a long sequence, forward and backward; how fast it forgets at the start."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from palimpsest.configs import HERE
from palimpsest.models import build
from palimpsest.models.config import ModelConfig, load_config
from palimpsest.models.mixer_config import MemoryConfig
from palimpsest.models.mixers.gates import MemoryGates

LENGTH, CHUNK = 16_384, 256
SIZE = {"vocab_size": 64, "dim": 16, "layers": 1, "ffn_hidden": 0, "init_std": 0.3}


def small(section: Any) -> Any:
    """One head, and long chunks: there are fewer steps to take, each as long as its step size allows."""
    if not isinstance(section, dict):
        return section
    changed = {"heads": 1, "chunk_size": CHUNK}
    return {key: changed.get(key, small(value)) for key, value in section.items()}


PRESETS = {path.stem: load_config(path)["model"]["mixer"] for path in sorted((HERE / "tiny").glob("*.yaml"))}
KINDS = ("neural_memory", "titans_mac", "lact", "tnt")
#: Every memory once: no layers in turn, and of the mixtures one for each rule.
MEMORIES = [
    name
    for name, mixer in PRESETS.items()
    if isinstance(mixer, dict) and (mixer["kind"] in KINDS or name in ("mom_neural", "mamba2", "deltanet"))
]


@pytest.mark.parametrize("name", MEMORIES)
def test_sixteen_thousand_tokens_stay_finite(name: str) -> None:
    """A fresh model of one layer, on tokens without order. Each of muon's steps is as large as the one before, and what
    flows back through a hundred of them grows; other memories' gradients stay of order one."""
    mixer = small(PRESETS[name])
    torch.manual_seed(0)
    model = build({"model": SIZE | {"mixer": mixer}})
    tokens = torch.randint(64, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    logits = model(tokens[:, :-1]).logits
    cross_entropy(logits[0], tokens[0, 1:]).backward()
    assert logits.abs().max() < 20
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert 0.1 < norms.norm() < (1e3 if "muon" in str(mixer) else 3), norms


@pytest.mark.parametrize(
    ("told", "least", "most"),
    [
        ({}, 7_000, 70_000),
        ({"norm": False}, 700, 7_000),
        ({"half_life": [50, 60]}, 50, 60),
        ({"half_life": [50, 60], "gates": "channel"}, 50, 60),
    ],
)
def test_a_memory_halves_in_the_tokens_it_was_told(told: dict, least: float, most: float) -> None:
    memory = MemoryConfig.model_validate({"heads": 64} | told)
    config = ModelConfig.model_validate(SIZE | {"dim": 128, "mixer": {"kind": "neural_memory", "memory": memory}})
    torch.manual_seed(0)
    gates = MemoryGates(config, memory, 64)
    lives = -math.log(2) / gates.activate(torch.zeros(gates.outputs))["log_retain"]
    assert least <= lives.min() * 1.001 and lives.max() <= most * 1.001
    assert lives.max() / lives.min() > 0.8 * most / least


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"half_life": [60, 50]}, "half_life was .60.0, 50.0.; the first number must not exceed the second"),
        ({"half_life": [5, 6], "retention": "norm"}, "it must be null, for nothing decays with retention 'norm'"),
        ({"half_life": [0, 6]}, "half_life.0"),
    ],
)
def test_faulty_half_lives(told: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MemoryConfig.model_validate(told)
