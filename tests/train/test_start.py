"""Training in stages: starting from another run's weights, and the memory over segments alone."""

import logging
import math

import pytest
import torch
from safetensors.torch import save_file
from training import MODEL, learnt

from palimpsest.models import build, load
from palimpsest.models.config import ConfigError
from palimpsest.train import read_config, train
from palimpsest.train.data import prepare
from palimpsest.train.start import start_from

HMT = {"segment": 4, "sensory": 1, "memories": 3, "bptt": 2}
SHORT = {"train.steps": 4, "train.warmup_steps": 1, "train.validate_every": 2, "train.checkpoint_every": 2}


def read(content, folder, **hmt):
    """The config of the tests with memory over segments, a few steps, in a folder of its own."""
    changed = {"model.hmt": HMT | hmt} if hmt.pop("wrapped", True) else {}
    return read_config(content, SHORT | changed | {"train.out": str(folder)})


def weights(folder):
    return load(folder).state_dict()


def test_stages(content, tmp_path, caplog):
    """A plain model, then without recall, then with it, then with a frozen backbone."""
    caplog.set_level(logging.INFO, "palimpsest.train")
    first = read(content, tmp_path / "plain", wrapped=False)
    train(first)
    stages = {"plain": weights(tmp_path / "plain")}
    for name, before, options in (
        ("none", "plain", {}),
        ("previous", "none", {}),
        ("frozen", "previous", {"train.freeze_backbone": True}),
    ):
        config = read(content, tmp_path / name, recall="none" if name == "none" else "previous")
        options = options | {"train.init": str(tmp_path / before), "train.lr": 1e-6}
        train(read_config(config.plain(), options))
        stages[name] = weights(tmp_path / name)
    fresh = {"hmt.empty", "hmt.gain", "hmt.topic", "hmt.recall.query.weight", "hmt.recall.key.weight"}
    assert stages["previous"].keys() - stages["plain"].keys() == fresh
    assert stages["none"].keys() - stages["plain"].keys() == {"hmt.empty", "hmt.gain"}
    for a, b in (("plain", "none"), ("none", "previous"), ("previous", "frozen")):  # a rate of 1e-6 moves them little
        for name, value in stages[a].items():
            assert torch.allclose(stages[b][name], value, rtol=0, atol=1e-4), name
    moved = {name for name, x in stages["frozen"].items() if not torch.equal(x, stages["previous"][name])}
    assert moved == fresh
    assert f"starting from {tmp_path / 'none'}: " in caplog.text
    assert "hmt.topic is not there: it keeps its fresh weights" in caplog.text
    assert "the backbone is frozen: 560 parameters are trained" in caplog.text


def test_a_frozen_run_goes_on(content, tmp_path):
    config = read_config(read(content, tmp_path / "whole").plain(), {"train.freeze_backbone": True})
    train(config)
    part = read_config(config.plain(), {"train.out": str(tmp_path / "part")})
    train(read_config(part.plain(), {"train.resume": str(tmp_path / "whole" / "checkpoints" / "step-000002")}))
    assert learnt(tmp_path / "part") == learnt(tmp_path / "whole")[-len(learnt(tmp_path / "part")) :]
    a, b = weights(tmp_path / "part"), weights(tmp_path / "whole")
    assert all(torch.equal(x, b[name]) for name, x in a.items())


def test_what_does_not_fit_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "palimpsest.train")
    torch.manual_seed(0)
    build({"model": MODEL}).save(tmp_path / "run")
    other = build({"model": MODEL | {"vocab_size": 300, "layers": 1, "tie_embeddings": False}})
    before = other.embed.weight.detach().clone()
    start_from(other, tmp_path / "run")
    assert torch.equal(other.embed.weight, before)
    assert "embed.weight is (256, 16) there and (300, 16) here: it keeps its fresh weights" in caplog.text
    assert (
        "head.weight is not there" in caplog.text and "blocks.1.norm_mixer.weight is not in this model" in caplog.text
    )
    held = load(tmp_path / "run").state_dict()
    assert torch.equal(other.state_dict()["blocks.0.mixer.out.weight"], held["blocks.0.mixer.out.weight"])


def test_what_is_refused(content, tmp_path):
    with pytest.raises(ConfigError, match="train.freeze_backbone was true; it must be false for a model without"):
        train(read_config(content, {"train.freeze_backbone": True}))
    with pytest.raises(ConfigError, match="train.init was 'nowhere'; it must be the folder of a finished run"):
        train(read_config(content, {"train.init": "nowhere", "train.out": str(tmp_path / "a")}))
    with pytest.raises(ConfigError, match="train.seq_len was 16; it must be more than a segment"):
        read(content, tmp_path, segment=16)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="is damaged"):
        train(read_config(content, {"train.init": str(tmp_path / "b"), "train.out": str(tmp_path / "c")}))
    save_file({"embed.weight": torch.zeros(3, 2)}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(ConfigError, match="none of its weights fits this model"):
        start_from(build({"model": MODEL}), tmp_path / "b")


def test_the_published_query_trains_on_what_counts(content, tmp_path):
    """recall: half. The loss is a mean over the targets that count, in training and held out."""
    config = read_config(read(content, tmp_path / "run", recall="half").plain(), {"train.lr": 1e-9})
    summary = train(config)
    model, split = load(tmp_path / "run"), prepare(config.data).split("validation")
    nats = []
    for index in range(2):
        batch = split.batch(index, seed=3, rows=range(4), batch_size=4, seq_len=16)
        nats.append(model.per_token_loss(batch.tokens, batch.targets)[0])
    nats = torch.cat(nats)
    assert nats.isnan().float().mean() == 0.25  # the first of four: the query is made of two
    assert summary.validation_loss == pytest.approx(nats.nanmean().item(), rel=1e-5)
    record = learnt(tmp_path / "run")[-1]
    assert abs(record["loss"] - math.log(256)) < 0.3
    assert record["validation_bits_per_byte"] == pytest.approx(summary.validation_loss / math.log(2), rel=1e-5)
