"""Windows of a split: order, coverage, packing; every statement holds for any corpus, seed and shape."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.train.sources import DataError
from palimpsest.train.split import IGNORE, Split, permute
from palimpsest.train.tokenizer import ByteTokenizer

any_corpus = settings(deadline=None, database=None, derandomize=True, max_examples=60)


def make_split(
    lengths: list[int], name: str = "train", packed: bool = False, shard: int = 7, whole: bool = False
) -> Split:
    """A split of documents of the given lengths: separator 0, then bytes 1 to 255 in a long cycle."""
    documents = [np.r_[0, 1 + (np.arange(n) * 7 + i * 31) % 255] for i, n in enumerate(lengths)]
    ring = np.concatenate(documents).astype(np.uint8)
    offsets = np.cumsum([0, *map(len, documents)])
    shards = [ring[i : i + shard] for i in range(0, len(ring), shard)]
    size = sum(lengths)
    counts = {"byte_count": size, "table_bytes": size}
    return Split(name, shards, offsets, ByteTokenizer(), **counts, packed=packed, whole=whole)


def ring_of(split: Split) -> np.ndarray:
    return np.concatenate(split.shards).astype(np.int64)


corpora = st.lists(st.integers(1, 40), min_size=1, max_size=12)
seeds = st.integers(0, 2**63)


@any_corpus
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size, key):
    found = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(found), np.arange(size))


def test_permutation_needs_no_table_and_depends_on_its_key():
    index, size = np.arange(1000), 10**15
    first, second = permute(index, size, 1), permute(index, size, 2)
    assert len(set(first.tolist())) == 1000 and first.min() >= 0 and first.max() < size
    assert not np.any(first == second)
    assert np.array_equal(permute(index[500:], size, 1), first[500:])


def test_permutation_is_spread_evenly():
    """Where index 0 goes over 4000 keys, in 10 cells of 400: within 5 standard deviations (19 each) of uniform."""
    places = np.array([permute(np.zeros(1, dtype=np.int64), 10, key)[0] for key in range(4000)])
    assert np.all(np.abs(np.bincount(places, minlength=10) - 400) < 5 * 19)


@any_corpus
@given(lengths=corpora, seed=seeds, epoch=st.integers(0, 5), data=st.data())
def test_an_epoch_reads_each_window_once(lengths, seed, epoch, data):
    split = make_split(lengths)
    seq_len = data.draw(st.integers(1, split.tokens - 1))
    count = split.windows(seq_len)
    starts, beyond = split._starts(np.arange(epoch * count, (epoch + 1) * count), seed, seq_len)
    visited = (starts[:, None] + np.arange(seq_len)) % split.tokens
    assert len(np.unique(visited)) == count * seq_len > split.tokens - seq_len
    gaps = np.diff(np.sort(starts))
    assert np.all(gaps[np.argsort(gaps)][:-1] == seq_len) and not beyond.any()


def test_order_and_borders_change_with_epoch_and_seed():
    split = make_split([997], shard=10**6)
    first, second, other = (
        split._starts(np.arange(64) + epoch * split.windows(8), seed, 8)[0] for epoch, seed in ((0, 1), (1, 1), (0, 2))
    )
    assert len({int(starts[0]) for starts in (first, second, other)}) == 3
    steps = [np.diff(starts) % split.tokens for starts in (first, second, other)]  # the order, wherever it starts
    assert not np.array_equal(steps[0], steps[1]) and not np.array_equal(steps[0], steps[2])
    borders = {int(split._starts(np.array([epoch * split.windows(8)]), 1, 8)[0][0]) % 8 for epoch in range(50)}
    assert len(borders) >= 7


@any_corpus
@given(lengths=corpora, seed=seeds, step=st.integers(0, 30), data=st.data())
def test_targets_follow_their_tokens_in_the_ring(lengths, seed, step, data):
    split = make_split(lengths)
    seq_len = data.draw(st.integers(1, split.tokens - 1))
    batch = split.batch(step, seed=seed, batch_size=3, seq_len=seq_len)
    starts, _ = split._starts(np.arange(3 * step, 3 * step + 3), seed, seq_len)
    at = (starts[:, None] + np.arange(seq_len + 1)) % split.tokens
    expected = torch.from_numpy(ring_of(split)[at])
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.cu_seqlens is None
    assert torch.equal(batch.tokens, expected[:, :-1]) and torch.equal(batch.targets, expected[:, 1:])


@any_corpus
@given(lengths=corpora, start=st.integers(0, 600), length=st.integers(0, 1000), shard=st.integers(1, 50))
def test_reading_crosses_shards_and_the_end_of_the_ring(lengths, start, length, shard):
    split = make_split(lengths, shard=shard)
    assert np.array_equal(split.read(start, length), ring_of(split)[(start + np.arange(length)) % split.tokens])


def test_documents_are_read_whole():
    split = make_split([5, 1, 20])
    assert split.documents == 3
    assert split.document(1).tolist() == [0, 32]
    assert np.array_equal(np.concatenate([split.document(i) for i in range(3)]), ring_of(split))
    with pytest.raises(IndexError, match="document was 3; the train split has 3"):
        split.document(3)


@any_corpus
@given(
    lengths=corpora,
    seed=seeds,
    step=st.integers(0, 30),
    ranks=st.sampled_from([1, 2, 3, 6]),
    packed=st.booleans(),
    whole=st.booleans(),
)
def test_slices_of_ranks_make_the_global_batch(lengths, seed, step, ranks, packed, whole):
    split = make_split([40, *lengths], packed=packed, whole=whole)
    whole = split.batch(step, seed=seed, batch_size=6, seq_len=16)
    share = 6 // ranks
    parts = [
        split.batch(step, seed=seed, batch_size=6, seq_len=16, rows=range(rank * share, (rank + 1) * share))
        for rank in range(ranks)
    ]
    along = 1 if packed else 0
    assert torch.equal(torch.cat([part.tokens for part in parts], along), whole.tokens)
    assert torch.equal(torch.cat([part.targets for part in parts], along), whole.targets)
    if packed:
        shifted = [part.cu_seqlens[:-1] + 16 * share * rank for rank, part in enumerate(parts)]
        assert torch.equal(torch.cat([*shifted, torch.tensor([96], dtype=torch.int32)]), whole.cu_seqlens)


def test_a_batch_does_not_depend_on_what_was_read_before():
    """Resuming is an integer: step 7 of a fresh split is step 7 of one that read every batch before."""
    used, fresh = make_split([300, 20, 70]), make_split([300, 20, 70])
    for step in range(7):
        used.batch(step, seed=3, batch_size=4, seq_len=16)
    for left, right in zip(
        used.batch(7, seed=3, batch_size=4, seq_len=16)[:2],
        fresh.batch(7, seed=3, batch_size=4, seq_len=16)[:2],
        strict=True,
    ):
        assert torch.equal(left, right)


@any_corpus
@given(lengths=corpora, seed=seeds, step=st.integers(0, 30), data=st.data())
def test_packed_documents_never_share_a_sequence(lengths, seed, step, data):
    """Borders are exactly the rows' starts and the separators, which only open documents."""
    split = make_split(lengths, packed=True)
    seq_len = data.draw(st.integers(1, split.tokens - 1))
    packed = split.batch(step, seed=seed, batch_size=3, seq_len=seq_len)
    stream = make_split(lengths).batch(step, seed=seed, batch_size=3, seq_len=seq_len)
    assert torch.equal(packed.tokens, stream.tokens.view(1, -1))
    assert torch.equal(packed.targets, stream.targets.view(1, -1))
    tokens = packed.tokens[0]
    place = torch.arange(len(tokens))
    borders = place[(tokens == 0) | (place % seq_len == 0)].tolist()
    assert packed.cu_seqlens.dtype == torch.int32 and packed.cu_seqlens.tolist() == [*borders, len(tokens)]


