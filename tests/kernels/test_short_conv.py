"""Short convolution beyond conformance: against conv1d, documents shorter than the kernel, bad input."""

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, EXACT, Draw, assert_close, assert_same
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton_checks import CLOSE, check_configurations

from palimpsest.kernels import route, short_conv
from palimpsest.kernels.short_conv import forward as launching
from palimpsest.kernels.short_conv.cost import cost


def draw(batch: int = 2, length: int = 9, channels: int = 6, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    source = Draw(0, torch.float64)
    return source.normal(batch, length, channels), source.normal(channels, width), source.normal(channels)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_is_a_depthwise_convolution(backend: str, width: int) -> None:
    x, weight, bias = draw(width=width)
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    wanted = F.conv1d(padded, weight.unsqueeze(1), bias, groups=6).transpose(1, 2)
    assert_close([short_conv(x, weight, bias, backend=backend)[0]], [wanted], EXACT, "plain")
    found, state = short_conv(x, weight, bias, activation="silu", backend=backend)
    assert_close([found], [F.silu(wanted)], EXACT, "silu")
    assert state is None


def test_cost_is_that_of_conv1d() -> None:
    x, weight, _ = draw()
    padded = F.pad(x.transpose(1, 2), (3, 0))
    with FlopCounterMode(display=False) as counter:
        F.conv1d(padded, weight.unsqueeze(1), groups=6)
    assert cost(x.shape, weight.shape).flops == counter.get_total_flops()
    assert cost(x.shape, weight.shape, backward=True).flops == 2 * counter.get_total_flops()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_fresh_state_is_zeros(backend: str) -> None:
    x, weight, bias = draw()
    fresh = {"x": torch.zeros(2, 3, 6, dtype=torch.float64)}
    found, after = short_conv(x, weight, bias, state=fresh, return_state=True, backend=backend)
    assert_same([found], [short_conv(x, weight, bias, backend=backend)[0]], "fresh state")
    assert_same([after["x"]], [x[:, -3:]], "state")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_short_documents_keep_what_they_have(backend: str) -> None:
    """A state after fewer than K - 1 tokens is what went before, moved up, and then those tokens."""
    x, weight, _ = draw(batch=1)
    old = Draw(1, torch.float64).normal(4, 3, 6)
    borders = torch.tensor([0, 0, 1, 3, 9], dtype=torch.int32)
    _, after = short_conv(x, weight, state={"x": old}, cu_seqlens=borders, return_state=True, backend=backend)
    wanted = [old[0], torch.cat([old[1, 1:], x[0, :1]]), torch.cat([old[2, 2:], x[0, 1:3]]), x[0, 6:]]
    assert_same([after["x"]], [torch.stack(wanted)], "state")


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_an_index_reads_in_place(backend: str) -> None:
    """Each memory's tokens as a document of their own, after its own state: output, state and every gradient."""
    kind = torch.float32 if backend == "triton" else torch.float64
    x, weight, bias = (t.to(DEVICE, kind) for t in draw())
    old = Draw(1, kind).normal(8, 3, 6).to(DEVICE)
    routing = route(Draw(2, kind).normal(2, 9, 4).to(DEVICE), 2, backend="torch")
    given = {"activation": "silu", "cu_seqlens": routing.cu_seqlens, "return_state": True, "backend": backend}

    def run(in_place: bool) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, old)]
        where = {"index": routing.token, "inverse": routing.slot} if in_place else {}
        tokens = leaves[0] if in_place else leaves[0].flatten(0, 1)[routing.token][None]
        y, after = short_conv(tokens, *leaves[1:3], state={"x": leaves[3]}, **given, **where)
        loss = (y * Draw(3, kind).normal(*y.shape).to(DEVICE)).sum() + after["x"].square().sum()
        return [y.detach(), after["x"].detach(), *torch.autograd.grad(loss, leaves)]

    assert routing.cu_seqlens.diff().min() < 3 <= routing.cu_seqlens.diff().max()
    assert_close(run(True), run(False), EXACT if kind == torch.float64 else CLOSE, "read in place")


