"""Mixtures: shares of every component at any time, no window twice in an epoch, the same at any number of processes."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.models.config import ConfigError
from palimpsest.train import read_config, read_metrics, train
from palimpsest.train.data import DataConfig, DataError, prepare
from palimpsest.train.mixture import BLOCK, MixtureSplit
from palimpsest.train.split import IGNORE, Split
from palimpsest.train.tokenizer import ByteTokenizer

any_mixture = settings(deadline=None, database=None, derandomize=True, max_examples=30)


def part(letter: int, size: int, name: str = "train", whole: bool = False, packed: bool = False) -> Split:
    """A split of one long text and some short ones, all of one byte, with its place in the corpus beside it."""
    lengths = [size - 60, *[9] * 6]
    ring = np.concatenate([np.r_[0, np.full(n, letter)] for n in lengths]).astype(np.uint8)
    offsets = np.cumsum([0, *(n + 1 for n in lengths)])
    counts = {"byte_count": sum(lengths), "table_bytes": sum(lengths)}
    return Split(name, [ring], offsets, ByteTokenizer(), **counts, packed=packed, whole=whole, where=f"corpus {letter}")


def mixed(weights: list[float], sizes: list[int] | None = None, name: str = "train", **keys: bool) -> MixtureSplit:
    sizes = sizes or [500 + 100 * i for i in range(len(weights))]
    parts = {chr(97 + i): part(97 + i, size, name, **keys) for i, size in enumerate(sizes)}
    return MixtureSplit(name, parts, weights)


weights_of = st.lists(st.floats(0.02, 5.0), min_size=1, max_size=5)
seeds = st.integers(0, 2**63)


@any_mixture
@given(weights=weights_of, seed=seeds, blocks=st.integers(1, 4))
def test_shares_are_exact_to_a_window_at_every_block(weights, seed, blocks):
    split = mixed(weights)
    component, _ = split.drawn(np.arange(blocks * BLOCK), seed)
    total = sum(map(Fraction, weights))
    for index, weight in enumerate(weights):
        assert abs((component == index).sum() - Fraction(weight) / total * blocks * BLOCK) < 1


def test_shares_are_even_inside_a_block_and_far_out():
    """Of 0.7 and 0.3 over 200 seeds, windows 37 and far out: within 5 standard deviations (0.032) of the share."""
    split = mixed([0.7, 0.3])
    for window in (37, 10**12 + 5):
        found = [split.drawn(np.array([window]), seed)[0][0] for seed in range(200)]
        assert abs(np.mean(found) - 0.3) < 5 * 0.0324
    assert len({tuple(split.drawn(np.arange(20), seed)[0]) for seed in range(20)}) == 20


@any_mixture
@given(weights=weights_of, seed=seeds, start=st.integers(0, 3000), count=st.integers(1, 3000))
def test_each_component_is_read_in_order_without_gaps(weights, seed, start, count):
    """Any stretch of windows has consecutive numbers of each component, whatever was asked before."""
    split = mixed(weights)
    component, number = split.drawn(np.arange(start, start + count), seed)
    for index in range(len(weights)):
        numbers = number[component == index]
        assert np.array_equal(numbers, np.arange(len(numbers)) + (numbers[0] if len(numbers) else 0))
    before, _ = split.drawn(np.arange(start), seed)
    for index in np.unique(component).tolist():
        assert number[component == index][0] == (before == index).sum()


@pytest.mark.parametrize("whole", [False, True])
def test_no_window_comes_twice_before_its_component_was_read_once(whole):
    """Two components of other sizes over three epochs of the smaller: each epoch of each reads every window once."""
    split = mixed([0.6, 0.4], [1000, 3000], whole=whole)
    counts = [each.windows(16) for each in split.parts.values()]
    component, number = split.drawn(np.arange(5 * counts[0]), seed=4)
    for index, (each, count) in enumerate(zip(split.parts.values(), counts, strict=True)):
        numbers = number[component == index]
        assert numbers.tolist() == list(range(len(numbers)))
        if len(numbers) >= count and not whole:
            places = each._starts(numbers[:count], 77, 16)[0]
            assert len(set(places.tolist())) == count
    assert (component == 0).sum() > 2 * counts[0]


@pytest.mark.parametrize("keys", [{}, {"packed": True}, {"whole": True, "packed": True}, {"whole": True}])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_slices_of_ranks_make_the_global_batch(keys, ranks):
    """At any number of processes, in any order of steps, by a split that read nothing before."""
    weights = [0.5, 0.2, 0.3]
    whole = mixed(weights, **keys)
    for step in (0, 1, 127, 128, 10**9, 3):
        expected = whole.batch(step, seed=9, batch_size=8, seq_len=16)
        share = 8 // ranks
        parts = [
            mixed(weights, **keys).batch(
                step, seed=9, batch_size=8, seq_len=16, rows=range(rank * share, (rank + 1) * share)
            )
            for rank in range(ranks)
        ]
        along = 1 if keys.get("packed") else 0
        for field in ("tokens", "targets"):
            assert torch.equal(torch.cat([getattr(p, field) for p in parts], along), getattr(expected, field))
        if keys.get("packed"):
            shifted = [p.cu_seqlens[:-1] + 16 * share * rank for rank, p in enumerate(parts)]
            assert torch.equal(torch.cat([*shifted, torch.tensor([128], dtype=torch.int32)]), expected.cu_seqlens)


def test_a_row_is_a_window_of_the_component_that_was_drawn():
    split = mixed([0.5, 0.5])
    batch = split.batch(3, seed=1, batch_size=64, seq_len=8)
    component, _ = split.drawn(np.arange(3 * 64, 4 * 64), 1)
    for row, index in enumerate(component.tolist()):
        letters = set(batch.tokens[row].tolist()) - {0}
        assert letters <= {97 + index}
    assert set(component.tolist()) == {0, 1}
    other = split.batch(3, seed=2, batch_size=64, seq_len=8)
    assert not torch.equal(batch.tokens, other.tokens)


def test_text_is_read_one_component_after_the_other():
    split = mixed([0.9, 0.1])
    rings = [each.read(0, each.tokens) for each in split.parts.values()]
    ring = np.concatenate(rings)
    assert split.tokens == len(ring) and split.bytes == sum(each.bytes for each in split.parts.values())
    for start, length in ((0, 1300), (400, 300), (len(ring) - 5, 20), (len(rings[0]), 10)):
        assert np.array_equal(split.read(start, length), ring[(start + np.arange(length)) % len(ring)])


def test_validation_windows_past_the_end_of_a_component_have_no_targets():
    split = mixed([0.5, 0.5], [200, 2000], name="validation")
    last = split.batches(batch_size=4, seq_len=16)
    before = [split.batch(step, seed=0, batch_size=4, seq_len=16) for step in range(last - 1)]
    assert not any((batch.targets == IGNORE).any() for batch in before)
    at_the_end = [split.batch(last - 1 + k, seed=k, batch_size=4, seq_len=16) for k in range(2)]
    assert any((batch.targets == IGNORE).any() for batch in at_the_end)


def test_a_weight_too_small_is_named():
    with pytest.raises(DataError, match=r"data.mixture gave 'b' the weight 0.0001, 0.0001 of the sum; .* 1/1024 of it"):
        mixed([1.0, 0.0001])


# -- from a configuration ---------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, letter, count in (("a", "a", 40), ("b", "b", 25)):
        lines = [json.dumps({"text": letter * (60 + i % 7)}) + "\n" for i in range(count)]
        Path(f"{name}.jsonl").write_text("".join(lines))
        prepare(DataConfig(source="jsonl", path=f"{name}.jsonl", folder=f"corpora/{name}", validation_fraction=0.2))
    return tmp_path


def section(**keys: object) -> dict:
    mixture = [{"folder": "corpora/a", "weight": 0.7}, {"folder": "corpora/b", "weight": 0.3}]
    return {"mixture": mixture, **keys}


def test_a_configuration_mixes_prepared_corpora(here):
    corpus = prepare(DataConfig(**section()))
    split = corpus.split("train")
    assert corpus.manifest["splits"]["train"]["tokens"] == split.tokens
    assert list(split.parts) == ["a", "b"] and split.shares[0] > 2 * split.shares[1]
    batch = split.batch(0, seed=0, batch_size=1000, seq_len=8)
    letters = batch.tokens.amax(1).tolist()
    assert abs(letters.count(ord("a")) - 700) < 5 * 14.5 and set(letters) == {97, 98}
    other = prepare(
        DataConfig(mixture=[{"folder": "corpora/a", "weight": 0.6}, {"folder": "corpora/b", "weight": 0.4}])
    )
    assert other.checksum != corpus.checksum


def test_components_may_be_sources(here):
    mixture = [
        {"source": "jsonl", "path": "a.jsonl", "weight": 1, "label": "first"},
        {"folder": "corpora/b", "weight": 1},
    ]
    corpus = prepare(DataConfig(mixture=mixture, documents="packed"))
    assert list(corpus.corpora) == ["first", "b"] and corpus.corpora["first"].folder.parent == Path("runs/data")
    assert corpus.split("train").batch(0, seed=0, batch_size=2, seq_len=8).cu_seqlens is not None


def test_a_damaged_missing_or_other_component_is_named(here, monkeypatch):
    with pytest.raises(DataError, match=r"data.mixture.1: data.folder was 'corpora/c', which holds no manifest.json"):
        prepare(DataConfig(mixture=[{"folder": "corpora/a", "weight": 1}, {"folder": "corpora/c", "weight": 1}]))
    shard = Path("corpora/b/train-00000.bin")
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + b"x")
    with pytest.raises(DataError, match=r"data.mixture.1: corpora/b/train-00000.bin is corrupted"):
        prepare(DataConfig(**section()))
    shard.unlink()
    with pytest.raises(DataError, match=r"data.mixture.1: corpora/b/train-00000.bin is missing from the corpus"):
        prepare(DataConfig(**section()), verify=False)
    shard.write_bytes(sound)
    manifest = Path("corpora/b/manifest.json")
    content = json.loads(manifest.read_text())
    content["identity"]["tokenizer"] = {"name": "gpt2"}
    manifest.write_text(json.dumps(content))
    message = (
        r"data.mixture.1: data.tokenizer was \{'name': 'bytes'\}; the corpus in corpora/b was prepared with .*gpt2"
    )
    with pytest.raises(DataError, match=message):
        prepare(DataConfig(**section()))
    with pytest.raises(DataError, match=r"seq_len was 100000, but the train split of the corpus in corpora/a has"):
        prepare(DataConfig(mixture=[{"folder": "corpora/a", "weight": 1}])).split("train").windows(100000)


def test_a_component_without_validation_is_left_out_of_it(here, caplog):
    prepare(DataConfig(source="jsonl", path="b.jsonl", folder="corpora/c", validation_fraction=0))
    mixture = [{"folder": "corpora/a", "weight": 1}, {"folder": "corpora/c", "weight": 1}]
    caplog.set_level("INFO", "palimpsest.train")
    split = prepare(DataConfig(mixture=mixture)).split("validation")
    assert list(split.parts) == ["a"] and "c of the mixture is left out of the validation split" in caplog.text


def test_a_run_trains_on_a_mixture_and_validates_each_component(here, content, capsys):
    """The run's validation loss is the mean of the components' by their shares, and its config can be read again."""
    run = content | {"data": section(documents="whole")}
    run["train"] = run["train"] | {"steps": 6, "validate_every": 3, "checkpoint_every": 0}
    config = read_config(run)
    summary = train(config)
    assert summary.status == "complete"
    records = [record for record in read_metrics(summary.folder) if "validation_loss" in record]
    assert len(records) == 2
    for record in records:
        expected = 0.7 * record["validation_loss/a"] + 0.3 * record["validation_loss/b"]
        assert record["validation_loss"] == pytest.approx(expected, rel=1e-12)  # the same sum of two floats
        assert record["validation_loss/a"] != record["validation_loss/b"]
    assert read_config(yaml.safe_load(Path(summary.folder, "config.yaml").read_text())) == config
    Path("corpora/a/validation-00000.bin").unlink()
    with pytest.raises(DataError, match=r"data.mixture.0: corpora/a/validation-00000.bin is missing"):
        train(read_config(run | {"name": "other", "train": run["train"] | {"out": "other"}}))
    with pytest.raises(ConfigError, match=r"data.mixture.0.weight was -1"):
        read_config(run | {"data": {"mixture": [{"folder": "corpora/a", "weight": -1}]}})
