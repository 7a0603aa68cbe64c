"""MAD's six skills: examples keep the rules, are the same everywhere, and depend on their number alone."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.eval.tasks import mad
from palimpsest.eval.tasks.mad import IGNORE, KINDS, Settings


def rows_of(kind: str, length: int, settings: Settings | None = None, count: int = 60):
    tokens, labels = mad.generate(kind, length, count, seed=3, settings=settings)
    assert tokens.shape == labels.shape and tokens.shape[0] == count and tokens.dtype == torch.int64
    return list(zip(tokens.tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["in_context_recall", "noisy_recall"])
def test_recall_asks_for_what_was_said(kind: str) -> None:
    settings, shares = KINDS[kind].settings, []
    for row, label in rows_of(kind, 64):
        said: dict[int, int] = {}
        for t in range(0, 64, 2):
            key, value = row[t : t + 2]
            assert label[t + 1] == IGNORE
            if key >= 16:
                assert value >= 16 and label[t] == IGNORE and t < 62
                continue
            assert 0 <= key < 8 <= value < 16 and said.get(key, value) == value
            assert label[t] == (value if key in said else IGNORE)
            said[key] = value
        assert label[62] != IGNORE, "the last key has come before"
        shares.append(np.mean([x >= 16 for x in row]))
    assert abs(np.mean(shares) - settings.noise * 30 / 32) < 0.04, "five standard deviations, 60 × 30 pairs"


def test_few_pairs_leave_one_to_ask_for() -> None:
    for row, label in rows_of("noisy_recall", 4, replace(KINDS["noisy_recall"].settings, noise=0.9)):
        assert row[:2] == row[2:] and label == [IGNORE, IGNORE, row[1], IGNORE]


@pytest.mark.parametrize(("training", "motif"), [(False, 3), (True, 3), (True, 1)])
def test_fuzzy_recall_says_motifs_to_their_end(training: bool, motif: int) -> None:
    settings = replace(KINDS["fuzzy_recall"].settings, training=training, motif=motif)
    sizes = set()
    for row, label in rows_of("fuzzy_recall", 64, settings):
        text = "".join("f" if x == 15 else "k" if x < 7 else "v" for x in row)
        match = re.fullmatch(r"(f*)((?:k+v+)+)", text)
        assert match, text
        said: dict[tuple[int, ...], tuple[int, ...]] = {}
        wanted = [IGNORE] * 64
        for pair in re.finditer(r"(k+)(v+)", text):
            (a, b), end = pair.span(1), pair.end()
            key, value = tuple(row[a:b]), tuple(row[b:end])
            assert len(set(key)) == len(key) <= motif and len(set(value)) == len(value) <= motif
            assert training or len(key) == motif
            sizes |= {(0, len(key)), (1, len(value))}
            assert said.get(key, value) == value
            if key in said:
                wanted[b - 1 : end - 1] = value
            again = key in said
            said[key] = value
        assert again, "the last pair was there before"
        assert label == ([*row[1:], IGNORE] if training else wanted)
    assert {n for which, n in sizes if which} == set(range(1, motif + 1))


def test_training_labels_are_the_next_tokens() -> None:
    made = mad.task(train=[[32, 10]], validation=[[32, 10]], test=[[32, 10]])
    tokens, labels = made.train[0].read(0, 10)
    assert torch.equal(labels[:, :-1], tokens[:, 1:]) and (labels[:, -1] == IGNORE).all()
    assert (made.test[0].read(0, 10)[1] == IGNORE).sum() > 160


def test_facts_are_the_same_in_all_splits_of_a_seed() -> None:
    maps = []
    for made in (mad.task("memorisation"), mad.task("memorisation", seed=1)):
        said: dict[int, set[int]] = {}
        for split in (made.train, made.validation, made.test):
            for row, label in zip(*(x.tolist() for x in split[0].read(0, 200)), strict=True):
                assert row[1::2] == [255] * 16 and label[::2] == [IGNORE] * 16
                for key, value in zip(row[::2], label[1::2], strict=True):
                    said.setdefault(key, set()).add(value)
        assert sorted(said) == list(range(127)) and all(len(values) == 1 for values in said.values())
        values = [said[key].pop() for key in range(127)]
        assert len(set(values)) == 127 and min(values) >= 127 and max(values) < 255
        maps.append(values)
    assert maps[0] != maps[1]


def test_selective_copy_asks_in_order() -> None:
    ends = set()
    for row, label in rows_of("selective_copy", 64):
        said = [x for x in row[:47] if x != 14]
        assert len(said) == 16 and max(said) < 14 and row[47:] == [15] + [14] * 16
        assert label == [IGNORE] * 48 + said
        ends.add(max(t for t in range(47) if row[t] != 14))
    assert len(ends) > 5, "the last stands anywhere"


def test_compression_asks_for_every_token_by_its_number() -> None:
    for row, label in rows_of("compression", 32):
        assert max(row[:31]) < 15 and row[31:] == list(range(15, 47)) and label == [IGNORE] * 32 + row[:31]
    assert mad.task("compression").vocab_size == 47 and mad.task("compression").train[0].length == 63


def test_the_worked_examples_are_right() -> None:
    pattern = r"^    (\w+) (\d+)\n    tokens (.*)\n    labels (.*)$"
    shown = re.findall(pattern, mad.__doc__, re.MULTILINE)
    assert [kind for kind, *_ in shown] == [
        "in_context_recall",
        "noisy_recall",
        "fuzzy_recall",
        "memorisation",
        "selective_copy",
        "compression",
    ]
    for kind, length, *text in shown:
        found = [[IGNORE if x == "-" else int(x) for x in row.split()] for row in text]
        settings = replace(KINDS[kind].settings, copied=3)
        assert found == [x[0].tolist() for x in mad.generate(kind, int(length), 1, settings=settings)]


def test_the_numbers_are_these_on_every_machine() -> None:
    digest = hashlib.sha256()
    for kind in KINDS:
        for part in mad.generate(kind, 64, 20, seed=1):
            digest.update(part.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "a45826fe2a8fbb45"


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_depends_on_its_number_alone(kind: str) -> None:
    whole, part = mad.generate(kind, 64, 30, seed=2), mad.generate(kind, 64, 10, seed=2, start=20)
    assert all(torch.equal(a[20:], b) for a, b in zip(whole, part, strict=True))
    made = mad.task(kind)
    assert [(g.name, g.count) for g in made.train] == [(f"{KINDS[kind].length}", KINDS[kind].train)]
    rows = {tuple(row) for split in made[2:] for row in split[0].read(0, 20)[0].tolist()}
    assert len(rows) == 60, "splits share no example"
    assert max(max(row) for row in rows) < made.vocab_size


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("recall", {}, "kind was 'recall'; it must be one of in_context_recall, fuzzy"),
        ("in_context_recall", {"test": [[7, 1]]}, "length was 7; it must be even, and at least 4"),
        ("noisy_recall", {"noise": 1.0}, r"noise was 1.0; it must lie in \[0, 1\)"),
        ("in_context_recall", {"noise": 0.1}, "noise was 0.1; .* 0 without a noise_vocabulary"),
        ("noisy_recall", {"vocabulary": 17}, "vocabulary was 17 with 16 tokens of noise; at least 2"),
        ("fuzzy_recall", {"motif": 8}, "motif was 8 with vocabulary 16; it must be from 1 to 7"),
        ("fuzzy_recall", {"test": [[11, 1]]}, "length was 11 with motif 3; it must be at least 12"),
        ("memorisation", {"test": [[3, 1]]}, "length was 3 and vocabulary 256"),
        ("selective_copy", {"copied": 128}, "length was 256 with 128 copied; it must be at least 257"),
        ("selective_copy", {"vocabulary": 2}, "vocabulary was 2; it must be at least 3"),
        ("compression", {"test": [[1, 1]]}, "length was 1 and vocabulary 16; both must be at least 2"),
    ],
)
def test_bad_input(kind: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mad.task(kind, **options)
