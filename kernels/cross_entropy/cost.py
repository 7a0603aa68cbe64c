"""What the loss over a vocabulary must compute and move, from shapes alone."""

from collections.abc import Sequence
from math import prod

from ..op import Cost


def cost(
    x: Sequence[int], weight: Sequence[int], *, reduction: str = "mean", itemsize: int = 4, backward: bool = False
) -> Cost:
    """Cost of one call, ``x`` [..., d] and ``weight`` [V, d] being shapes.

    One product forward and two backward. Without a reduction the logits are computed a second time for the backward,
    since the gradient of each token's loss is not known before and logits are never kept.
    """
    vocabulary, width = weight
    tokens = prod(x[:-1])
    products = (3 if reduction == "none" else 2) if backward else 1
    tensors = 2 if backward else 1
    moved = tensors * (tokens * width + vocabulary * width) * itemsize + 8 * tokens + 4 * tokens
    return Cost(products * 2 * tokens * vocabulary * width, moved)


def forward_flops(x: Sequence[int], weight: Sequence[int], *_: object, out_shape: object) -> int:
    """Of the operators that compute losses, by their first arguments."""
    return cost(x, weight).flops


def backward_flops(grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: object, out_shape: object) -> int:
    """Of the operators that compute the gradients for given gradients of losses."""
    return cost(x, weight, reduction="none", backward=True).flops
