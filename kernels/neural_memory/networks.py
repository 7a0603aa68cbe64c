"""The memory networks and inner losses in plain differentiable torch: forward, and the errors that a write is made of.

Every layer is a product with one matrix, so that the inner gradient of each is x_jᵀ δ_j: x the layer's input for key j,
δ the error at its output. Who computes the products decides at which weights: :func:`forward` takes them as a function.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .chunked import CUBE, SLOPE
from .spec import LAYER_NORM_EPS, MemorySpec


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """gelu in its tanh form, x σ(w), and its derivative."""
    square = x * x
    sigma = torch.sigmoid(x * (SLOPE + CUBE * square))
    return x * sigma, sigma + x * sigma * (1.0 - sigma) * (SLOPE + 3.0 * CUBE * square)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """silu and its derivative."""
    sigma = torch.sigmoid(x)
    return x * sigma, sigma * (1.0 + x * (1.0 - sigma))


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x − mean) / std over the last dim, and 1 / std."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
    return centred * rstd, rstd


def forward(x: Tensor, product: Callable[[int, Tensor], Tensor], norm: Tensor | None, spec: MemorySpec) -> Tensor:
    """M(x): ``product`` (i, h) is h times the i-th matrix; norm fits [..., out]."""
    if spec.network == "gated_mlp":
        out = product(1, _silu(product(0, x))[0] * product(2, x))
    else:
        out = product(0, x)
        for i in range(1, spec.layers):
            out = product(i, _gelu(out)[0])
    if norm is not None:
        out = _unit(out)[0] * norm
    return x + out if spec.residual else out


def error(out: Tensor, v: Tensor, delta: Tensor | None, spec: MemorySpec) -> Tensor:
    """The inner loss's gradient in M(k) = out; out, v [..., D], δ [...] for huber."""
    if spec.bias == "dot":
        return -v
    r = out - v
    if spec.bias == "lp":
        return torch.tanh(spec.lp_sharpness * r) * (r * r + spec.lp_smoothing).pow((spec.lp_power - 1.0) / 2.0)
    if delta is None:
        return r
    square, delta = (r * r).sum(-1, keepdim=True), delta.unsqueeze(-1)
    far = square > delta * delta
    return r * torch.where(far, delta * torch.where(far, square, 1.0).rsqrt(), 1.0)  # 1/‖r‖ has no derivative at 0


def inner_pass(
    k: Tensor, v: Tensor, delta: Tensor | None, weights: Sequence[Tensor], norm: Tensor | None, spec: MemorySpec
) -> tuple[list[Tensor], list[Tensor]]:
    """x and δ of every matrix for keys and values [M, c, ·] at ``weights`` [M, in, out]; norm [M, 1, out]."""
    inputs, slopes = [k], []
    last = torch.bmm(k, weights[0])
    if spec.network == "gated_mlp":
        (active, slope), up = _silu(last), torch.bmm(k, weights[2])
        inputs += [active * up, k]
        last = torch.bmm(inputs[1], weights[1])
    else:
        for weight in weights[1:]:
            hidden, slope = _gelu(last)
            inputs.append(hidden)
            slopes.append(slope)
            last = torch.bmm(hidden, weight)
    unit = rstd = None
    out = last
    if norm is not None:
        unit, rstd = _unit(last)
        out = unit * norm
    last_error = error(out + k if spec.residual else out, v, delta, spec)
    if norm is not None and unit is not None and rstd is not None:
        scaled = last_error * norm
        along = (scaled * unit).mean(-1, keepdim=True)
        last_error = rstd * (scaled - scaled.mean(-1, keepdim=True) - unit * along)
    if spec.network == "gated_mlp":
        back = torch.bmm(last_error, weights[1].mT)
        return inputs, [back * up * slope, last_error, back * active]
    errors = [last_error]
    for i in range(len(weights) - 1, 0, -1):
        errors.append(torch.bmm(errors[-1], weights[i].mT) * slopes[i - 1])
    return inputs, errors[::-1]
