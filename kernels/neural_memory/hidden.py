"""The hidden units of a memory of more than one matrix, in Triton: what they make of their pre-activations, and back.

``LAYERS``, the memory's matrices: 2 for gelu(x W1) W2, 3 for (silu(x W1) ⊙ x W3) W2. A pre-activation x W1 is
``before``, and x W3 ``above``; where there is no W3, whatever stands for it is not looked at. Kernels hold W1, W3, W2.
"""

import triton
import triton.language as tl

# gelu in its tanh form is x σ(w), w = SLOPE x + CUBE x³.
SLOPE = tl.constexpr(1.5957691216057308)
CUBE = tl.constexpr(0.07135481627159471)


@triton.jit
def gelu(x):
    """gelu(x), and the σ(w) its derivatives are made of."""
    sigma = 1.0 / (1.0 + tl.exp(-x * (SLOPE + CUBE * x * x)))
    return x * sigma, sigma


@triton.jit
def gelu_slope(x, sigma):
    """gelu′(x) = σ + x σ(1 − σ) w′."""
    return sigma + x * sigma * (1.0 - sigma) * (SLOPE + 3.0 * CUBE * x * x)


@triton.jit
def gelu_curve(x, sigma):
    """gelu″(x) = σ(1 − σ) (2 w′ + x (w″ + (1 − 2σ) w′²))."""
    rate = SLOPE + 3.0 * CUBE * x * x
    return sigma * (1.0 - sigma) * (2.0 * rate + x * (6.0 * CUBE * x + (1.0 - 2.0 * sigma) * rate * rate))


@triton.jit
def silu(x):
    """silu(x) = x σ(x), and σ(x)."""
    sigma = 1.0 / (1.0 + tl.exp(-x))
    return x * sigma, sigma


@triton.jit
def silu_slope(x, sigma):
    """silu′(x) = σ + x σ(1 − σ)."""
    return sigma + x * sigma * (1.0 - sigma)


@triton.jit
def silu_curve(x, sigma):
    """silu″(x) = σ(1 − σ) (2 + x (1 − 2σ))."""
    return sigma * (1.0 - sigma) * (2.0 + x * (1.0 - 2.0 * sigma))


@triton.jit
def hidden_of(before, above, LAYERS: tl.constexpr):
    """The hidden vector h."""
    if LAYERS == 3:
        return silu(before)[0] * above
    else:
        return gelu(before)[0]


@triton.jit
def hidden_slopes(before, above, LAYERS: tl.constexpr):
    """∂h/∂before and ∂h/∂above; without W3 the first twice."""
    if LAYERS == 3:
        active, sigma = silu(before)
        return above * silu_slope(before, sigma), active
    else:
        slope = gelu_slope(before, gelu(before)[1])
        return slope, slope


@triton.jit
def hidden_curve(before, above, LAYERS: tl.constexpr):
    """∂²h/∂before²."""
    if LAYERS == 3:
        return above * silu_curve(before, silu(before)[1])
    else:
        return gelu_curve(before, gelu(before)[1])


@triton.jit
def hidden_backward(d_hidden, before, above, LAYERS: tl.constexpr):
    """From the gradient of h to those of ``before`` and of ``above``; from B to Δ of W1 and of W3 likewise."""
    slope, slope_above = hidden_slopes(before, above, LAYERS)
    return d_hidden * slope, d_hidden * slope_above
