"""MQAR: the examples keep the task's rules, are the same everywhere, and depend on their number alone."""

import hashlib
import re

import numpy as np
import pytest
import torch

from palimpsest.eval import draws
from palimpsest.eval.tasks import mqar


@pytest.mark.parametrize(
    ("length", "pairs", "vocabulary"), [(64, 4, 8192), (256, 64, 8192), (1024, 256, 8192), (40, 7, 16)]
)
def test_every_example_keeps_the_rules(length: int, pairs: int, vocabulary: int) -> None:
    tokens, labels = mqar.generate(length, pairs, 50, seed=3, vocabulary=vocabulary)
    assert tokens.shape == labels.shape == (50, length) and tokens.min() >= 0 and tokens.max() < vocabulary
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        said = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(said) == pairs and all(1 <= k < vocabulary // 2 <= v < vocabulary for k, v in said.items())
        asked = [t for t in range(length) if label[t] != mqar.IGNORE]
        assert sorted(row[t] for t in asked) == sorted(said), "each key is asked once"
        assert all(t >= 2 * pairs and (t - 2 * pairs) % 2 == 0 and label[t] == said[row[t]] for t in asked)


def test_the_worked_example_is_right() -> None:
    rows = [line.split("  ", 1)[1] for line in mqar.__doc__.splitlines() if re.match(r" +(tokens|labels) ", line)]
    found = [[-100 if x == "-" else int(x) for x in re.findall(r"\d+|-", row)] for row in rows]
    assert found == [x[0].tolist() for x in mqar.generate(12, 2, 1, vocabulary=16)]


def test_the_numbers_are_these_on_every_machine() -> None:
    tokens, labels = mqar.generate(128, 8, 20, seed=1)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes() + labels.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "8f894f7f4b80c298"


def test_an_example_depends_on_its_number_alone() -> None:
    whole, part = mqar.generate(64, 8, 30, seed=2), mqar.generate(64, 8, 10, seed=2, start=20)
    assert all(torch.equal(a[20:], b) for a, b in zip(whole, part, strict=True))
    other = mqar.generate(64, 8, 30, seed=3)
    assert (whole[0] == other[0]).float().mean() < 0.01


def test_most_are_asked_soon() -> None:
    """A single query stands at gap n with p(n) ∝ n^-0.99."""
    _, labels = mqar.generate(64, 1, 20_000, seed=5)
    place = (labels != mqar.IGNORE).int().argmax(1)
    counts = np.bincount((place.numpy() - 2) // 2, minlength=31)
    wanted = np.arange(1, 32) ** -0.99
    wanted *= 20_000 / wanted.sum()
    assert np.abs(counts - wanted).max() < 5 * np.sqrt(wanted.max()), "five standard deviations"


def test_exponential_draws() -> None:
    found = draws.exponential(3, "e", 50_000)
    u = ((draws.words(3, "e", 50_000) >> np.uint64(11)) + np.uint64(1)).astype(float) * 2.0**-53
    assert np.abs(found + np.log(u)).max() < 1e-14 and found.min() >= 0 and abs(found.mean() - 1) < 0.02


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((15, 4), "length was 15 with 4 pairs; it must be at least 4 × pairs"),
        ((64, 0), "pairs at least 1"),
        ((64, 8, 1, 0, 16), "vocabulary was 16; it must be even, with at least 8 keys"),
        ((64, 4, 1, 0, 33), "vocabulary was 33"),
    ],
)
def test_bad_input(arguments: tuple[int, ...], words: str) -> None:
    first, rest = arguments[:4], arguments[4:]
    first = first + (1, 0)[len(first) - 2 :] if len(first) < 4 else first
    with pytest.raises(ValueError, match=words):
        mqar.generate(*first, **({"vocabulary": rest[0]} if rest else {}))


def test_splits_of_a_task_share_no_example() -> None:
    found = mqar.task(train=[[24, 3, 50]], validation=[[24, 3, 50]], test=[[24, 3, 50]], vocabulary=64, seed=4)
    assert found.vocab_size == 64 and [group.name for group in found.train] == ["24x3"]
    seen: set[tuple[int, ...]] = set()
    for split in (found.train, found.validation, found.test):
        seen |= {tuple(row) for row in split[0].read(0, 50)[0].tolist()}
    other = mqar.task(train=[[24, 3, 50]], validation=[[24, 3, 50]], test=[[24, 3, 50]], vocabulary=64, seed=5)
    seen |= {tuple(row) for row in other.train[0].read(0, 50)[0].tolist()}
    assert len(seen) == 200
    with pytest.raises(ValueError, match="length was 10 with 3 pairs"):
        mqar.task(test=[[10, 3, 50]])
