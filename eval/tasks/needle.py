"""One needle: a symbol is said once in noise, behind a mark, and asked for at the end. The smallest passkey there is.

Tokens are 16 of noise, 16 symbols, a mark and a question. Noise fills an example but for two places: a mark with a
symbol behind it, anywhere at least ``gap`` tokens before the end, and the question at the end, whose label is that
symbol. Nothing else has a label. Chance is 1/16.

A worked example, ``generate(12, 4, 1)``; 16 … 31 are the symbols, 32 is the mark, 33 the question::

    tokens  10   0  14   3   2  32  30   8  15  12  10  33
    labels   -   -   -   -   -   -   -   -   -   -   -  30
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...train.examples import Group, Task, assemble
from .. import draws

IGNORE = -100
NOISE = SYMBOLS = 16
MARK, QUESTION = NOISE + SYMBOLS, NOISE + SYMBOLS + 1
VOCABULARY = QUESTION + 1

#: (length, gap, examples)
TRAIN = ((64, 16, 50_000),)
VALIDATION = ((64, 16, 500),)
TEST = ((64, 16, 500), (256, 128, 200), (1024, 512, 100), (4096, 2048, 50))


def generate(length: int, gap: int, count: int, seed: int = 0, *, start: int = 0) -> tuple[Tensor, Tensor]:
    """Examples ``start`` … ``start + count − 1`` of a seed: tokens and labels, int64 [count, length].

    Each is a function of (seed, its number, length, gap), on every machine. The symbol stands at least ``gap`` tokens
    before the question.

    Raises:
        ValueError: for a gap less than 1, or a length that cannot hold it.
    """
    if gap < 1 or length < gap + 2:
        raise ValueError(f"length was {length} with gap {gap}; it must be at least gap + 2, and gap at least 1")
    name, rows = f"needle {length} {gap}", np.arange(count)
    tokens = draws.integers(seed, f"{name} noise", count * length, 0, NOISE, start * length).reshape(count, length)
    place = draws.integers(seed, f"{name} places", count, 0, length - gap - 1, start)
    symbol = draws.integers(seed, f"{name} symbols", count, NOISE, MARK, start)
    labels = np.full((count, length), IGNORE)
    tokens[rows, place], tokens[rows, place + 1] = MARK, symbol
    tokens[:, -1], labels[:, -1] = QUESTION, symbol
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def task(
    train: Sequence[Sequence[int]] = TRAIN,
    validation: Sequence[Sequence[int]] = VALIDATION,
    test: Sequence[Sequence[int]] = TEST,
    seed: int = 0,
) -> Task:
    """The examples of a run. Sizes are (length, gap, examples); each split draws from a seed of its own.

    Raises:
        ValueError: see :func:`generate`.
    """

    def make(own: int, length: int, gap: int, count: int) -> Group:
        return Group(f"{length}", length, count, lambda first, some: generate(length, gap, some, own, start=first))

    return assemble("needle", VOCABULARY, (train, validation, test), seed, make)
