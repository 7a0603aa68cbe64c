"""What routing must compute and move, from shapes alone."""

from collections.abc import Sequence
from math import prod

from ..op import Cost


def route_cost(logits: Sequence[int], top_k: int, *, itemsize: int = 4, backward: bool = False) -> Cost:
    """Cost of :func:`palimpsest.kernels.route`, ``logits`` [B, T, M] being a shape; the sort adds bytes alone.

    Per logit: maximum, difference, exponential, sum, quotient and one comparison a choice; backward: product, sum,
    difference and product.
    """
    tokens, size = prod(logits[:2]), prod(logits)
    if backward:
        return Cost(4 * (size + tokens * top_k), 2 * 4 * size + itemsize * size + tokens * top_k * (4 + 4 + 8))
    return Cost((5 + top_k) * size, (itemsize + 4) * size + tokens * top_k * (4 + 3 * 8))


def dispatch_cost(x: Sequence[int], choices: int, *, itemsize: int = 4, backward: bool = False) -> Cost:
    """Cost of a dispatch of ``x`` [B, T, C]: a copy; backward adds up each token's choices."""
    size = prod(x)
    return Cost((choices - 1) * size if backward else 0, (1 + choices) * size * itemsize + 8 * prod(x[:2]) * choices)


def combine_cost(y: Sequence[int], weight: Sequence[int], *, itemsize: int = 4, backward: bool = False) -> Cost:
    """Cost of a combination of ``y`` [1, S, C] with ``weight`` [B, T, K]: a product and a sum for each entry.

    Backward multiplies the gradient with the weight, and adds up its product with y.
    """
    size, small = prod(y), prod(weight)
    moved = (2 if backward else 1) * size + size // weight[-1]
    return Cost((3 if backward else 2) * size, moved * itemsize + ((8 if backward else 4) + 8) * small)
