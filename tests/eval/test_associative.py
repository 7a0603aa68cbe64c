"""Associative retrieval: examples keep the rules, are the same everywhere, and depend on their number alone."""

import hashlib
import re

import pytest
import torch

from palimpsest.eval.tasks import associative
from palimpsest.eval.tasks.associative import EOS, GEN, IGNORE, SEP


@pytest.mark.parametrize(
    ("pairs", "key", "value", "rewrite"),
    [(16, 1, 1, False), (50, 3, 1, False), (6, 2, 3, False), (10, 1, 2, True), (40, 1, 1, True), (1, 1, 1, True)],
)
def test_every_example_keeps_the_rules(pairs: int, key: int, value: int, rewrite: bool) -> None:
    tokens, labels = associative.generate(pairs, key, 60, seed=3, value=value, rewrite=rewrite)
    assert tokens.shape == labels.shape == (60, associative.length_of(pairs, key, value))
    width, again, places = key + value + 2, 0, set()
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        said: dict[tuple[int, ...], list[int]] = {}
        for begin in range(0, pairs * width, width):
            name, content = row[begin : begin + key], row[begin + key + 1 : begin + key + 1 + value]
            assert row[begin + key] == SEP and row[begin + width - 1] == EOS and max(name + content) < 16
            assert rewrite or tuple(name) not in said
            again += tuple(name) in said
            said[tuple(name)] = content
        *asked, mark = row[pairs * width : pairs * width + key + 1]
        answer = said[tuple(asked)]
        assert mark == GEN and row[pairs * width + key + 1 :] == answer[:-1]
        assert label == [IGNORE] * (pairs * width + key) + answer
        places.add(list(said).index(tuple(asked)))
    assert (again > 0) == (rewrite and pairs > 1) and len(places) >= min(pairs, 5)


def test_every_key_is_as_likely_asked_however_often_it_was_said() -> None:
    tokens, _ = associative.generate(3, 1, 6000, seed=1, rewrite=True)
    keys, asked = tokens[:, 0:12:4], tokens[:, 12]
    twice = keys[:, 0] == keys[:, 1]
    twice &= keys[:, 2] != keys[:, 0]
    share = (asked == keys[:, 0])[twice].double().mean()
    assert twice.sum() > 250 and abs(share - 0.5) < 5 * 0.5 / int(twice.sum()) ** 0.5, "five standard deviations"


def test_the_worked_examples_are_right() -> None:
    rows = [line.split()[1:] for line in associative.__doc__.splitlines() if re.match(r" +(tokens|labels) ", line)]
    found = [[IGNORE if x == "-" else int(x) for x in row] for row in rows]
    first, second = associative.generate(3, 2, 1, value=2), associative.generate(4, 1, 1, 6, rewrite=True)
    assert found == [x[0].tolist() for x in (*first, *second)]


def test_the_numbers_are_these_on_every_machine() -> None:
    digest = hashlib.sha256()
    for part in (*associative.generate(20, 2, 20, 1), *associative.generate(20, 1, 20, 1, rewrite=True)):
        digest.update(part.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "d0b741610af5a908"


def test_an_example_depends_on_its_number_alone() -> None:
    for rewrite in (False, True):
        whole = associative.generate(9, 2, 30, seed=2, rewrite=rewrite)
        part = associative.generate(9, 2, 10, seed=2, rewrite=rewrite, start=20)
        assert all(torch.equal(a[20:], b) for a, b in zip(whole, part, strict=True))
    made = associative.task(train=[[9, 2, 30]], validation=[[9, 2, 30]], test=[[9, 2, 30]], value=2)
    assert [(group.name, group.length) for group in made.test] == [("9x2", 58)] and made.vocab_size == 19
    assert len({tuple(row) for split in made[2:] for row in split[0].read(0, 30)[0].tolist()}) == 90


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test": [[17, 1, 5]]}, "pairs was 17 with keys of 1 symbols; it must be at most 16"),
        ({"test": [[0, 1, 5]]}, "pairs was 0, key 1 and value 1; they must be at least 1"),
        ({"test": [[3, 9, 5]]}, "key 9 and value 1; .* at most 8"),
        ({"value": 0}, "value 0; they must be"),
    ],
)
def test_bad_input(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        associative.task(**options)
