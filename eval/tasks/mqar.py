"""Multi-query associative recall (MQAR; Arora et al., "Zoology", 2023): keys are said with their values, then asked.

An example is ``pairs`` keys, each followed by its value, then as many queries, each a key, at even distances behind the
pairs; between them stand random tokens. The label of a query is its key's value, and nothing else has a label. Keys are
from [1, V/2) and unique in an example, values from [V/2, V). The distance of a query from the end of the pairs is 2 n
with n drawn without replacement, p(n) ∝ n^(a − 1) and a = 0.01: most are asked soon, a few late.

A worked example, ``generate(12, 2, 1, vocabulary=16)``::

    tokens   7  12   5  14 |  7   4   5  14   3   7  10   4
    labels   -   -   -   - | 12   -  14   -   -   -   -   -

The test sets of the benchmark are in ``TEST``, a thousand examples each; its training sets in ``TRAIN``.
"""

from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...train.examples import Group, Task, assemble
from .. import draws

IGNORE = -100
VOCABULARY = 8192
POWER = Decimal("0.99")  # 1 − a

#: (length, pairs, examples)
TRAIN = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
VALIDATION = tuple((length, pairs, 200) for length, pairs, _ in TRAIN)
TEST = tuple((t, n, 1_000) for t, n in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)))


@lru_cache(maxsize=16)
def _rarity(room: int) -> NDArray[np.float64]:
    """n^(1 − a) for n = 1 … room; by decimal arithmetic, the same everywhere."""
    return np.array([float(Decimal(n) ** POWER) for n in range(1, room + 1)])


def generate(
    length: int, pairs: int, count: int, seed: int = 0, *, vocabulary: int = VOCABULARY, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Examples ``start`` … ``start + count − 1`` of a seed: tokens and labels, int64 [count, length].

    Each is a function of (seed, its number, length, pairs, vocabulary), on every machine.

    Raises:
        ValueError: for a length that cannot hold the pairs and their queries, or a vocabulary with too few keys.
    """
    if pairs < 1 or length < 4 * pairs:
        raise ValueError(f"length was {length} with {pairs} pairs; it must be at least 4 × pairs, and pairs at least 1")
    half = vocabulary // 2
    if half - 1 < pairs or vocabulary % 2:
        raise ValueError(f"vocabulary was {vocabulary}; it must be even, with at least {pairs} keys in [1, V / 2)")
    name = f"mqar {length} {pairs} {vocabulary}"
    keys = draws.distinct(seed, f"{name} keys", count, pairs, 1, half, start)
    values = draws.integers(seed, f"{name} values", count * pairs, half, vocabulary, start * pairs).reshape(
        count, pairs
    )
    tokens = draws.integers(seed, f"{name} others", count * length, 0, vocabulary, start * length).reshape(
        count, length
    )
    labels = np.full((count, length), IGNORE)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    # The first to arrive of exponential draws with rates n^(a − 1): sampling without replacement.
    room = (length - 2 * pairs) // 2
    waits = draws.exponential(seed, f"{name} gaps", count * room, start * room).reshape(count, room) * _rarity(room)
    place = 2 * pairs + 2 * np.argsort(waits, 1, kind="stable")[:, :pairs]
    np.put_along_axis(tokens, place, keys, 1)
    np.put_along_axis(labels, place, values, 1)
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def task(
    train: Sequence[Sequence[int]] = TRAIN,
    validation: Sequence[Sequence[int]] = VALIDATION,
    test: Sequence[Sequence[int]] = TEST,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
) -> Task:
    """The examples of a run. Sizes are (length, pairs, examples); each split draws from a seed of its own.

    Raises:
        ValueError: see :func:`generate`.
    """

    def make(own: int, length: int, pairs: int, count: int) -> Group:
        def read(start: int, some: int) -> tuple[Tensor, Tensor]:
            return generate(length, pairs, some, own, vocabulary=vocabulary, start=start)

        return Group(f"{length}x{pairs}", length, count, read)

    return assemble("mqar", vocabulary, (train, validation, test), seed, make)
