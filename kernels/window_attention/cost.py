"""What attention over a window must compute and move, from shapes alone."""

from collections.abc import Sequence
from math import prod

from ..op import Cost


def pairs(length: int, window: int | None, cached: int = 0, prefix: int = 0) -> int:
    """Query-key pairs of one row: each token sees the prefix, itself and at most ``window`` - 1 tokens before it."""
    span = length + cached if window is None else window
    growing = max(0, min(length, span - cached))  # queries that still see everything before them
    return growing * cached + growing * (growing + 1) // 2 + (length - growing) * span + length * prefix


def cost(
    q: Sequence[int],
    k: Sequence[int],
    *,
    window: int | None = None,
    prefix: int = 0,
    cached: int = 0,
    itemsize: int = 4,
    backward: bool = False,
) -> Cost:
    """Cost of one call, ``q`` and ``k`` being shapes; ``prefix`` and ``cached`` are token counts per row.

    Two products forward; backward five, because probabilities are computed again: keeping them would need memory
    quadratic in the length. A packed row counts as one document, which is an upper bound.
    """
    batch, length, heads, width = q
    products = 5 if backward else 2
    flops = products * 2 * width * heads * batch * pairs(length, window, cached, prefix)
    keys = 2 * (prod(k) + batch * cached * k[2] * width + prefix * k[2] * width)
    moved = (4 if backward else 2) * prod(q) + (2 if backward else 1) * keys
    return Cost(flops, moved * itemsize + 4 * batch * length * heads)
