"""One needle in noise: examples keep the task's rules, are the same everywhere, and depend on their number alone."""

import hashlib
import re

import pytest
import torch

from palimpsest.eval.tasks import needle


@pytest.mark.parametrize(("length", "gap"), [(64, 16), (300, 290), (3, 1), (1024, 512)])
def test_every_example_keeps_the_rules(length: int, gap: int) -> None:
    tokens, labels = needle.generate(length, gap, 200, seed=3)
    assert tokens.shape == labels.shape == (200, length)
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        (place,) = [t for t, token in enumerate(row) if token == needle.MARK]
        assert place + 1 + gap <= length - 1 and row[-1] == needle.QUESTION
        assert 16 <= row[place + 1] < 32 and label == [-100] * (length - 1) + [row[place + 1]]
        rest = [token for t, token in enumerate(row[:-1]) if t not in (place, place + 1)]
        assert all(0 <= token < 16 for token in rest)
    places = (tokens == needle.MARK).int().argmax(1)
    assert places.min() == 0 and places.max() >= 0.9 * (length - gap - 2)


def test_the_worked_example_is_right() -> None:
    rows = [line.split("  ", 1)[1] for line in needle.__doc__.splitlines() if re.match(r" +(tokens|labels) ", line)]
    found = [[-100 if x == "-" else int(x) for x in re.findall(r"\d+|-", row)] for row in rows]
    assert found == [x[0].tolist() for x in needle.generate(12, 4, 1)]


def test_the_numbers_are_these_on_every_machine() -> None:
    tokens, labels = needle.generate(64, 16, 20, seed=1)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes() + labels.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "6bb3e910b80a7cba"


def test_an_example_depends_on_its_number_alone() -> None:
    whole, part = needle.generate(64, 8, 30, seed=2), needle.generate(64, 8, 10, seed=2, start=20)
    assert all(torch.equal(a[20:], b) for a, b in zip(whole, part, strict=True))
    made = needle.task(train=[[64, 8, 30]], validation=[[64, 8, 5]], test=[[32, 4, 5]])
    assert [group.name for group in made.test] == ["32"] and made.vocab_size == 34
    assert not torch.equal(made.train[0].read(0, 5)[0], made.validation[0].read(0, 5)[0])


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="length was 17 with gap 16; it must be at least gap"):
        needle.task(test=[[17, 16, 5]])
    with pytest.raises(ValueError, match="gap 0; it must be at least gap"):
        needle.generate(17, 0, 5)
