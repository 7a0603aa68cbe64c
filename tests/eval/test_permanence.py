"""Object permanence and rapid words: examples keep the rules, are the same everywhere, and can be answered."""

import hashlib
import re

import pytest
import torch

from palimpsest.eval.tasks import permanence, rapid_words

IGNORE = -100


def last(row: list[int], label: list[int]) -> int:
    """The label, which only the last position has."""
    assert label[:-1] == [IGNORE] * (len(row) - 1)
    return label[-1]


@pytest.mark.parametrize(("words", "phases"), [(2, 0), (4, 20), (8, 3), (16, 1), (1, 1)])
def test_words_are_asked_as_they_were_said(words: int, phases: int) -> None:
    tokens, labels = rapid_words.generate(words, phases, 50, seed=3)
    assert tokens.shape == labels.shape == (50, rapid_words.length_of(words, phases))
    asked = set()
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        shown = rapid_words.show(row)
        said = [(int(w), int(o)) for w, o in re.findall(r"w(\d+) o(\d+)", shown)]
        parts = [said[i : i + words] for i in range(0, len(said), words)]
        assert len(parts) == 1 + phases and max(max(pair) for pair in said) < rapid_words.KINDS
        for part in parts:
            assert all(len({pair[side] for pair in part}) == words for side in (0, 1)), "no word or object twice"
        for part in parts[1:]:
            assert all(not {p[side] for p in part} & {p[side] for p in parts[0]} for side in (0, 1)), "others"
        (name,) = re.findall(r"\? w(\d+)$", shown)
        assert last(row, label) == rapid_words.OBJECT + dict(parts[0])[int(name)]
        asked.add([pair[0] for pair in parts[0]].index(int(name)))
    assert len(asked) >= min(words, 8)


@pytest.mark.parametrize(("objects", "phases", "delay"), [(2, 0, 4), (4, 20, 0), (8, 3, 1), (16, 1, 2), (1, 0, 0)])
def test_objects_are_where_they_were_seen(objects: int, phases: int, delay: int) -> None:
    tokens, labels = permanence.generate(objects, phases, 50, seed=3, delay=delay)
    assert tokens.shape == labels.shape == (50, permanence.length_of(objects, phases, delay))
    asked = set()
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        shown = permanence.show(row)
        pattern = rf"((?:o\d+ b\d+ (?:\. ){{{delay}}}){{{objects}}})((?:o\d+ p\d+ ){{{objects * phases}}})\? o(\d+)"
        begin, rest, name = re.fullmatch(pattern, shown).groups()
        hidden = dict(re.findall(r"o(\d+) b(\d+)", begin))
        assert len(hidden) == len(set(hidden.values())) == objects
        seen = re.findall(r"o(\d+) p(\d+)", rest)
        assert not {o for o, _ in seen} & set(hidden)
        for i in range(0, len(seen), objects):
            assert all(len({pair[side] for pair in seen[i : i + objects]}) == objects for side in (0, 1))
        assert last(row, label) == permanence.BOX + int(hidden[name])
        asked.add(list(hidden).index(name))
    assert len(asked) >= min(objects, 8)


@pytest.mark.parametrize(("module", "options"), [(rapid_words, {}), (permanence, {"delay": 1})])
def test_the_worked_examples_are_right(module, options: dict) -> None:
    tokens, labels = module.generate(2, 1, 1, **options)
    assert f"\n    {module.show(tokens[0].tolist())}\n" in module.__doc__
    assert f"The label at its end is {module.show(labels[0, -1:].tolist())}." in module.__doc__


@pytest.mark.parametrize(("module", "mark"), [(rapid_words, "11fa7b681cba2ca4"), (permanence, "33e56ae0dae3d358")])
def test_the_numbers_are_these_on_every_machine(module, mark: str) -> None:
    tokens, labels = module.generate(4, 5, 20, 1)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes() + labels.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == mark


@pytest.mark.parametrize("module", [rapid_words, permanence])
def test_an_example_depends_on_its_number_alone(module) -> None:
    whole, part = module.generate(4, 5, 30, seed=2), module.generate(4, 5, 10, seed=2, start=20)
    assert all(torch.equal(a[20:], b) for a, b in zip(whole, part, strict=True))
    sizes = [[4, 2, 30]]
    made = module.task(train=sizes, validation=sizes, test=sizes)
    assert [group.name for group in made.test] == ["4x2"]
    rows = {tuple(row) for split in made[2:] for row in split[0].read(0, 30)[0].tolist()}
    assert len(rows) == 90 and max(max(row) for row in rows) < made.vocab_size
    assert all(group.read(0, 1)[0].shape[1] == group.length for group in made.test)


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (rapid_words, (17, 0), "words was 17; it must be from 1 to 16"),
        (rapid_words, (2, -1), "phases was -1; it must be at least 0"),
        (permanence, (17, 0), "objects was 17; it must be from 1 to 16"),
        (permanence, (2, -1), "phases was -1 and delay 4; both must be at least 0"),
    ],
)
def test_bad_input(module, arguments: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module.task(test=[[*arguments, 1]])
