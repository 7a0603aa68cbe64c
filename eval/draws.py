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
