"""Normalisation of tokens: root mean square, with weight and gate, and unit length."""

from torch import Tensor

from .. import check
from ..op import register
from . import chunked, fused, reference
from .cost import cost

__all__ = ["l2_norm", "rms_norm"]

BACKENDS = {"reference": reference.normalise, "torch": chunked.normalise, "triton": fused.normalise}
RMS_NORM = register("rms_norm", cost=cost, **BACKENDS)
L2_NORM = register("l2_norm", cost=cost, **BACKENDS)

WIDEST = 16384  # a row lies in the registers of one program


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019, eq. 4), optionally gated.

        y = x / sqrt(mean(x^2) + eps) * weight * silu(gate)

    Args:
        x: [..., D], float16, bfloat16, float32 or float64; half precision is computed in float32.
        weight: [D] or None for ones.
        gate: in x's shape, or None for no gate.
        eps: added to the mean of squares, > 0.
        backend: "reference", "torch" or "triton" (not float64, D <= 16384); None: see
            :func:`palimpsest.kernels.backend.resolve`.

    Returns: y in x's shape and dtype.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    _check(x, weight, gate, eps)
    return RMS_NORM.choose(x.device, backend, _unfit(x))(x, weight, gate, float(eps), True)


def l2_norm(x: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """Unit length over the last dimension, as linear memories normalise keys and queries.

        y = x / sqrt(sum(x^2) + eps)

    Args:
        x: [..., D], float16, bfloat16, float32 or float64; half precision is computed in float32.
        eps: added to the sum of squares, > 0; a zero vector stays zero.
        backend: "reference", "torch" or "triton" (not float64, D <= 16384); None: see
            :func:`palimpsest.kernels.backend.resolve`.

    Returns: y in x's shape and dtype.

    Raises:
        ValueError: naming the argument whose shape, dtype or value does not fit.
    """
    _check(x, None, None, eps)
    return L2_NORM.choose(x.device, backend, _unfit(x))(x, None, None, float(eps), False)


def _unfit(x: Tensor) -> tuple[str, object, str] | None:
    """Why the Triton kernels do not cover a call."""
    if x.shape[-1] > WIDEST:
        return "D of x", x.shape[-1], f"be at most {WIDEST}"
    return check.no_float64("x", x)


def _check(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> None:
    check.require(isinstance(x, Tensor), "x", type(x).__name__, "be a tensor [..., D]")
    check.require(x.dim() >= 1 and x.shape[-1] > 0, "x.shape", tuple(x.shape), "be [..., D] with D >= 1")
    check.dtype("x", x, check.FLOATS)
    check.require(eps > 0, "eps", eps, "be > 0")
    if weight is not None:
        check.shape("weight", weight, (x.shape[-1],), "[D]")
        check.dtype("weight", weight, check.FLOATS)
        check.device("weight", weight, x.device)
    if gate is not None:
        check.shape("gate", gate, x.shape, "[..., D] like x")
        check.dtype("gate", gate, check.FLOATS)
        check.device("gate", gate, x.device)
