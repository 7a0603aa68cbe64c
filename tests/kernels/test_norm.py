"""Norms beyond conformance: against torch's own, extremes, half precision, bad input."""

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, EXACT, Draw, assert_close, assert_same, error
from triton_checks import CLOSE, check_configurations

from palimpsest.kernels import l2_norm, rms_norm

BACKENDS = ["reference", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_what_it_says(backend: str) -> None:
    source = Draw(0, torch.float64)
    x, weight, gate = source.normal(2, 3, 4, 5), source.normal(5), source.normal(2, 3, 4, 5)
    wanted = F.rms_norm(x, (5,), weight, 1e-3)
    assert_close([rms_norm(x, weight, eps=1e-3, backend=backend)], [wanted], EXACT, "weight")
    assert_close([rms_norm(x, weight, gate=gate, eps=1e-3, backend=backend)], [wanted * F.silu(gate)], EXACT, "gate")
    assert_close([l2_norm(x, eps=0.1, backend=backend)], [x / (x.square().sum(-1, True) + 0.1).sqrt()], EXACT, "l2")


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_stay_zero(backend: str) -> None:
    for norm in (rms_norm, l2_norm):
        x = torch.zeros(2, 3, requires_grad=True)
        y = norm(x, backend=backend)
        y.sum().backward()
        assert_same([y.detach()], [torch.zeros(2, 3)], "value")
        assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(backend: str) -> None:
    """Squares of 300 exceed float16, and a sum of 4096 ones exceeds bfloat16's 8 bits."""
    x = torch.full((2, 4096), 300.0, dtype=torch.float16)
    assert error(rms_norm(x, backend=backend), torch.ones(2, 4096)) < 2**-10
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert error(l2_norm(ones, backend=backend), torch.full((1, 4096), 1 / 64)) < 2**-8


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    x = Draw(0, torch.float64).normal(*shape).requires_grad_()
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    found, wanted = (rms_norm(x, weight, gate=x, backend=backend) for backend in ("torch", "reference"))
    assert found.shape == shape
    assert_close([found], [wanted], EXACT, "value")
    gradients = [torch.autograd.grad(y.sum(), (x, weight), materialize_grads=True) for y in (found, wanted)]
    assert_close(*gradients, EXACT, "gradients")


@pytest.mark.parametrize("weight, gate", [(False, False), (True, False), (False, True), (True, True)])
def test_kernels_over_many_rows(weight: bool, gate: bool) -> None:
    """More rows than one program of the backward takes, of a width that is no power of two, in a wider tensor."""
    source = Draw(0, torch.float64)
    x, gates, scale = source.normal(3, 50, 21), source.normal(3, 50, 20), source.normal(20)

    def run(backend: str, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(DEVICE, kind).requires_grad_() for t in (x, scale, gates)]
        y = rms_norm(
            leaves[0][..., :20], leaves[1] if weight else None, gate=leaves[2] if gate else None, backend=backend
        )
        wanted = [leaves[0], *leaves[1 : 1 + weight], *leaves[2 : 2 + gate]]
        return [y.detach(), *torch.autograd.grad((y * source.normal(3, 50, 20).to(y)).sum(), wanted)]

    source = Draw(1, torch.float64)
    found = run("triton", torch.float32)
    source = Draw(1, torch.float64)
    assert_close(found, run("reference", torch.float64), CLOSE, "rms_norm")


def test_every_configuration_is_right() -> None:
    for width in (20, 3000):
        x, gate = (torch.zeros(2, width, requires_grad=True) for _ in range(2))
        weight = torch.zeros(width, requires_grad=True)
        check_configurations(lambda x=x, w=weight, g=gate: rms_norm(x, w, gate=g, backend="triton").sum().backward())


def test_what_the_kernels_do_not_cover_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^x.dtype was float64; it must be float32 or narrower for backend 'triton'"):
        l2_norm(torch.zeros(2, 5, dtype=torch.float64, device=DEVICE), backend="triton")
    with pytest.raises(ValueError, match=r"^D of x was 16385; it must be at most 16384 for backend 'triton'"):
        rms_norm(torch.zeros(2, 16385, device=DEVICE), backend="triton")


@pytest.mark.parametrize(
    "change, name",
    [
        ({"x": 1.0}, "x"),
        ({"x": torch.zeros(())}, "x.shape"),
        ({"x": torch.zeros(2, 0)}, "x.shape"),
        ({"x": torch.zeros(2, 5, dtype=torch.int64)}, "x.dtype"),
        ({"weight": torch.zeros(4)}, "weight.shape"),
        ({"weight": torch.zeros(5, dtype=torch.int64)}, "weight.dtype"),
        ({"weight": torch.zeros(5, device="meta")}, "weight.device"),
        ({"gate": torch.zeros(5)}, "gate.shape"),
        ({"gate": torch.zeros(2, 5, dtype=torch.bool)}, "gate.dtype"),
        ({"gate": torch.zeros(2, 5, device="meta")}, "gate.device"),
        ({"eps": 0.0}, "eps"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        rms_norm(**({"x": torch.zeros(2, 5)} | change))  # type: ignore[arg-type]
    if set(change) <= {"x", "eps", "backend"}:
        with pytest.raises(ValueError, match=f"^{name}"):
            l2_norm(**({"x": torch.zeros(2, 5)} | change))  # type: ignore[arg-type]
