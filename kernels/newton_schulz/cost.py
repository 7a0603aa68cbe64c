"""What a Newton-Schulz iteration must compute and move, from shapes alone."""

from collections.abc import Sequence
from math import prod

from ..op import Cost


def cost(x: Sequence[int], steps: int = 5, *, itemsize: int = 4, backward: bool = False) -> Cost:
    """Cost of one call on a shape [..., m, n]; with k and l the smaller and the larger of m and n.

    A step makes X X^T and its product with X, 2 k^2 l each, and A^2, 2 k^3. The backward of a step makes these
    products once more and as many again; before it, all steps but the last are repeated.
    """
    small, large = sorted(x[-2:])
    matrices = prod(x[:-2])
    step = 4 * small**2 * large + 2 * small**3
    flops = (max(0, steps - 1) + 2 * steps) * step if backward else steps * step
    return Cost(matrices * flops, (3 if backward else 2) * prod(x) * itemsize)
