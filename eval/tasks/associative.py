"""Associative retrieval (ARMT; Rodkin et al., 2024): pairs are said one by one, then one of their keys is asked.

Keys and values are of 16 symbols. A pair is ``key SEP value EOS``, a segment of its own to a model over segments;
behind the pairs stand a key of theirs and GEN, and the labels are the key's value (its earlier symbols are shown when
the later ones are asked; an EOS behind it, which anyone can say, is not asked). In *remember* no key comes twice. In
*rewrite* keys come again with other values, and the answer is the latest; all keys that were said are as likely asked.

A worked example, ``generate(3, 2, 1, value=2)``; 16 is SEP, 17 GEN, 18 EOS::

    tokens   0  13  16   3  13  18   0   6  16   0   7  18  11   7  16   1   4  18   0   6  17   0
    labels   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   0   7

and ``generate(4, 1, 1, seed=6, rewrite=True)``::

    tokens  14  16   8  18  14  16   8  18  14  16   2  18   7  16  14  18  14  17
    labels   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   2
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...train.examples import Group, Task, assemble
from .. import draws

IGNORE = -100
SYMBOLS = 16
SEP, GEN, EOS = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2
VOCABULARY = EOS + 1

#: (pairs, symbols of a key, examples): the curriculum of the paper's code
TRAIN = tuple(
    (pairs, key, 10_000) for pairs, key in ((1, 1), (2, 1), (3, 1), (5, 1), (10, 1), (20, 2), (40, 2), (50, 2), (50, 3))
)
VALIDATION = tuple((pairs, key, 200) for pairs, key, _ in TRAIN)
TEST = tuple((pairs, key, 500) for pairs, key in ((5, 1), (10, 1), (20, 2), (50, 3), (100, 3), (200, 3), (500, 3)))


def length_of(pairs: int, key: int, value: int = 1) -> int:
    """Tokens of an example; a pair has ``key + value + 2``."""
    return pairs * (key + value + 2) + key + value


def generate(
    pairs: int, key: int, count: int, seed: int = 0, *, value: int = 1, rewrite: bool = False, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Examples ``start`` … ``start + count − 1`` of a seed: tokens and labels, int64 [count, length].

    Each is a function of (seed, its number, pairs, key, value, rewrite), on every machine. ``key`` and ``value`` are
    numbers of symbols.

    Raises:
        ValueError: for no pair, a key or value outside of 1 … 8 symbols, or more pairs than keys to remember.
    """
    if pairs < 1 or not 1 <= key <= 8 or not 1 <= value <= 8:
        raise ValueError(
            f"pairs was {pairs}, key {key} and value {value}; they must be at least 1, and the latter at most 8"
        )
    if not rewrite and pairs > SYMBOLS**key:
        raise ValueError(f"pairs was {pairs} with keys of {key} symbols; it must be at most {SYMBOLS**key}, all keys")
    name, rows = f"associative {pairs} {key} {value} {rewrite}", np.arange(count)
    if rewrite:
        codes = draws.integers(seed, f"{name} keys", count * pairs, 0, SYMBOLS**key, start * pairs)
        codes = codes.reshape(count, pairs)
    else:
        codes = draws.distinct(seed, f"{name} keys", count, pairs, 0, SYMBOLS**key, start)
    values = draws.integers(seed, f"{name} values", count * pairs * value, 0, SYMBOLS, start * pairs * value)
    values = values.reshape(count, pairs, value)
    latest = draws.first_of(codes[:, ::-1])[:, ::-1] == np.arange(pairs)[::-1]
    chance = draws.words(seed, f"{name} asked", count * pairs, start * pairs).reshape(count, pairs) >> np.uint64(1)
    asked = np.where(latest, chance + np.uint64(1), np.uint64(0)).argmax(1)
    keys = codes[..., None] // SYMBOLS ** np.arange(key)[::-1] % SYMBOLS
    mark = np.ones((count, pairs, 1), np.int64)
    said = np.concatenate([keys, SEP * mark, values, EOS * mark], 2).reshape(count, -1)
    answer = values[rows, asked]
    tokens = np.concatenate([said, keys[rows, asked], GEN * mark[:, 0], answer[:, :-1]], 1)
    labels = np.full_like(tokens, IGNORE)
    labels[:, -value:] = answer
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def task(
    train: Sequence[Sequence[int]] = TRAIN,
    validation: Sequence[Sequence[int]] = VALIDATION,
    test: Sequence[Sequence[int]] = TEST,
    value: int = 1,
    rewrite: bool = False,
    seed: int = 0,
) -> Task:
    """The examples of a run. Sizes are (pairs, symbols of a key, examples); each split draws from a seed of its own.

    Raises:
        ValueError: see :func:`generate`.
    """

    def make(own: int, pairs: int, key: int, count: int) -> Group:
        def read(first: int, some: int) -> tuple[Tensor, Tensor]:
            return generate(pairs, key, some, own, value=value, rewrite=rewrite, start=first)

        return Group(f"{pairs}x{key}", length_of(pairs, key, value), count, read)

    name = f"associative {'rewrite' if rewrite else 'remember'}"
    return assemble(name, VOCABULARY, (train, validation, test), seed, make)