@any_corpus
@given(lengths=corpora, batch_size=st.integers(1, 5), data=st.data())
def test_validation_counts_each_token_once_in_order(lengths, batch_size, data):
    split = make_split(lengths, name="validation")
    seq_len = data.draw(st.integers(1, split.tokens - 1))
    steps = split.batches(batch_size=batch_size, seq_len=seq_len)
    batches = [split.batch(step, seed=step, batch_size=batch_size, seq_len=seq_len) for step in range(steps)]
    counted = torch.cat([batch.targets for batch in batches]) != IGNORE
    tokens = torch.cat([batch.tokens for batch in batches])[counted]
    targets = torch.cat([batch.targets for batch in batches])[counted]
    count = split.windows(seq_len) * seq_len
    ring = torch.from_numpy(np.r_[ring_of(split), 0])
    assert torch.equal(tokens, ring[:count]) and torch.equal(targets, ring[1 : count + 1])
    beyond = split.batch(steps, seed=0, batch_size=batch_size, seq_len=seq_len)
    assert beyond.tokens.shape == (batch_size, seq_len) and (beyond.targets == IGNORE).all()


def test_bytes_are_counted_exactly():
    split = make_split([5, 1, 20])
    split.bytes = 52  # as if the tokenizer's table saw half of the bytes
    tokens = torch.from_numpy(ring_of(split))
    assert split.bytes_of(tokens).sum().item() == 52
    assert split.bytes_per_token == 52 / 29


@pytest.mark.parametrize("name", ["train", "validation"])
def test_too_short_for_a_window(name):
    split = make_split([10], name=name)
    assert split.windows(10) == 1
    with pytest.raises(DataError, match=rf"train.seq_len was 11, but the {name} split .* 11 tokens; .* at most 10"):
        split.batch(0, seed=0, batch_size=1, seq_len=11)


def test_arguments_are_checked():
    split = make_split([10])
    with pytest.raises(ValueError, match="step was -1"):
        split.batch(-1, seed=0, batch_size=1, seq_len=4)
    with pytest.raises(ValueError, match="batch_size 0"):
        split.batch(0, seed=0, batch_size=0, seq_len=4)
    with pytest.raises(ValueError, match="seq_len was 0"):
        split.batch(0, seed=0, batch_size=1, seq_len=0)
    for rows in (range(0), range(1, 3), range(-1, 1)):
        with pytest.raises(ValueError, match=r"rows was range.*batch of 2"):
            split.batch(0, seed=0, batch_size=2, seq_len=4, rows=rows)


def test_a_batch_moves_whole():
    batch = make_split([30], packed=True).batch(0, seed=0, batch_size=2, seq_len=4).to("meta")
    assert all(part.device.type == "meta" for part in batch)
    assert make_split([30]).batch(0, seed=0, batch_size=2, seq_len=4).to("cpu").cu_seqlens is None
