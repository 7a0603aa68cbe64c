"""Random draws that are the same on every machine and with every library version: integers only, no global state.

Counter-based, on the finaliser of SplitMix64 (:func:`palimpsest.train.split.mix64`): draw ``i`` is a pure function of
(seed, stream, i), and a whole array costs one vectorised expression.
"""

import numpy as np
from numpy.typing import NDArray

from ..train.split import derive, mix64


def words(seed: int, stream: str, count: int, start: int = 0) -> NDArray[np.uint64]:
    """Draws ``start`` … ``start + count - 1`` of the stream: uint64 [count], uniform over all 64 bits.

    ``stream`` is a name; streams of different names are independent of each other.

    Raises:
        ValueError: for a seed outside 0 … 2^63 - 1.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed was {seed}; it must be from 0 to 2^63 - 1")
    index = np.arange(start, start + count, dtype=np.uint64)
    return mix64(mix64(index) ^ np.uint64(derive(seed, *stream.encode())))


def integers(seed: int, stream: str, count: int, low: int, high: int, start: int = 0) -> NDArray[np.int64]:
    """Integers from ``low`` to ``high - 1``: int64 [count]. The bias of the remainder is below (high - low) / 2^64.

    Raises:
        ValueError: for an empty range, or a seed out of its range.
    """
    if not low < high:
        raise ValueError(f"high was {high}; it must be greater than low = {low}")
    return (words(seed, stream, count, start) % np.uint64(high - low)).astype(np.int64) + low


def distinct(seed: int, stream: str, rows: int, count: int, low: int, high: int, start: int = 0) -> NDArray[np.int64]:
    """Integers of [low, high), no two in a row alike: [rows, count]. Row r is a function of (seed, start + r).

    Raises:
        ValueError: for a range with fewer than ``count`` integers.
    """
    if high - low < count:
        raise ValueError(f"count was {count}; it must be at most {high - low}, the integers of [{low}, {high})")
    kinds = high - low
    if 2 * count > kinds:  # most of them: the order of random numbers
        order = words(seed, f"{stream} order", rows * kinds, start * kinds).reshape(rows, kinds)
        return np.argsort(order, 1, kind="stable")[:, :count] + low
    width = min(4 * kinds, count + 64 + count // 2)
    found = np.empty((rows, count), np.int64)
    todo, attempt = np.arange(rows), 0
    while len(todo):
        drawn = integers(seed, f"{stream} {attempt}", rows * width, low, high, start * width)
        drawn = drawn.reshape(rows, width)[todo]
        new = first_of(drawn) == np.arange(width)
        enough = new.sum(1) >= count
        place = np.argsort(~new, 1, kind="stable")[:, :count]
        found[todo[enough]] = np.take_along_axis(drawn, place, 1)[enough]
        todo, attempt = todo[~enough], attempt + 1
    return found


def arrange(seed: int, stream: str, rows: int, count: int, kinds: int | NDArray, start: int = 0) -> NDArray[np.int64]:
    """The first ``count`` of a permutation of 0 … kinds − 1 in each row: [rows, count]; for few, as it costs count².

    ``kinds`` may be an array [rows], each at least ``count``. Row r is a function of (seed, start + r).
    """
    drawn = words(seed, stream, rows * count, start * count).reshape(rows, count)
    found = np.empty((rows, count), np.int64)
    for i in range(count):
        place = (drawn[:, i] % np.asarray(kinds - i, np.uint64)).astype(np.int64)  # among those that are not taken
        for taken in np.sort(found[:, :i], 1).T:
            place += place >= taken
        found[:, i] = place
    return found


def first_of(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each value stands in its row for the first time: [rows, n] column numbers."""
    order = np.argsort(values, 1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    begins = np.zeros_like(order)
    begins[:, 1:] = np.where(ordered[:, 1:] != ordered[:, :-1], np.arange(1, values.shape[1]), 0)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, np.maximum.accumulate(begins, 1), 1), 1)
    return first


def uniform(seed: int, stream: str, count: int, start: int = 0) -> NDArray[np.float64]:
    """Multiples of 2^-53 in [0, 1): float64 [count]."""
    return (words(seed, stream, count, start) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def exponential(seed: int, stream: str, count: int, start: int = 0) -> NDArray[np.float64]:
    """Draws of mean 1: −ln u for u in (0, 1], float64 [count].

    The logarithm is a series of sums and products, which IEEE 754 fixes to the bit; a library's own may differ in its
    last bit from machine to machine.
    """
    u = ((words(seed, stream, count, start) >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53
    mantissa, exponent = np.frexp(u)  # in [1/2, 1)
    z = (mantissa - 1.0) / (mantissa + 1.0)  # ln m = 2 (z + z³/3 + z⁵/5 …), |z| <= 1/3
    square, series = z * z, np.zeros_like(z)
    for power in range(33, 0, -2):
        series = series * square + 1.0 / power
    return -(2.0 * z * series + exponent * 0.6931471805599453)
