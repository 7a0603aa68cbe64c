"""Small functions that Triton kernels of several operations share. Imports triton: only kernels import it."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp may overflow to infinity, of which this makes 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu_slope(x):
    """Derivative of x * sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def tanh(x):
    """Hyperbolic tangent from exponentials that cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def document_of(borders, token, documents, steps):
    """Document number of each token of a packed row, by bisection in ``borders`` [documents + 1].

    ``steps`` halvings are enough for ``documents``: (documents - 1).bit_length(). Empty documents own no token. A token
    past the end counts to the last document.
    """
    low = token * 0
    high = low + documents - 1
    for _ in range(steps):
        middle = (low + high + 1) // 2
        reached = tl.load(borders + middle) <= token
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low
