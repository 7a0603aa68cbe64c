"""Set disjointness: examples keep the rules, are the same everywhere, and depend on their number alone."""

import hashlib
import re

import pytest
import torch

from palimpsest.eval.tasks import disjoint
from palimpsest.eval.tasks.disjoint import IGNORE


@pytest.mark.parametrize(
    ("first", "second", "vocabulary"), [(4, 256, 2048), (64, 16, 2048), (1, 1, 4), (5, 9, 16), (8, 8, 64)]
)
def test_every_example_keeps_the_rules(first: int, second: int, vocabulary: int) -> None:
    tokens, labels = disjoint.generate(first, second, 80, seed=3, vocabulary=vocabulary)
    assert tokens.shape == labels.shape == (80, first + second + 3)
    places = set()
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        a, b = row[1 : first + 1], row[first + 2 : -1]
        assert [row[0], row[first + 1], row[-1]] == [0, 1, 2]
        assert len(set(a)) == first and len(set(b)) == second and min(a + b) >= 3 and max(a + b) < vocabulary
        (shared,) = set(a) & set(b)
        assert label == [IGNORE] * (first + second + 2) + [shared]
        places.add((a.index(shared), b.index(shared)))
    for side, size in enumerate((first, second)):
        assert len({place[side] for place in places}) >= min(size, 16), "it stands anywhere"


def test_the_worked_example_is_right() -> None:
    rows = [line.split()[1:] for line in disjoint.__doc__.splitlines() if re.match(r" +(tokens|labels) ", line)]
    found = [[IGNORE if x == "-" else int(x) for x in row] for row in rows]
    assert found == [x[0].tolist() for x in disjoint.generate(4, 5, 1, vocabulary=32)]


def test_the_numbers_are_these_on_every_machine() -> None:
    tokens, labels = disjoint.generate(16, 64, 20, 1)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes() + labels.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "6dbe0398b5faf8d6"


def test_an_example_depends_on_its_number_alone() -> None:
    whole, part = disjoint.generate(8, 32, 30, seed=2), disjoint.generate(8, 32, 10, seed=2, start=20)
    assert all(torch.equal(a[20:], b) for a, b in zip(whole, part, strict=True))
    sizes = [[8, 32, 30]]
    made = disjoint.task(train=sizes, validation=sizes, test=sizes, vocabulary=64)
    assert [(group.name, group.length) for group in made.test] == [("8x32", 43)] and made.vocab_size == 64
    assert len({tuple(row) for split in made[2:] for row in split[0].read(0, 30)[0].tolist()}) == 90


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="first was 0 and second 4; both must be at least 1"):
        disjoint.task(test=[[0, 4, 1]])
    with pytest.raises(ValueError, match="vocabulary was 513; it must be at least 514 for such sets"):
        disjoint.generate(256, 256, 1, vocabulary=513)
