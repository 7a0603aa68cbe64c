"""Object permanence (after Lampinen et al., "Towards mental time travel", 2021): where is what went out of sight?

n objects come out of n boxes, one after the other, each once and for one moment; after each, ``delay`` steps pass in
which nothing moves. Then come phases that distract: in each, n other objects are seen in the open, in n of the places
that have no box. At the end one of the first objects is named, and the label is its box. Chance is 1/n.

A worked example, ``generate(2, 1, 1, delay=1)``; o an object, b a box, p a place in the open, . nothing moves, ? the
question::

    o19 b2 . o11 b7 . o21 p12 o17 p11 ? o11

The label at its end is b7.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...train.examples import Group, Task, assemble
from .. import draws

IGNORE = -100
OBJECTS, BOXES, PLACES = 32, 16, 16
STILL, QUESTION, OBJECT = 0, 1, 2
BOX = OBJECT + OBJECTS
PLACE = BOX + BOXES
VOCABULARY = PLACE + PLACES

#: (objects, phases, examples)
TRAIN = tuple((n, phases, 10_000) for n in (2, 4, 8) for phases in (0, 1, 2))
VALIDATION = tuple((n, phases, 100) for n, phases, _ in TRAIN)
TEST = tuple((n, phases, 500) for n in (2, 4, 8) for phases in (0, 2, 5, 10, 20))
DELAY = 4


def length_of(objects: int, phases: int, delay: int = DELAY) -> int:
    """Tokens of an example."""
    return objects * (2 + delay) + 2 * objects * phases + 2


def generate(
    objects: int, phases: int, count: int, seed: int = 0, *, delay: int = DELAY, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Examples ``start`` … ``start + count − 1`` of a seed: tokens and labels, int64 [count, length].

    Each is a function of (seed, its number, objects, phases), on every machine; ``delay`` changes nothing else.

    Raises:
        ValueError: for objects outside of 1 … BOXES, or a negative number of phases or delay.
    """
    if not 1 <= objects <= BOXES:
        raise ValueError(f"objects was {objects}; it must be from 1 to {BOXES}")
    if phases < 0 or delay < 0:
        raise ValueError(f"phases was {phases} and delay {delay}; both must be at least 0")
    name, rows, many = f"permanence {objects} {phases}", np.arange(count), (count * phases, start * phases)
    order = draws.distinct(seed, f"{name} objects", count, OBJECTS, 0, OBJECTS, start)
    boxes = BOX + draws.distinct(seed, f"{name} boxes", count, objects, 0, BOXES, start)
    hidden = OBJECT + order[:, :objects]
    some = draws.distinct(seed, f"{name} others", many[0], objects, objects, OBJECTS, many[1])
    others = OBJECT + np.take_along_axis(order, some.reshape(count, -1), 1)
    places = PLACE + draws.distinct(seed, f"{name} places", many[0], objects, 0, PLACES, many[1]).reshape(count, -1)
    asked = draws.integers(seed, f"{name} asked", count, 0, objects, start)
    seen = np.pad(np.stack([hidden, boxes], 2), ((0, 0), (0, 0), (0, delay)), constant_values=STILL)
    tokens = np.concatenate(
        [
            seen.reshape(count, -1),
            np.stack([others, places], 2).reshape(count, -1),
            np.full((count, 1), QUESTION),
            hidden[rows, asked][:, None],
        ],
        1,
    )
    labels = np.full_like(tokens, IGNORE)
    labels[:, -1] = boxes[rows, asked]
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def show(tokens: Sequence[int]) -> str:
    """An example's tokens as in the module's text."""
    names = ((PLACE, "p"), (BOX, "b"), (OBJECT, "o"))
    plain = {STILL: ".", QUESTION: "?"}
    return " ".join(plain.get(x) or next(f"{name}{x - low}" for low, name in names if x >= low) for x in tokens)


def task(
    train: Sequence[Sequence[int]] = TRAIN,
    validation: Sequence[Sequence[int]] = VALIDATION,
    test: Sequence[Sequence[int]] = TEST,
    delay: int = DELAY,
    seed: int = 0,
) -> Task:
    """The examples of a run. Sizes are (objects, phases, examples); each split draws from a seed of its own.

    Raises:
        ValueError: see :func:`generate`.
    """

    def make(own: int, objects: int, phases: int, count: int) -> Group:
        def read(first: int, some: int) -> tuple[Tensor, Tensor]:
            return generate(objects, phases, some, own, delay=delay, start=first)

        return Group(f"{objects}x{phases}", length_of(objects, phases, delay), count, read)

    return assemble("permanence", VOCABULARY, (train, validation, test), seed, make)
