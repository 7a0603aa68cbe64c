"""Registered operators: called without the dispatcher only where nobody can be looking, and the same either way."""

import pytest
import torch
from harness import Recorder
from torch import Tensor

from palimpsest.kernels import rms_norm


def drawn(**kind) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=draw).to(**kind).requires_grad_() for shape in ((3, 5, 8), (8,)))


def test_a_plain_call_takes_the_short_way_and_a_watched_one_the_dispatcher() -> None:
    x, weight = drawn()
    short = rms_norm(x, weight)
    with Recorder() as recorder:
        watched = rms_norm(x, weight)
        found = torch.autograd.grad(watched.square().sum(), (x, weight))
    assert [str(call[0]) for call in recorder.calls] == ["palimpsest.norm.default", "palimpsest.norm_backward.default"]
    assert short.grad_fn is not None and short.grad_fn.name() == "normBackward"
    assert torch.equal(short, watched)
    for a, b in zip(found, torch.autograd.grad(short.square().sum(), (x, weight)), strict=True):
        assert torch.equal(a, b)


def test_a_meta_tensor_goes_by_the_dispatcher() -> None:
    assert rms_norm(*drawn(device="meta")).shape == (3, 5, 8)


def test_without_a_gradient_to_record_there_is_no_node() -> None:
    x, weight = drawn()
    assert rms_norm(x.detach(), weight.detach()).grad_fn is None
    with torch.no_grad():
        assert rms_norm(x, weight).grad_fn is None


def test_a_second_derivative_is_refused() -> None:
    x, weight = drawn()
    (first,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