def test_weights_keep_their_own_dtype() -> None:
    x, weight, bias = (t.float() for t in draw())
    weight.requires_grad_()
    y, _ = short_conv(x.bfloat16(), weight, bias)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_every_configuration_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything on, for documents that end in and at spans, and channels that do not fill a block."""
    monkeypatch.setattr(launching, "SPAN", 32)

    def call() -> None:
        x, weight, bias = (t.float().requires_grad_() for t in draw(1, 20, 70, 3))
        state = {"x": torch.empty(1, 2, 70, requires_grad=True)}
        borders = torch.tensor([0, 20], dtype=torch.int32)
        options = {"activation": "silu", "state": state, "cu_seqlens": borders, "backend": "triton"}
        short_conv(x, weight, bias, **options)[0].sum().backward()

    check_configurations(call)


def test_every_configuration_is_right_with_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slots a token."""
    monkeypatch.setattr(launching, "SPAN", 32)

    def call() -> None:
        x, weight, bias = (t.float().requires_grad_() for t in draw(1, 20, 6, 3))
        slots = torch.arange(60)
        where = {"index": slots // 3, "inverse": slots.view(1, 20, 3)}
        borders = torch.tensor([0, 60], dtype=torch.int32)
        short_conv(x, weight, bias, cu_seqlens=borders, **where, backend="triton")[0].sum().backward()

    check_configurations(call)


@pytest.mark.parametrize("width", [1, 4])
def test_kernels_of_other_widths(width: int) -> None:
    """Without activation and bias, and of width 1, whose state is empty."""
    x, weight, _ = (t.float() for t in draw(width=width))
    state = {"x": Draw(1, torch.float32).normal(2, width - 1, 6)}

    def run(backend: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(DEVICE, kind).requires_grad_() for t in (x, weight, state["x"])]
        y, _ = short_conv(*leaves[:2], state={"x": leaves[2]}, backend=backend)
        gradients = torch.autograd.grad((y * Draw(2, kind).normal(*y.shape).to(DEVICE)).sum(), leaves)
        return [y.detach(), *gradients]

    assert_close(run("triton", torch.float32), run("reference", torch.float64), CLOSE, f"width {width}")


def test_a_part_of_wider_rows_is_read_in_place() -> None:
    """Channels of a fused projection, batch and all; rows cut along time are copied."""
    x, weight, _ = (t.to(DEVICE, torch.float32) for t in draw(2, 9, 18))
    for part in (x[..., 5:11], x[:, 2:, 5:11]):
        found, wanted = (short_conv(y, weight[:6], backend="triton")[0] for y in (part, part.contiguous()))
        assert_same([found], [wanted], "strided")


def test_float64_is_refused_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = (t.to(DEVICE) for t in draw())
    with pytest.raises(ValueError, match=r"^x.dtype was float64; it must be float32 or narrower for backend 'triton'"):
        short_conv(x, weight, backend="triton")
    monkeypatch.setenv("PALIMPSEST_BACKEND", "triton")
    assert_same([short_conv(x, weight)[0]], [short_conv(x, weight, backend="torch")[0]], "float64 runs plain torch")


INDEXED = {
    "index": torch.arange(18),
    "inverse": torch.arange(18).view(2, 9, 1),
    "cu_seqlens": torch.tensor([0, 18], dtype=torch.int32),
}


@pytest.mark.parametrize(
    "change, name",
    [
        ({"x": torch.zeros(2, 9)}, "x.shape"),
        ({"x": torch.zeros(2, 0, 6)}, "x.shape"),
        ({"x": torch.zeros(2, 9, 6, dtype=torch.int64)}, "x.dtype"),
        ({"weight": torch.zeros(5, 4)}, "weight.shape"),
        ({"weight": torch.zeros(6, 0)}, "weight.shape"),
        ({"weight": torch.zeros(6, 4, dtype=torch.int64)}, "weight.dtype"),
        ({"weight": torch.zeros(6, 4, device="meta")}, "weight.device"),
        ({"bias": torch.zeros(5)}, "bias.shape"),
        ({"bias": torch.zeros(6, device="meta")}, "bias.device"),
        ({"activation": "gelu"}, "activation"),
        ({"state": {"y": torch.zeros(2, 3, 6)}}, "state"),
        ({"state": {"x": torch.zeros(2, 4, 6)}}, r"state\['x'\].shape"),
        ({"state": {"x": torch.zeros(2, 3, 6, dtype=torch.int64)}}, r"state\['x'\].dtype"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "batch size with cu_seqlens"),
        ({"x": torch.zeros(1, 9, 6), "cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens.dtype"),
        ({"x": torch.zeros(1, 9, 6), "cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}, "cu_seqlens"),
        ({"x": torch.zeros(1, 9, 6), "cu_seqlens": torch.tensor([0, 5, 4, 9], dtype=torch.int32)}, "cu_seqlens"),
        ({"inverse": torch.zeros(2, 9, 1, dtype=torch.int64)}, "inverse"),
        (INDEXED | {"inverse": None}, "inverse"),
        (INDEXED | {"index": torch.zeros(2, 9)}, "index.shape"),
        (INDEXED | {"cu_seqlens": None}, "cu_seqlens"),
        (INDEXED | {"index": torch.zeros(17, dtype=torch.int64)}, "index.shape"),
        (INDEXED | {"index": torch.zeros(18)}, "index.dtype"),
        (INDEXED | {"inverse": torch.zeros(2, 8, 1, dtype=torch.int64)}, "inverse.shape"),
        (INDEXED | {"inverse": torch.zeros(2, 9, 1, dtype=torch.int64, device="meta")}, "inverse.device"),
        (INDEXED | {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "cu_seqlens"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        short_conv(**({"x": torch.zeros(2, 9, 6), "weight": torch.zeros(6, 4)} | change))  # type: ignore[arg-type]
