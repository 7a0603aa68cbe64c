"""Symbolic ballet (after Lampinen et al., "Towards mental time travel", 2021): who danced that dance?

On a board of 11 × 11 cells stand n dancers around n of the eight centres {2, 5, 8}² without the middle one, each of its
own colour and shape. One after the other dances one of thirteen dances, each another one: sixteen moves that never lead
further than one cell from the dancer's centre and end there. Between two dances pass d steps in which nothing moves.
Then a dance is named, and the answer is the dancer, told by its colour. Chance is 1/n.

A step is one token: a dancer who begins is told by colour, shape and centre, then each move by the cell that it leads
to. A worked example, ``generate(2, 3, 1, seed=0)``; c colour, s shape, + a cell, . nothing moves, ? a question::

    c4 s14 +30 +40 +30 +42 +30 +40 +30 +42 +30 +40 +30 +42 +30 +40 +30 +42 +30 . . .
    c5 s12 +57 +46 +57 +68 +57 +46 +57 +68 +57 +46 +57 +68 +57 +46 +57 +68 +57 ?2

The label at its end is c5: ?2 is up and down (dances count from 0), which the second dancer, c5, danced.

With ``questions`` more than one dance is asked for, each at most once; a question's answer is not shown to the model.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...train.examples import Group, Task, assemble
from .. import draws

IGNORE = -100
BOARD, MOVES = 11, 16
COMPASS = {"N": (-1, 0), "E": (0, 1), "S": (1, 0), "W": (0, -1)}
#: Each dance as the moves that are repeated until there are sixteen.
DANCES = {
    "circle clockwise": "N E S S W W N E",
    "circle counter-clockwise": "N W S S E E N W",
    "up and down": "N S S N",
    "left and right": "W E E W",
    "rising diagonal": "NE SW SW NE",
    "falling diagonal": "NW SE SE NW",
    "plus clockwise": "N S E W S N W E",
    "plus counter-clockwise": "N S W E S N E W",
    "times clockwise": "NE SW SE NW SW NE NW SE",
    "times counter-clockwise": "NE SW NW SE SW NE SE NW",
    "zee": "NW E E SW SW E E NW",
    "chevron down": "NW SE NE SW",
    "chevron up": "SW NE SE NW",
}
CENTRES = tuple((row, column) for row in (2, 5, 8) for column in (2, 5, 8) if (row, column) != (5, 5))
COLOURS, SHAPES = 19, 15

STILL = 0
MOTION = 1  # the first of the thirteen questions
COLOUR = MOTION + len(DANCES)
SHAPE = COLOUR + COLOURS
CELL = SHAPE + SHAPES
VOCABULARY = CELL + BOARD * BOARD

#: (dancers, delay, examples)
TRAIN = tuple((n, d, 20_000) for n in (2, 4, 8) for d in (16, 48))
VALIDATION = tuple((n, d, 200) for n, d, _ in TRAIN)
TEST = tuple((n, d, 500) for n in (2, 4, 8) for d in (16, 48, 96, 192))


def walk(moves: str) -> NDArray[np.int64]:
    """Where a dance is after each of its sixteen moves, relative to its centre: [16, 2] rows and columns."""
    steps = [np.sum([COMPASS[letter] for letter in move], 0) for move in moves.split()]
    return np.cumsum(np.tile(steps, (MOVES // len(steps), 1)), 0)


WALKS = np.stack([walk(moves) for moves in DANCES.values()])


def length_of(dancers: int, delay: int, questions: int = 1) -> int:
    """Tokens of an example."""
    return dancers * (3 + MOVES) + (dancers - 1) * delay + questions


def _few(seed: int, stream: str, rows: int, count: int, kinds: int, start: int) -> NDArray[np.int64]:
    """[rows, count] of 0 … kinds − 1, distinct in a row: the order of random numbers."""
    numbers = draws.words(seed, stream, rows * kinds, start * kinds).reshape(rows, kinds)
    return np.argsort(numbers, 1, kind="stable")[:, :count]


def generate(
    dancers: int, delay: int, count: int, seed: int = 0, *, questions: int = 1, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Examples ``start`` … ``start + count − 1`` of a seed: tokens and labels, int64 [count, length].

    Each is a function of (seed, its number, dancers, delay), on every machine.

    Raises:
        ValueError: for dancers outside of 1 … 8, a negative delay, or questions outside of 1 … dancers.
    """
    if not 1 <= dancers <= len(CENTRES):
        raise ValueError(f"dancers was {dancers}; it must be from 1 to {len(CENTRES)}")
    if delay < 0 or not 1 <= questions <= dancers:
        raise ValueError(
            f"delay was {delay} and questions {questions}; they must be at least 0, and from 1 to dancers = {dancers}"
        )
    name = f"ballet {dancers} {delay}"
    dance, colour, shape, place, asked = (
        _few(seed, f"{name} {what}", count, wanted, kinds, start)
        for what, wanted, kinds in (
            ("dances", dancers, len(DANCES)),
            ("colours", dancers, COLOURS),
            ("shapes", dancers, SHAPES),
            ("places", dancers, len(CENTRES)),
            ("questions", questions, dancers),
        )
    )
    centre = np.array(CENTRES)[place]  # [count, n, 2]
    cells = centre[:, :, None] + np.concatenate([np.zeros((len(DANCES), 1, 2), np.int64), WALKS], 1)[dance]
    shown = np.concatenate(
        [COLOUR + colour[..., None], SHAPE + shape[..., None], CELL + cells[..., 0] * BOARD + cells[..., 1]], 2
    )
    stream = np.pad(shown, ((0, 0), (0, 0), (0, delay)), constant_values=STILL).reshape(count, -1)
    stream = stream[:, : stream.shape[1] - delay]
    tokens = np.concatenate([stream, MOTION + np.take_along_axis(dance, asked, 1)], 1)
    labels = np.full_like(tokens, IGNORE)
    labels[:, -questions:] = COLOUR + np.take_along_axis(colour, asked, 1)
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def show(tokens: Sequence[int]) -> str:
    """An example's tokens as in the module's text."""
    names = ((CELL, "+"), (SHAPE, "s"), (COLOUR, "c"), (MOTION, "?"))
    return " ".join("." if x == STILL else next(f"{name}{x - low}" for low, name in names if x >= low) for x in tokens)


def task(
    train: Sequence[Sequence[int]] = TRAIN,
    validation: Sequence[Sequence[int]] = VALIDATION,
    test: Sequence[Sequence[int]] = TEST,
    questions: int = 1,
    seed: int = 0,
) -> Task:
    """The examples of a run. Sizes are (dancers, delay, examples); each split draws from a seed of its own.

    ``questions``: how many dances a training example asks for; validation and test ask for one.

    Raises:
        ValueError: see :func:`generate`.
    """

    def make(own: int, dancers: int, delay: int, count: int, asked: int = 1) -> Group:
        def read(start: int, size: int) -> tuple[Tensor, Tensor]:
            return generate(dancers, delay, size, own, questions=asked, start=start)

        return Group(f"{dancers}x{delay}", length_of(dancers, delay, asked), count, read)

    more = [(*size, min(questions, size[0])) for size in train]  # never more questions than dancers
    return assemble("ballet", VOCABULARY, (more, validation, test), seed, make)
