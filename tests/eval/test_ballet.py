"""The ballet: examples keep the rules, are the same everywhere, and what is asked can be answered."""

import hashlib
import re

import numpy as np
import pytest
import torch

from palimpsest.eval.tasks import ballet
from palimpsest.eval.tasks.ballet import CELL, CENTRES, COLOUR, DANCES, MOTION, MOVES, SHAPE, STILL, VOCABULARY


def test_thirteen_dances_return_and_stay_close() -> None:
    assert len(DANCES) == 13 and ballet.WALKS.shape == (13, MOVES, 2)
    assert len({walk.tobytes() for walk in ballet.WALKS}) == 13
    assert not ballet.WALKS[:, -1].any() and np.abs(ballet.WALKS).max() == 1
    moves = np.diff(ballet.WALKS, axis=1, prepend=0)
    assert np.abs(moves).max() == 1 and np.abs(moves).sum(-1).min() >= 1, "a king's moves, and no standing still"


def watch(tokens: list[int], dancers: int, delay: int) -> dict[int, int]:
    """Which colour danced which dance, worked out from the stream as a spectator would."""
    found, places, looks = {}, set(), set()
    for i in range(dancers):
        begin = i * (3 + MOVES + delay)
        colour, shape, *cells = tokens[begin : begin + 3 + MOVES]
        assert COLOUR <= colour < SHAPE <= shape < CELL and all(CELL <= cell < VOCABULARY for cell in cells)
        steps = np.stack(np.divmod(np.array(cells) - CELL, ballet.BOARD), 1)
        assert tuple(steps[0]) in CENTRES
        (dance,) = np.flatnonzero((steps[1:] - steps[0] == ballet.WALKS).all((1, 2)))
        found[int(dance)] = colour
        places.add(cells[0])
        looks |= {colour, shape}
        if i < dancers - 1:
            assert set(tokens[begin + 3 + MOVES : begin + 3 + MOVES + delay]) <= {STILL}
    assert len(found) == len(places) == dancers and len(looks) == 2 * dancers, "all of them without replacement"
    return found


@pytest.mark.parametrize(("dancers", "delay", "questions"), [(2, 16, 1), (4, 48, 4), (8, 16, 3), (8, 0, 8), (1, 5, 1)])
def test_every_example_keeps_the_rules(dancers: int, delay: int, questions: int) -> None:
    tokens, labels = ballet.generate(dancers, delay, 40, seed=3, questions=questions)
    assert tokens.shape == labels.shape == (40, ballet.length_of(dancers, delay, questions))
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        danced = watch(row, dancers, delay)
        asked = [t for t in range(len(row)) if label[t] != ballet.IGNORE]
        assert asked == list(range(len(row) - questions, len(row)))
        assert len({row[t] for t in asked}) == questions
        assert all(danced[row[t] - MOTION] == label[t] for t in asked)


def test_nobody_is_asked_for_more_often_than_others() -> None:
    tokens, labels = ballet.generate(4, 0, 4000, seed=1)
    order = (tokens[:, :: 3 + MOVES][:, :4] == labels[:, -1:]).int().argmax(1)
    counts = torch.bincount(order, minlength=4)
    assert (counts - 1000).abs().max() < 5 * 1000**0.5
    assert torch.bincount(labels[:, -1] - COLOUR).count_nonzero() == ballet.COLOURS


def test_the_worked_example_is_right() -> None:
    lines = [line.strip() for line in ballet.__doc__.splitlines() if re.match(r" +c\d+ s\d+", line)]
    tokens, labels = ballet.generate(2, 3, 1, seed=0)
    assert ballet.show(tokens[0].tolist()) == " ".join(lines)
    said = re.search(r"label at its end is (c\d+)", ballet.__doc__)
    assert said is not None and ballet.show(labels[0, -1:].tolist()) == said[1]


def test_the_numbers_are_these_on_every_machine() -> None:
    tokens, labels = ballet.generate(4, 16, 20, seed=1)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes() + labels.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "3d251b9bb084c204"


def test_an_example_depends_on_its_number_alone() -> None:
    whole, part = ballet.generate(4, 16, 30, seed=2), ballet.generate(4, 16, 10, seed=2, start=20)
    assert all(torch.equal(a[20:], b) for a, b in zip(whole, part, strict=True))


def test_splits_of_a_task_differ_and_only_training_asks_more() -> None:
    sizes = [[2, 3, 30]]
    found = ballet.task(train=sizes, validation=sizes, test=sizes, questions=3, seed=2)
    assert [group[0].length for group in (found.train, found.validation, found.test)] == [43, 42, 42]
    seen = {tuple(row[:41]) for split in found[2:] for row in split[0].read(0, 30)[0].tolist()}
    assert len(seen) == 90 and found.vocab_size == VOCABULARY == 169


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0, 16), "dancers was 0"), ((9, 16), "dancers was 9; it must be from 1 to 8"), ((4, -1), "delay was -1")],
)
def test_bad_input(arguments: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ballet.generate(*arguments, 1)
    with pytest.raises(ValueError, match="questions 3; they must be at least 0, and from 1 to dancers = 2"):
        ballet.generate(2, 16, 1, questions=3)
