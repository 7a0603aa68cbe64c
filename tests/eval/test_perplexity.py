"""The loss by position: its buckets, and against the whole sequence read at once."""

import math
import types

import pytest
import torch

from palimpsest.eval.tasks import perplexity


def test_buckets_double_and_meet_the_training_context():
    assert perplexity.buckets(64, 4) == [(0, 16), (16, 32), (32, 64), (64, 128), (128, 256)]
    assert perplexity.buckets(512, 8)[-3:] == [(512, 1024), (1024, 2048), (2048, 4096)]
    assert perplexity.buckets(100, 3) == [(0, 25), (25, 50), (50, 100), (100, 200), (200, 300)]
    assert perplexity.buckets(7, 1) == [(0, 7)]


def byte_sizes(tokens):
    return (tokens != 0).double()


def test_carried_equals_the_whole_read_at_once_and_fresh_equals_the_pieces(run):
    tokens = torch.randint(1, 256, (3, 161), generator=torch.Generator().manual_seed(0))
    settings = perplexity.Settings(context=32, factor=5, batch=2)
    result = perplexity.run(run.model, tokens, byte_sizes, settings)
    with torch.no_grad():
        whole, _ = run.model.per_token_loss(tokens[:, :-1], tokens[:, 1:])
        pieces = [
            run.model.per_token_loss(tokens[:, i : i + 32], tokens[:, i + 1 : i + 33])[0] for i in range(0, 160, 32)
        ]
    fresh = torch.cat(pieces, dim=1)
    assert [(b["start"], b["stop"]) for b in result["buckets"]] == [(0, 16), (16, 32), (32, 64), (64, 128), (128, 160)]
    for bucket in [*result["buckets"], result["within"], result["beyond"], result["overall"]]:
        span = slice(bucket["start"], bucket["stop"])
        # float32 losses of about 10 nats: 1e-5 relative is some hundred times the rounding of their mean.
        assert bucket["loss"] == pytest.approx(whole[:, span].mean().item(), rel=1e-5)
        bits = fresh[:, span].mean().item() / math.log(2)
        assert bucket["fresh_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert bucket["tokens"] == 3 * (bucket["stop"] - bucket["start"])
    assert result["beyond"]["bits_per_byte"] != pytest.approx(result["beyond"]["fresh_bits_per_byte"], rel=1e-5)
    assert result["within"]["bits_per_byte"] == result["within"]["fresh_bits_per_byte"]


class Fixed(torch.nn.Module):
    """Two nats for every token."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def per_token_loss(self, tokens, targets, state=None):
        return torch.full(tokens.shape, 2.0), types.SimpleNamespace()


def test_a_separator_costs_nats_and_has_no_bytes():
    rows = torch.ones(2, 9, dtype=torch.int64)
    rows[:, 3::2] = 0  # of the 8 targets, 3 are separators
    result = perplexity.run(Fixed(), rows, byte_sizes, perplexity.Settings(context=4, factor=2, fresh=False))
    assert result["overall"]["loss"] == 2.0
    assert result["overall"]["bits_per_byte"] == pytest.approx(8 * 2 / math.log(2) / 5)
    assert result["overall"]["stderr"] == 0.0
    assert result["overall"]["fresh_bits_per_byte"] is None


def test_rows_shorter_than_the_context_are_refused():
    with pytest.raises(ValueError, match="held-out rows were 3 tokens long"):
        perplexity.run(Fixed(), torch.ones(1, 4, dtype=torch.int64), byte_sizes, perplexity.Settings(context=4))


def test_memory_stays_constant_along_the_text(run):
    """What is carried from piece to piece is the state, whose size does not grow."""
    sizes = []
    model = run.model

    class Watch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def per_token_loss(self, tokens, targets, state=None):
            nats, after = self.inner.per_token_loss(tokens, targets, state=state)
            sizes.append(after.bytes)
            assert tokens.shape[1] <= 16
            return nats, after

    rows = torch.ones(1, 16 * 8 + 1, dtype=torch.int64)
    perplexity.run(Watch(), rows, byte_sizes, perplexity.Settings(context=16, factor=8, fresh=False))
    assert len(sizes) == 8 and len(set(sizes)) == 1


def test_what_a_model_must_not_be_judged_by_is_left_out(make_run, tmp_path):
    """HMT as published sees the beginning of a segment before it says it: of 8 tokens, the first 3 do not count."""
    from palimpsest.eval import harness, stream
    from palimpsest.train.data import prepare

    folder = make_run(tmp_path / "hmt", hmt={"segment": 8, "sensory": 2, "memories": 4, "recall": "half"})
    run = harness.open_run(folder, torch.device("cpu"))
    tokens = torch.randint(1, 256, (3, 161), generator=torch.Generator().manual_seed(0))
    result = perplexity.run(run.model, tokens, byte_sizes, perplexity.Settings(context=32, factor=5, batch=2))
    with torch.no_grad():
        whole, _ = run.model.per_token_loss(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(whole.isnan()[0], torch.arange(160) % 8 < 3)
    for bucket in [*result["buckets"], result["overall"]]:
        part = whole[:, bucket["start"] : bucket["stop"]]
        assert bucket["tokens"] == part.numel() * 5 // 8
        assert bucket["loss"] == pytest.approx(part.nanmean().item(), rel=1e-5)
        assert bucket["bits_per_byte"] == pytest.approx(part.nanmean().item() / math.log(2), rel=1e-5)
    beginning = perplexity.run(run.model, tokens[:, :4], byte_sizes, perplexity.Settings(context=3, factor=1))
    assert beginning["buckets"] == []

    run.model.double()  # 400 tokens of an untrained model make ten million of a rounding
    text = torch.from_numpy(prepare(run.config.data).split("train").read(0, 401))[None]
    with torch.no_grad():
        loss, _ = run.model.per_token_loss(text[:, :-1], text[:, 1:])
    bits = [row["bits_per_token"] for row in stream.measure(run, 401, 40)["rows"]]
    assert bits == [round(float(part.double().nanmean()) / math.log(2), 4) for part in loss.split(40, 1)]
