"""The attentional biases of neural memory in Triton: the residual r = M(k) − v to the error e, and back.

``"l2"`` and ``"dot"``: e is the residual, which for dot is −v. ``"lp"``: e = tanh(ν r) (r² + ε)^((p−1)/2). ``"huber"``:
e = r where ‖r‖ ≤ δ, else δ r / ‖r‖; δ, a token's threshold, is one number for each row of r.

A residual is a tile [C, D] or one vector [D]; thresholds are [C, 1] or [1]. ``BIAS``: the name, and of lp p, ν and ε.
"""

import triton
import triton.language as tl


@triton.jit
def load_thresholds(ptr, tok, valid, D: tl.constexpr, BIAS: tl.constexpr):
    """δ of a step's tokens at offsets ``tok`` in [B, T, H, D]; zeros in slots without one, and where there is no δ."""
    thresholds = tl.zeros(tok.shape, tl.float32)
    if BIAS[0] == "huber":
        thresholds = tl.load(ptr + tok // D, mask=valid, other=0.0)
    return thresholds


@triton.jit
def tanh(x):
    """tanh(x), by an exponential that cannot overflow."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def smooth_power(square, POWER: tl.constexpr):
    """(r² + ε)^((p−1)/2) of r² + ε, which is above zero."""
    if POWER == 3.0:
        return square
    else:
        return tl.exp(tl.log(square) * ((POWER - 1.0) / 2.0))


@triton.jit
def beyond(residual, threshold):
    """Whether ‖r‖ is above the threshold, and 1 / ‖r‖ where it is, else 1: in 0 it has no derivative."""
    square = tl.sum(residual * residual, -1, keep_dims=True)
    far = square > threshold * threshold
    return far, 1.0 / tl.sqrt(tl.where(far, square, 1.0))


@triton.jit
def error_of(residual, threshold, BIAS: tl.constexpr):
    """e of r."""
    error = residual
    if BIAS[0] == "lp":
        error = tanh(BIAS[2] * residual) * smooth_power(residual * residual + BIAS[3], BIAS[1])
    if BIAS[0] == "huber":
        far, inverse = beyond(residual, threshold)
        error = residual * tl.where(far, threshold * inverse, 1.0)
    return error


@triton.jit
def residual_backward(d_error, residual, threshold, BIAS: tl.constexpr):
    """The gradients of r, and of a huber's δ (of all others it is that of nothing), from that of e."""
    d_residual = d_error
    d_threshold = threshold
    if BIAS[0] == "lp":
        sign = tanh(BIAS[2] * residual)
        square = residual * residual + BIAS[3]
        power = smooth_power(square, BIAS[1])
        slope = BIAS[2] * (1.0 - sign * sign) * power + sign * ((BIAS[1] - 1.0) * residual * power / square)
        d_residual = d_error * slope
    if BIAS[0] == "huber":
        far, inverse = beyond(residual, threshold)
        along = tl.sum(d_error * residual, -1, keep_dims=True) * inverse
        d_residual = tl.where(far, threshold * inverse * (d_error - residual * (along * inverse)), d_error)
        d_threshold = tl.where(far, along, 0.0)
    return d_residual, d_threshold
