"""Grouped linear map beyond conformance: against dense maps, empty memories, without host reads, and bad input."""

import pytest
import torch
from harness import DEVICE, EXACT, Draw, assert_close, assert_same
from test_routing import no_reads
from torch import Tensor
from triton_checks import CLOSE, check_configurations

from palimpsest.kernels import Routing, dispatch, grouped_linear, route
from palimpsest.kernels.grouped_linear import chunked
from palimpsest.kernels.launch import planning

BACKENDS = ("reference", "torch", "triton")


def draw(dtype: torch.dtype, inner: int = 20, outer: int = 24) -> tuple[Tensor, Tensor, Routing]:
    """Two rows of 40 tokens to two of three memories and a shared one; the second memory is seldom chosen."""
    source = Draw(0, dtype)
    logits = source.normal(2, 40, 3).to(DEVICE)
    logits[..., 1] -= 3
    x, weight = source.normal(2, 40, inner), source.normal(4, inner, outer)
    return x.to(DEVICE), weight.to(DEVICE), route(logits, 2, shared=True, backend="torch")


def run(x: Tensor, weight: Tensor, routing: Routing, backend: str) -> list[Tensor]:
    """Output and gradients of a fixed weighting of it."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    y = grouped_linear(*leaves, routing, backend)
    loss = (y * Draw(1, y.dtype).normal(*y.shape).to(DEVICE)).sum()
    return [y.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_dense_map_of_each_memory(backend: str) -> None:
    """Tiles that end inside of sequences, tiles without a slot, sequences shorter than a tile."""
    kind = torch.float32 if backend == "triton" else torch.float64
    x, weight, routing = draw(kind)
    assert routing.cu_seqlens.diff().min() < 16 < 40 == routing.cu_seqlens.diff().max()
    memory = torch.empty_like(routing.token).index_put((routing.slot.flatten(),), routing.memory.flatten())
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    tokens = dispatch(leaves[0], routing, "reference")[0]
    wanted = sum((memory == m)[:, None] * (tokens @ leaves[1][m]) for m in range(4))[None]
    loss = (wanted * Draw(1, kind).normal(*wanted.shape).to(DEVICE)).sum()
    expected = [wanted.detach(), *torch.autograd.grad(loss, leaves)]
    assert_close(run(x, weight, routing, backend), expected, CLOSE if backend == "triton" else EXACT, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_to_one_memory(backend: str) -> None:
    """The others have no slots, and their matrices a gradient of exactly zero."""
    x, weight, _ = draw(torch.float32, 6, 5)
    logits = torch.zeros(2, 40, 4, device=DEVICE)
    logits[..., 2] = 1
    y, _, d_weight = run(x, weight, route(logits, 1, backend="torch"), backend)
    assert_close([y[0]], [x.flatten(0, 1) @ weight[2]], CLOSE, "one memory")
    assert not d_weight[[0, 1, 3]].any() and d_weight[2].any()


def test_masked_products_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in plain torch on other devices than a CPU, where the borders must not be read."""
    x, weight, routing = draw(torch.float64)
    grad = Draw(1, torch.float64).normal(1, 240, 24).to(DEVICE)
    places = (routing.token, routing.slot, routing.cu_seqlens)
    monkeypatch.setattr(chunked, "reads_borders", lambda x: True)
    wanted = [chunked.forward(x, weight, places[0], places[2]), *chunked.backward(grad, x, weight, *places)]
    monkeypatch.setattr(chunked, "reads_borders", lambda x: False)
    with no_reads(monkeypatch):
        found = [chunked.forward(x, weight, places[0], places[2]), *chunked.backward(grad, x, weight, *places)]
    assert_close(found, wanted, EXACT, "masked")


def test_nothing_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, routing = draw(torch.float32)
    with no_reads(monkeypatch), planning() as plan:
        run(x, weight, routing, "triton")
    assert [launch.kernel.name for launch in plan] == [
        "grouped_linear_tiles",
        "grouped_linear_tiles",
        "routing_gather",
        "grouped_linear_backward_weight",
    ]


def test_every_configuration_is_right() -> None:
    """Widths that do not fill a block."""

    def call() -> None:
        x, weight, routing = draw(torch.float32, 40, 70)
        grouped_linear(x.requires_grad_(), weight[:4].requires_grad_(), routing, "triton").sum().backward()

    check_configurations(call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_keep_their_own_dtype(backend: str) -> None:
    if backend == "triton" and DEVICE == "cpu":
        return  # the interpreter computes bfloat16 on bit patterns
    x, weight, routing = draw(torch.float32, 6, 5)
    y, d_x, d_weight = run(x.bfloat16(), weight, routing, backend)
    assert (y.dtype, d_x.dtype, d_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_a_part_of_wider_rows_is_read_in_place() -> None:
    x, weight, routing = draw(torch.float32, 18)
    for part in (x[..., 5:11], x[..., ::3], torch.randn(2, 50, 6, device=DEVICE)[:, 3:43]):
        found, wanted = (run(y, weight[:, :6], routing, "triton") for y in (part, part.contiguous()))
        assert_same(found, wanted, "strided")


@pytest.mark.parametrize(
    "change, name",
    [
        ({"x": torch.zeros(2, 8, 3)}, "x.shape"),
        ({"x": torch.zeros(2, 9, 3, dtype=torch.int64)}, "x.dtype"),
        ({"weight": torch.zeros(3, 3, 5)}, "weight.shape"),
        ({"weight": torch.zeros(4, 2, 5)}, "weight.shape"),
        ({"weight": torch.zeros(4, 3, 0)}, "weight.shape"),
        ({"weight": torch.zeros(4, 3, 5, dtype=torch.int64)}, "weight.dtype"),
        ({"weight": torch.zeros(4, 3, 5, device="meta")}, "weight.device"),
        ({"routing": torch.zeros(2)}, "routing"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], name: str) -> None:
    routing = route(torch.zeros(2, 9, 4), 2)
    with pytest.raises(ValueError, match=f"^{name}"):
        grouped_linear(**({"x": torch.zeros(2, 9, 3), "weight": torch.zeros(4, 3, 5), "routing": routing} | change))
