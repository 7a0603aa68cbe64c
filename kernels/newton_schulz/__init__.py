"""Orthogonalisation of matrices by a Newton-Schulz iteration."""

from torch import Tensor

from .. import check
from ..op import register
from . import operator, reference
from .cost import cost

__all__ = ["newton_schulz"]

OPERATION = register(
    "newton_schulz",
    cost=cost,
    reference=reference.newton_schulz,
    torch=operator.newton_schulz,
    triton=operator.newton_schulz_triton,
)

NARROW, WIDE = 128, 512  # a program of the Triton kernels goes through all of a matrix


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    *,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    backend: str | None = None,
) -> Tensor:
    """Brings the singular values of matrices near 1, as Muon does with its momentum (Jordan et al. 2024).

        X_0 = x / sqrt(|x|_F^2 + eps^2)
        X_{i+1} = a X_i + (b A + c A^2) X_i     A = X_i X_i^T, or for m > n the same of the transposed matrices

    Each step takes a singular value s to a s + b s^3 + c s^5, for Muon's coefficients a map onto about 0.7 .. 1.2.
    Small ones grow by a = 3.4 a step, and rounding with them.

    Args:
        x: [..., m, n], float16, bfloat16, float32 or float64. Sums are float32 at least; Triton multiplies half
            precision in its own dtype, which leaves about 0.03 of the result's root mean square as error in bfloat16
            after 5 steps and 0.003 in float16.
        steps: >= 0.
        coefficients: (a, b, c).
        eps: > 0; a matrix of zeros stays one, and its gradient finite.
        backend: "reference", "torch" or "triton" (not float64; m, n <= 512, one of them <= 128); None: see
            :func:`palimpsest.kernels.backend.resolve`.

    Returns: the last X, in x's shape and dtype.

    Raises:
        ValueError: naming the argument whose shape, dtype or value does not fit.
    """
    _check(x, steps, coefficients, eps)
    a, b, c = (float(number) for number in coefficients)
    matrices = x.reshape(-1, *x.shape[-2:])
    y = OPERATION.choose(x.device, backend, _unfit(x))(matrices, steps, a, b, c, float(eps))
    return y.view(x.shape)


def _unfit(x: Tensor) -> tuple[str, object, str] | None:
    """Why the Triton kernels do not cover a call."""
    small, large = sorted(x.shape[-2:])
    if small > NARROW or large > WIDE:
        return "x.shape", tuple(x.shape), f"be [..., m, n] with m, n <= {WIDE} and one of them <= {NARROW}"
    return check.no_float64("x", x)


def _check(x: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> None:
    check.require(isinstance(x, Tensor), "x", type(x).__name__, "be a tensor [..., m, n]")
    fits = x.dim() >= 2 and min(x.shape[-2:]) > 0
    check.require(fits, "x.shape", tuple(x.shape), "be [..., m, n] with m, n >= 1")
    check.dtype("x", x, check.FLOATS)
    check.require(isinstance(steps, int) and steps >= 0, "steps", steps, "be an integer >= 0")
    triple = isinstance(coefficients, tuple | list) and len(coefficients) == 3
    check.require(triple, "coefficients", coefficients, "be three numbers (a, b, c)")
    check.require(eps > 0, "eps", eps, "be > 0")
