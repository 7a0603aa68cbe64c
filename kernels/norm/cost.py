"""What a normalisation must compute and move, from shapes alone."""

from collections.abc import Sequence
from math import prod

from ..op import Cost


def cost(
    x: Sequence[int], *, weight: bool = False, gate: bool = False, itemsize: int = 4, backward: bool = False
) -> Cost:
    """Cost of one call on a shape: it is bound by memory, so additions and products are counted roughly.

    Per element: square, add and scale (3), one for a weight, five for a gate's silu and product; backward twice that.
    """
    size = prod(x)
    flops = size * (3 + weight + 5 * gate) * (2 if backward else 1)
    tensors = (3 + 2 * gate) if backward else (2 + gate)
    return Cost(flops, (tensors * size + weight * x[-1] * (2 if backward else 1)) * itemsize)
