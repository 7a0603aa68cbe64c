"""The peer's script, with a stand-in for the peer that has its interface."""

import json

import pytest
import torch

from palimpsest.eval.peers import nanogpt

STAND_IN = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.embed = nn.Embedding(config.vocab_size, d)
        self.mix = nn.ModuleList(nn.Linear(d, 12 * d, bias=config.bias) for _ in range(config.n_layer))
        self.head = nn.Linear(d, config.vocab_size, bias=False)

    def get_num_params(self):  # without positions, of which this one has none
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        for mix in self.mix:
            x = x + mix(x)[..., : x.shape[-1]]
        logits = self.head(x)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def peer(tmp_path):
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "model.py").write_text(STAND_IN)
    return tmp_path / "peer"


def test_speeds_are_paired_and_recorded(peer, tmp_path, capsys):
    out = tmp_path / "speed.json"
    small = ["--batch-size", "1", "--seq-len", "8", "--rounds", "3", "--updates", "1", "--threads", "1"]
    assert nanogpt.main(["--peer", str(peer), "--models", "transformer", *small, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    speed = record["speed"]
    assert list(speed) == ["nanogpt", "transformer"] and {"machine", "versions", "date", "command"} <= set(record)
    assert abs(speed["transformer"]["parameters"] / speed["nanogpt"]["parameters"] - 1) <= 0.02
    assert speed["nanogpt"]["ratio_to_nanogpt"] == 1.0 and speed["transformer"]["ratio_to_transformer"] == 1.0
    pairs = [a / b for a, b in zip(speed["nanogpt"]["seconds"], speed["transformer"]["seconds"], strict=True)]
    # The seconds are rounded to 1e-4 of some 1e-2.
    assert speed["transformer"]["ratio_to_nanogpt"] == pytest.approx(sorted(pairs)[1], rel=0.05)
    assert "ratio to nanogpt" in capsys.readouterr().out


def test_the_race_trains_both_on_the_same_batches(peer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("".join(f"{i} and {j} make {i + j}. " for j in range(300)))
    (tmp_path / "race.yaml").write_text(
        f"""
model: {{vocab_size: 256, dim: 16, layers: 1, mixer: {{kind: attention, heads: 2}}}}
data: {{source: text, path: "{tmp_path}/*.txt", validation_fraction: 0.2}}
train: {{steps: 30, warmup_steps: 2, batch_size: 2, seq_len: 32, lr: 1e-2}}
"""
    )
    rates, real = [], nanogpt.set_learning_rate
    monkeypatch.setattr(
        nanogpt, "set_learning_rate", lambda optimizer, rate: (rates.append(rate), real(optimizer, rate))
    )
    out = tmp_path / "race.json"
    arguments = ["--peer", str(peer), "--race", "race.yaml", "--peer-lr", "1e-2", "1e-9", "--threads", "1"]
    assert nanogpt.main([*arguments, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    losses = record["held_out_loss"]
    assert list(losses) == ["race", "nanogpt at 0.01", "nanogpt at 1e-09"] and record["tokens"] == 30 * 2 * 32
    # Warm-up over two steps to each one's peak, then down to a tenth of it.
    assert rates[:3] == pytest.approx([5e-3, 5e-3, 5e-10]) and rates[-3:] == pytest.approx([1e-3, 1e-3, 1e-10])
    # A rate of 1e-9 learns nothing; both others end well below its loss.
    assert max(losses["race"], losses["nanogpt at 0.01"]) < losses["nanogpt at 1e-09"] - 0.5


def test_the_peer_gets_as_many_parameters(peer):
    config = nanogpt.read_config("configs/quickstart.yaml")
    width = nanogpt.peer_width(peer, config, 1_000_000)
    made = nanogpt.load_peer(peer, 512, 4, width, 256)
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(1_000_000, rel=0.05)


def test_a_missing_peer_says_how_to_get_it(tmp_path, capsys):
    assert nanogpt.main(["--peer", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "has no model.py" in said and "git clone https://github.com/karpathy/nanoGPT" in said


def test_an_unknown_model_is_named(peer, capsys):
    assert nanogpt.main(["--peer", str(peer), "--models", "titans_mab", "--threads", "1"]) == 2
    assert "models had 'titans_mab'" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def threads():
    """The script sets the number of threads of its process; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
