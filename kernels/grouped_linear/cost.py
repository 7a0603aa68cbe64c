"""What a grouped linear map must compute and move, from shapes alone."""

from collections.abc import Sequence
from math import prod

from ..op import Cost


def cost(
    x: Sequence[int], weight: Sequence[int], choices: int, *, itemsize: int = 4, backward: bool = False
) -> Cost:  # fmt: skip
    """Cost of one call, ``x`` [B, T, in] and ``weight`` [M', in, out] being shapes: a product for each choice.

    Backward makes two: for the input and for the weight.
    """
    slots = x[0] * x[1] * choices
    times = 2 if backward else 1
    moved = times * (prod(x) + prod(weight)) + slots * weight[2]
    return Cost(times * 2 * slots * weight[1] * weight[2], moved * itemsize)
