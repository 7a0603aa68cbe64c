"""What a short convolution must compute and move, from shapes alone."""

from collections.abc import Sequence
from math import prod

from ..op import Cost


def cost(x: Sequence[int], weight: Sequence[int], *, itemsize: int = 4, backward: bool = False) -> Cost:
    """Cost of one call, ``x`` [B, T, C] and ``weight`` [C, K] being shapes; activation and bias are not counted.

    Backward makes two such sums: for the input and for the weight.
    """
    flops = 2 * prod(x) * weight[1]
    tensors = 3 if backward else 2
    return Cost((2 if backward else 1) * flops, (tensors * prod(x) + (tensors - 1) * prod(weight)) * itemsize)
