"""Set disjointness (after Arora et al., "Just read twice", 2024): which token do two sets share?

The tokens of a set A are said, then those of a set B. They have one token in common, and it is asked at the end. A
model with a fixed state has to keep the first set, so that it is the harder the larger A is, whatever B. The tokens of
a set are distinct and in random order; 0, 1 and 2 are the marks before A, before B and at the end.

A worked example, ``generate(4, 5, 1, vocabulary=32)``::

    tokens   0   5   7  27   9   1   8  27  10  29  25   2
    labels   -   -   -   -   -   -   -   -   -   -   -  27
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...train.examples import Group, Task, assemble
from .. import draws

IGNORE = -100
VOCABULARY = 2048
MARKS = 3

#: (tokens of A, tokens of B)
SIZES = tuple(pair for a, b in ((4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256)) for pair in ((a, b), (b, a)))
TRAIN = tuple((a, b, 20_000) for a, b in SIZES)
VALIDATION = tuple((a, b, 100) for a, b in SIZES)
TEST = tuple((a, b, 500) for a, b in (*SIZES, (32, 32), (64, 64), (128, 128), (256, 256)))


def generate(
    first: int, second: int, count: int, seed: int = 0, *, vocabulary: int = VOCABULARY, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Examples ``start`` … ``start + count − 1`` of a seed: tokens and labels, int64 [count, first + second + 3].

    Each is a function of (seed, its number, first, second, vocabulary), on every machine; ``first`` and ``second`` are
    the numbers of tokens of A and B.

    Raises:
        ValueError: for an empty set, or a vocabulary with too few tokens.
    """
    if first < 1 or second < 1:
        raise ValueError(f"first was {first} and second {second}; both must be at least 1")
    if vocabulary < first + second - 1 + MARKS:
        raise ValueError(f"vocabulary was {vocabulary}; it must be at least {first + second - 1 + MARKS} for such sets")
    name, rows = f"disjoint {first} {second} {vocabulary}", np.arange(count)
    whole = draws.distinct(seed, f"{name} tokens", count, first + second - 1, MARKS, vocabulary, start)
    a, rest = whole[:, :first], whole[:, first:]
    shared = whole[:, 0]
    # Distinct draws are in random order: A by a rotation, B by a place for what is shared.
    turn = draws.integers(seed, f"{name} first", count, 0, first, start)
    a = np.take_along_axis(a, (np.arange(first) + turn[:, None]) % first, 1)
    place = draws.integers(seed, f"{name} second", count, 0, second, start)[:, None]
    column = np.arange(second)
    b = np.empty((count, second), np.int64)
    b[column != place] = rest.reshape(-1)
    b[rows, place[:, 0]] = shared
    marks = np.broadcast_to(np.arange(MARKS), (count, MARKS))
    tokens = np.concatenate([marks[:, :1], a, marks[:, 1:2], b, marks[:, 2:]], 1)
    labels = np.full_like(tokens, IGNORE)
    labels[:, -1] = shared
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def task(
    train: Sequence[Sequence[int]] = TRAIN,
    validation: Sequence[Sequence[int]] = VALIDATION,
    test: Sequence[Sequence[int]] = TEST,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
) -> Task:
    """The examples of a run. Sizes are (tokens of A, tokens of B, examples); each split draws from a seed of its own.

    Raises:
        ValueError: see :func:`generate`.
    """

    def make(own: int, first: int, second: int, count: int) -> Group:
        def read(begin: int, some: int) -> tuple[Tensor, Tensor]:
            return generate(first, second, some, own, vocabulary=vocabulary, start=begin)

        return Group(f"{first}x{second}", first + second + MARKS, count, read)

    return assemble("disjoint", vocabulary, (train, validation, test), seed, make)
