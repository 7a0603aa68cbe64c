"""Passkey in bytes, as examples to train on: a number said once inside filler text, and asked for at the end.

The texts are those of :mod:`~.passkey`: the number stands between sentences that repeat for ever, at a depth drawn anew
for each. All of its seven digits have a label, the digits before being shown. ``exact`` is the share of examples of
which all seven are right, which is when the number would have been written in full. Chance is 0.1 a digit.

A worked example, ``generate(200, 1)``, its bytes as text; it ends before the last digit, and the labels of the last
seven tokens are ``5757234``::

    One special number is hidden in this text. Remember it.
    n it was quiet for a while. The special number for pale-anchor is: 5757234.
    Which number was it? The special number for pale-anchor is: 575723
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from ...train.examples import Group, Task, assemble
from .. import draws
from . import passkey

IGNORE = -100
VOCABULARY = 256

#: (length, examples)
TRAIN = ((320, 20_000),)
VALIDATION = ((320, 200),)
TEST = ((320, 500), (1280, 200), (5120, 100), (20480, 20))


@lru_cache(maxsize=1)
def _pieces() -> passkey.Pieces:
    return passkey.Pieces(lambda text: list(text.encode()))


def generate(length: int, count: int, seed: int = 0, *, start: int = 0) -> tuple[Tensor, Tensor]:
    """Examples ``start`` … ``start + count − 1`` of a seed: tokens and labels, int64 [count, length − 1].

    Each is a function of (seed, its number, length), on every machine. ``length`` counts the whole text, whose last
    byte is a label alone.

    Raises:
        ValueError: for a length too short to hold the question.
    """
    depths = draws.uniform(seed, f"passkey depth {length}", count, start)
    tokens = np.empty((count, length), dtype=np.int64)
    for row, (key, value), depth in zip(tokens, passkey.subjects(seed, count, start), depths, strict=True):
        example = _pieces().example(key, value, length, depth)
        row[:] = example.prompt + example.answer
    labels = np.full((count, length - 1), IGNORE)
    labels[:, -passkey.DIGITS :] = tokens[:, -passkey.DIGITS :]
    return torch.from_numpy(tokens[:, :-1]), torch.from_numpy(labels)


def _exact(length: int, seed: int, logits: Tensor, where: Tensor) -> dict[str, Tensor]:
    """``exact`` of each label: 1 when all seven digits of its example are right.

    Raises:
        ValueError: when an example's digits come in two parts, as they do where a stream is cut inside of the number.
    """
    numbers, counts = where[:, 0].unique_consecutive(return_counts=True)
    if (counts != passkey.DIGITS).any():
        raise ValueError(
            f"stream cuts the number in examples of {length - 1} tokens; it must leave at least 7 at the end"
        )
    wanted = torch.stack([generate(length, 1, seed, start=int(n))[1][0, -passkey.DIGITS :] for n in numbers])
    right = (logits.argmax(-1).view_as(wanted) == wanted).all(1)
    return {"exact": right.repeat_interleave(passkey.DIGITS)}


def task(
    train: Sequence[Sequence[int]] = TRAIN,
    validation: Sequence[Sequence[int]] = VALIDATION,
    test: Sequence[Sequence[int]] = TEST,
    seed: int = 0,
) -> Task:
    """The examples of a run. Sizes are (length, examples); each split draws from a seed of its own.

    Raises:
        ValueError: see :func:`generate`.
    """

    def make(own: int, length: int, count: int) -> Group:
        def read(first: int, some: int) -> tuple[Tensor, Tensor]:
            return generate(length, some, own, start=first)

        return Group(f"{length}", length - 1, count, read, partial(_exact, length, own))

    return assemble("passkey_bytes", VOCABULARY, (train, validation, test), seed, make)
