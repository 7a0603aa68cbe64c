"""The Newton-Schulz iteration beyond conformance: what it does to singular values, shapes, cost, kernels, bad input."""

import pytest
import torch
from harness import DEVICE, EXACT, SINGLE, Draw, assert_close, error
from torch.utils.flop_counter import FlopCounterMode
from triton_checks import check_configurations

from palimpsest.kernels import newton_schulz
from palimpsest.kernels.newton_schulz import chunked
from palimpsest.kernels.newton_schulz.cost import cost


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)])
def test_singular_values_follow_the_polynomial(backend: str, shape: tuple[int, int]) -> None:
    x = Draw(0, torch.float64).normal(3, *shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert_close([newton_schulz(x, eps=1e-20, backend=backend)], [u * s[:, None] @ v], 1e-10, str(shape))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_exact_coefficients_make_orthogonal_matrices(backend: str) -> None:
    """(15, -10, 3) / 8 has a fixed point of third order at 1: the rows of a well-conditioned matrix end orthonormal."""
    x = torch.eye(4, 7, dtype=torch.float64) + 0.1 * Draw(0, torch.float64).normal(4, 7)
    y = newton_schulz(x, 12, coefficients=(15 / 8, -10 / 8, 3 / 8), backend=backend)
    assert_close([y @ y.T], [torch.eye(4, dtype=torch.float64)], EXACT, "orthonormal rows")


def test_transposed_is_transposed() -> None:
    x = Draw(0, torch.float64).normal(2, 3, 4, 6)
    assert_close([newton_schulz(x.mT).mT], [newton_schulz(x)], EXACT, "values")
    assert newton_schulz(x[:0]).shape == (0, 3, 4, 6)
    assert error(newton_schulz(x, 0), x / x.square().sum((-1, -2), keepdim=True).sqrt()) < EXACT


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_zeros_stay_zeros(backend: str) -> None:
    x = torch.zeros(2, 3, 4, device=DEVICE, requires_grad=True)
    y = newton_schulz(x, backend=backend)
    y.sum().backward()
    assert not y.any() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_cost_is_that_of_its_products(steps: int) -> None:
    x = torch.randn(3, 4, 7)
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            arguments = (x, steps, 3.0, -4.0, 2.0, 1e-7)
            chunked.backward(x, *arguments) if backward else chunked.forward(*arguments)
        assert cost(x.shape, steps, backward=backward).flops == counter.get_total_flops()


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (16, 16), (70, 130)])
def test_kernels_of_other_shapes(shape: tuple[int, int]) -> None:
    """The last one has several tiles in each direction, the last of them not full."""

    def run(backend: str, kind: torch.dtype) -> list[torch.Tensor]:
        x = Draw(0, kind).normal(2, *shape).to(DEVICE).requires_grad_()
        y = newton_schulz(x, 3, backend=backend)
        return [y.detach(), *torch.autograd.grad((y * Draw(1, kind).normal(*y.shape).to(DEVICE)).sum(), x)]

    assert_close(run("triton", torch.float32), run("reference", torch.float64), SINGLE, str(shape))


def test_every_configuration_is_right() -> None:
    def call() -> None:
        x = torch.empty(2, 17, 40, requires_grad=True)
        newton_schulz(x, 3, backend="triton").sum().backward()

    check_configurations(call)


def test_what_the_kernels_do_not_cover_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^x.dtype was float64; it must be float32 or narrower for backend 'triton'"):
        newton_schulz(torch.zeros(2, 2, dtype=torch.float64, device=DEVICE), backend="triton")
    with pytest.raises(
        ValueError, match=r"^x.shape was \(1, 2, 513\); it must be \[..., m, n\] with m, n <= 512 and one"
    ):
        newton_schulz(torch.zeros(1, 2, 513, device=DEVICE), backend="triton")
    with pytest.raises(ValueError, match=r"^x.shape was \(129, 129\)"):
        newton_schulz(torch.zeros(129, 129, device=DEVICE), backend="triton")


@pytest.mark.parametrize(
    "change, name",
    [
        ({"x": 1.0}, "x"),
        ({"x": torch.zeros(3)}, "x.shape"),
        ({"x": torch.zeros(3, 0)}, "x.shape"),
        ({"x": torch.zeros(3, 3, dtype=torch.int64)}, "x.dtype"),
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"coefficients": (1.0, 2.0)}, "coefficients"),
        ({"eps": 0.0}, "eps"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        newton_schulz(**({"x": torch.zeros(2, 3, 3)} | change))  # type: ignore[arg-type]
