"""Windows of whole documents: every token once an epoch, no document cut that fits, as few windows as best fit has."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.models import build
from palimpsest.train.data import DataConfig, main, prepare
from palimpsest.train.packing import best_fit, plan
from palimpsest.train.split import IGNORE, Split
from palimpsest.train.tokenizer import ByteTokenizer

any_corpus = settings(deadline=None, database=None, derandomize=True, max_examples=40)
corpora = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def make_split(lengths: list[int], name: str = "train", packed: bool = True) -> Split:
    """A split of documents of the given lengths in which no text's token comes twice: separator 0, then 1, 2, 3, …"""
    text = iter(range(1, sum(lengths) + 1))
    ring = np.array([token for n in lengths for token in (0, *(next(text) for _ in range(n)))], dtype=np.uint16)
    offsets = np.cumsum([0, *(n + 1 for n in lengths)])
    counts = {"byte_count": sum(lengths), "table_bytes": sum(lengths)}
    shards = [ring[i : i + 11] for i in range(0, len(ring), 11)]
    return Split(name, shards, offsets, ByteTokenizer(), **counts, packed=packed, whole=True)


def best_fit_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """What every bin has left, sorted: the longest item first, each into the fullest bin that has room for it."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(left) if room >= length]
        if fitting:
            left[min(fitting, key=left.__getitem__)] -= length
        else:
            left.append(capacity - length)
    return sorted(left)


@settings(any_corpus, max_examples=100)
@given(data=st.data(), capacity=st.integers(1, 50))
def test_best_fit_is_best_fit(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60))
    bins = best_fit(np.array(lengths), capacity)
    filled = np.bincount(bins, weights=lengths)
    assert sorted(capacity - filled) == best_fit_one_by_one(lengths, capacity)


@any_corpus
@given(lengths=corpora, seq_len=st.integers(1, 60), seed=st.integers(0, 2**63), epoch=st.integers(0, 3))
def test_an_epoch_has_every_token_once_and_cuts_only_what_is_too_long(lengths, seq_len, seed, epoch):
    split = make_split(lengths)
    count = split.windows(seq_len)
    rows = split.rows(range(epoch * count, (epoch + 1) * count), seed=seed, seq_len=seq_len)
    real = rows.targets != IGNORE
    # Each token of the corpus is a token once, with the token that follows it as its target: 0 after a document.
    ring = split.read(0, split.tokens + 1)
    pairs = sorted(zip(rows.tokens[real].tolist(), rows.targets[real].tolist(), strict=True))
    assert pairs == sorted(zip(ring[:-1].tolist(), ring[1:].tolist(), strict=True))
    assert (rows.tokens[~real] == 0).all()
    padding = 1 - split.tokens / (count * seq_len)
    assert split.plan(seq_len).padding(seq_len) == pytest.approx(padding, abs=1e-12)  # a quotient of integers
    # Its windows are padded at their ends only, and a document that fits a window lies in one whole, from a border on.
    found = set()
    for row, borders in enumerate(rows.borders):
        assert real[row].tolist() == sorted(real[row].tolist(), reverse=True) and borders[0] == 0
        for begin, end in zip(borders, [*borders[1:], seq_len], strict=True):
            piece = tuple(rows.tokens[row, begin:end][real[row, begin:end]].tolist())
            assert real[row, begin:end].all() or not piece  # padding stands alone
            found.add(piece)
    for index, length in enumerate(lengths):
        document = tuple(split.document(index).tolist())
        if length + 1 <= seq_len:
            assert document in found
        else:  # full windows and a rest
            parts = {document[i : i + seq_len] for i in range(0, length + 1, seq_len)}
            assert parts <= found


def test_few_tokens_are_padding():
    """2,000 documents of 1 to 400 tokens in windows of 512: less than 1 %, where one document a window leaves 60 %."""
    lengths = np.random.default_rng(0).integers(1, 401, 2000)
    made = plan(np.concatenate([[0], np.cumsum(lengths)]), 512)
    assert made.padding(512) < 0.01 and made.cut == 0
    assert 1 - lengths.sum() / (512 * len(lengths)) > 0.59


def test_order_changes_with_epoch_and_seed_and_windows_do_not():
    split = make_split([5, 9, 3, 14, 7, 2, 30, 8, 6, 11] * 6)
    count = split.windows(16)

    def epoch(number: int, seed: int) -> list[tuple]:
        rows = split.rows(range(number * count, (number + 1) * count), seed=seed, seq_len=16)
        return [tuple(row) for row in rows.tokens.tolist()]

    first, second, other = epoch(0, 1), epoch(1, 1), epoch(0, 2)
    assert first != second and first != other and sorted(first) == sorted(second) == sorted(other)
    assert epoch(0, 1) == first


def test_a_batch_does_not_depend_on_what_was_read_before():
    used, fresh = make_split([30, 20, 7, 50]), make_split([30, 20, 7, 50])
    for step in range(5):
        used.batch(step, seed=3, batch_size=4, seq_len=16)
    left, right = (split.batch(5, seed=3, batch_size=4, seq_len=16) for split in (used, fresh))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@any_corpus
@given(lengths=corpora, batch_size=st.integers(1, 5), seq_len=st.integers(1, 60))
def test_validation_counts_each_token_once(lengths, batch_size, seq_len):
    split = make_split(lengths, name="validation")
    steps = split.batches(batch_size=batch_size, seq_len=seq_len)
    batches = [split.batch(step, seed=step, batch_size=batch_size, seq_len=seq_len) for step in range(steps)]
    tokens = torch.cat([batch.tokens[batch.targets != IGNORE] for batch in batches]).tolist()
    assert sorted(tokens) == sorted(split.read(0, split.tokens).tolist())
    assert (split.batch(steps, seed=0, batch_size=batch_size, seq_len=seq_len).targets == IGNORE).all()


def test_without_reset_windows_are_rows():
    lengths = [5, 9, 3, 14, 7]
    packed, rows = (
        make_split(lengths, packed=packed).batch(0, seed=1, batch_size=3, seq_len=16) for packed in (True, False)
    )
    assert rows.cu_seqlens is None and rows.tokens.shape == (3, 16) and packed.tokens.shape == (1, 48)
    assert torch.equal(rows.tokens.view(1, -1), packed.tokens) and torch.equal(rows.targets.view(1, -1), packed.targets)
    assert packed.cu_seqlens.dtype == torch.int32 and packed.cu_seqlens[-1] == 48


def test_a_model_forgets_at_the_borders_of_packed_windows():
    """With cu_seqlens the logits of a document in a window are those of the document alone: memory and attention begin
    anew. Equal to 1e-5 of their size, for chunks of other lengths add up in another order in float32."""
    split = make_split([5, 9, 3, 14, 7])
    batch = split.batch(0, seed=1, batch_size=2, seq_len=24)
    model = build(
        {
            "model": {
                "vocab_size": 64,
                "dim": 16,
                "layers": 1,
                "mixer": {"kind": "titans_mag", "heads": 2, "window": 8, "memory": {"heads": 2, "chunk_size": 4}},
            }
        }
    )
    with torch.no_grad():
        together = model(batch.tokens, cu_seqlens=batch.cu_seqlens).logits[0]
        borders = batch.cu_seqlens.tolist()
        for begin, end in pairwise(borders):
            alone = model(batch.tokens[:, begin:end]).logits[0]
            error = (together[begin:end] - alone).square().mean().sqrt() / alone.square().mean().sqrt()
            assert error < 1e-5
        stream = model(batch.tokens).logits[0]
        assert (stream[borders[1] :] - together[borders[1] :]).abs().max() > 1e-4  # without, it does not


def test_a_configuration_chooses_it_and_is_told_the_padding(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    for number, size in enumerate((20, 7, 50, 31, 9)):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    given = {"source": "text", "path": "*.txt", "folder": "corpus", "validation_fraction": 0}
    caplog.set_level(logging.INFO, "palimpsest.train")
    for keys, borders in (({}, True), ({"reset": True}, True), ({"reset": False}, False)):
        split = prepare(DataConfig(**given, documents="whole", **keys)).split("train")
        assert split.windows(32) == 4 and (split.rows([0], seed=0, seq_len=32).borders is not None) == borders
    # 21 + 8, 32 + 19 + 10, 32: pieces of 32, 32, 21, 19, 10 and 8 tokens, 122 in 4 windows of 32.
    assert (
        "train: 5 whole documents in 4 windows of 32 tokens, 4.69% of it padding; 1 documents are longer" in caplog.text
    )
    assert main(["*.txt", "--out", "corpus", "--validation-fraction", "0", "--seq-len", "32"]) == 0
    shown = capsys.readouterr().out
    assert "train: whole documents fill 4 windows of 32 tokens, 4.69% padding; 1 of 5 documents are longer" in shown
