"""Rapid words (after Lampinen et al., "Towards mental time travel", 2021): a word heard once, and asked much later.

n new words are said, each with the object that it names. Then come phases that distract: in each, n other words are
said with other objects, drawn anew for each phase from those that are not of the beginning. At the end one of the first
words is asked, and the label is its object. Chance is 1/n for who knows which objects came first.

A worked example, ``generate(2, 1, 1)``; w a word, o an object, ? the question::

    w2 o1 w11 o26 w0 o22 w14 o27 ? w11

The label at its end is o26.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...train.examples import Group, Task, assemble
from .. import draws

IGNORE = -100
KINDS = 32  # of words, and of objects
QUESTION, WORD, OBJECT = 0, 1, 1 + KINDS
VOCABULARY = OBJECT + KINDS

#: (words, phases, examples)
TRAIN = tuple((n, phases, 10_000) for n in (2, 4, 8) for phases in (0, 1, 2))
VALIDATION = tuple((n, phases, 100) for n, phases, _ in TRAIN)
TEST = tuple((n, phases, 500) for n in (2, 4, 8) for phases in (0, 2, 5, 10, 20))


def length_of(words: int, phases: int) -> int:
    """Tokens of an example."""
    return 2 * words * (1 + phases) + 2


def generate(words: int, phases: int, count: int, seed: int = 0, *, start: int = 0) -> tuple[Tensor, Tensor]:
    """Examples ``start`` … ``start + count − 1`` of a seed: tokens and labels, int64 [count, length].

    Each is a function of (seed, its number, words, phases), on every machine.

    Raises:
        ValueError: for words outside of 1 … KINDS / 2, or a negative number of phases.
    """
    if not 1 <= words <= KINDS // 2:
        raise ValueError(f"words was {words}; it must be from 1 to {KINDS // 2}")
    if phases < 0:
        raise ValueError(f"phases was {phases}; it must be at least 0")
    name, rows = f"rapid words {words} {phases}", np.arange(count)

    def pick(what: str) -> np.ndarray:
        """[count, 1 + phases, words]: those of the beginning, then those of each phase."""
        order = draws.distinct(seed, f"{name} {what}", count, KINDS, 0, KINDS, start)
        some = draws.distinct(seed, f"{name} other {what}", count * phases, words, words, KINDS, start * phases)
        others = np.take_along_axis(order, some.reshape(count, -1), 1)
        return np.concatenate([order[:, :words], others], 1).reshape(count, 1 + phases, words)

    said, meant = WORD + pick("words"), OBJECT + pick("objects")
    asked = draws.integers(seed, f"{name} asked", count, 0, words, start)
    story = np.stack([said, meant], 3).reshape(count, -1)
    tokens = np.concatenate([story, np.full((count, 1), QUESTION), said[rows, 0, asked][:, None]], 1)
    labels = np.full_like(tokens, IGNORE)
    labels[:, -1] = meant[rows, 0, asked]
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def show(tokens: Sequence[int]) -> str:
    """An example's tokens as in the module's text."""
    names = ((OBJECT, "o"), (WORD, "w"))
    return " ".join(
        "?" if x == QUESTION else next(f"{name}{x - low}" for low, name in names if x >= low) for x in tokens
    )


def task(
    train: Sequence[Sequence[int]] = TRAIN,
    validation: Sequence[Sequence[int]] = VALIDATION,
    test: Sequence[Sequence[int]] = TEST,
    seed: int = 0,
) -> Task:
    """The examples of a run. Sizes are (words, phases, examples); each split draws from a seed of its own.

    Raises:
        ValueError: see :func:`generate`.
    """

    def make(own: int, words: int, phases: int, count: int) -> Group:
        def read(first: int, some: int) -> tuple[Tensor, Tensor]:
            return generate(words, phases, some, own, start=first)

        return Group(f"{words}x{phases}", length_of(words, phases), count, read)

    return assemble("rapid words", VOCABULARY, (train, validation, test), seed, make)
