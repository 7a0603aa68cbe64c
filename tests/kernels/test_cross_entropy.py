"""The loss beyond conformance: reductions, options, against torch's own, memory, bad input."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, EXACT, SINGLE, Draw, assert_close, assert_same, error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from triton_checks import CLOSE, check_configurations

from palimpsest.kernels import linear_cross_entropy
from palimpsest.kernels.cross_entropy import chunked
from palimpsest.kernels.cross_entropy import forward as launching
from palimpsest.kernels.cross_entropy.cost import cost

TOKENS, WIDTH, VOCABULARY = 23, 7, 11


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    source = Draw(0, dtype)
    target = source.integers(VOCABULARY, TOKENS)
    target[[2, 3, 11]] = -100
    return source.normal(TOKENS, WIDTH).requires_grad_(), source.normal(VOCABULARY, WIDTH).requires_grad_(), target


def results(loss: Callable[..., Tensor], x: Tensor, weight: Tensor) -> list[Tensor]:
    """The loss and its gradients, for an incoming gradient that is not one."""
    value = loss(x, weight)
    grad = Draw(3, value.dtype).normal(*value.shape).to(value.device)
    return [value.detach(), *torch.autograd.grad(value, (x, weight), grad)]


@pytest.mark.parametrize("chunk", [1, 5, TOKENS, None])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option_equals_the_reference(reduction: str, chunk: int | None) -> None:
    x, weight, target = draw()
    for smoothing, z_loss, softcap in product((0.0, 0.1, 1.0), (0.0, 0.3), (None, 2.0)):
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "reduction": reduction}
        found, wanted = (
            results(partial(linear_cross_entropy, target=target, **options, chunk=chunk, backend=b), x, weight)
            for b in ("torch", "reference")
        )
        assert_close(found, wanted, EXACT, str(options))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_torch(backend: str, reduction: str, smoothing: float) -> None:
    x, weight, target = draw()
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    found = results(lambda x, w: linear_cross_entropy(x, w, target, **options, backend=backend), x, weight)
    assert_close(found, results(lambda x, w: F.cross_entropy(x @ w.T, target, **options), x, weight), EXACT, reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float32_and_bfloat16(reduction: str) -> None:
    """float32 to rounding; bfloat16 logits carry 8 bits, each loss then an absolute error of their size * 2^-8."""
    x, weight, target = draw()
    wanted = results(lambda x, w: linear_cross_entropy(x, w, target, reduction=reduction), x, weight)
    x, weight, _ = draw(torch.float32)
    single = results(lambda x, w: linear_cross_entropy(x, w, target, reduction=reduction), x, weight)
    assert_close(single, wanted, SINGLE, "float32")
    narrow = x.detach().bfloat16().requires_grad_()
    half = results(lambda x, w: linear_cross_entropy(x, w, target, reduction=reduction), narrow, weight)
    assert [t.dtype for t in half] == [torch.float32, torch.bfloat16, torch.float32]
    assert_close(half, wanted, 2**-6, "bfloat16")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_tokens_count_for_nothing(backend: str, reduction: str) -> None:
    x, weight, target = draw()
    value, d_x, _ = results(
        lambda x, w: linear_cross_entropy(x, w, target, reduction=reduction, z_loss=0.1, backend=backend), x, weight
    )
    assert not d_x[target == -100].any()
    if reduction == "none":
        assert not value[target == -100].any()
    nothing = torch.full_like(target, 7)
    zeros = results(
        lambda x, w: linear_cross_entropy(x, w, nothing, ignore_index=7, reduction=reduction, backend=backend),
        x,
        weight,
    )
    assert not any(t.any() for t in zeros)


def test_shapes_and_borders_of_chunks_do_not_matter() -> None:
    x, weight, target = draw()
    rows = linear_cross_entropy(x.view(1, TOKENS, WIDTH), weight, target.view(1, TOKENS), reduction="none")
    assert rows.shape == (1, TOKENS)
    assert_close([rows[0]], [linear_cross_entropy(x, weight, target, reduction="none", chunk=4)], EXACT, "rows")
    single = linear_cross_entropy(x[0], weight, target[0])
    assert single.shape == () and error(single, rows[0, 0]) < EXACT


def test_without_gradients_none_are_computed() -> None:
    x, weight, target = draw(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, target)
    assert counter.get_total_flops() == cost(x.shape, weight.shape).flops


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_flops_of_both_ways_together(reduction: str) -> None:
    x, weight, target = draw(torch.float32)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, target, reduction=reduction).sum().backward()
    parts = [cost(x.shape, weight.shape, reduction=reduction, backward=b).flops for b in (False, True)]
    assert counter.get_total_flops() == sum(parts)


def test_cost_is_that_of_the_plain_products() -> None:
    """Counted by torch on logits in one piece; without a reduction they are computed once more."""
    x, weight, target = draw(torch.float32)
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(x @ weight.T, target)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert cost(x.shape, weight.shape).flops == forward
    assert cost(x.shape, weight.shape, backward=True).flops == counter.get_total_flops()
    again = cost(x.shape, weight.shape, reduction="none", backward=True).flops
    assert again == counter.get_total_flops() + forward


class Watch(TorchDispatchMode):
    """The most elements that one tensor's memory holds, among all that are ever made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}], ids=["plain", "all"])
def test_logits_of_all_tokens_never_exist(options: dict[str, float]) -> None:
    """Watched inside the operators, forward and both ways backward: nothing beyond a chunk's logits, x or weight."""
    tokens, vocabulary, chunk = 600, 300, 50
    source = Draw(0, torch.float32)
    x, weight = source.normal(tokens, 4), source.normal(vocabulary, 4)
    target = source.integers(vocabulary, tokens)
    rest = (-100, options.get("smoothing", 0.0), options.get("z_loss", 0.0), options.get("softcap"), chunk)
    bound = max(chunk * vocabulary, x.numel(), weight.numel())
    with Watch() as watch:
        chunked.forward.body(x, weight, target, *rest, True, True)
        chunked.forward.body(x, weight, target, *rest, False, False)
        chunked.backward.body(torch.ones(tokens), x, weight, target, *rest)
    assert chunk * vocabulary <= watch.largest <= bound < tokens * vocabulary / 10
    with Watch() as watch:
        loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), target, chunk=chunk)
        loss.backward()
    assert watch.largest <= bound


def test_chunks_hold_a_bounded_number_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = chunked.Chunk.__init__
    monkeypatch.setattr(chunked.Chunk, "__init__", lambda self, x, *rest: (seen.append(len(x)), run(self, x, *rest))[1])
    x, weight = torch.zeros(5000, 1), torch.zeros(4096, 1)
    linear_cross_entropy(x, weight, torch.zeros(5000, dtype=torch.int64))
    assert sum(seen) == 5000 and max(seen) * 4096 <= 2**22


def test_same_bits_again() -> None:
    for reduction in ("mean", "none"):
        x, weight, target = draw(torch.float32)
        loss = partial(linear_cross_entropy, target=target, reduction=reduction, chunk=5)
        assert_same(results(loss, x, weight), results(loss, x, weight), reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_compile_and_pass_opcheck(reduction: str) -> None:
    x, weight, target = draw()
    loss = partial(linear_cross_entropy, target=target, reduction=reduction, chunk=5)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, x, weight), results(loss, x, weight), EXACT, "compiled")
    for gradients in (False, True):
        arguments = (x, weight, target, -100, 0.1, 0.1, 3.0, 5, True, gradients)
        torch.library.opcheck(torch.ops.palimpsest.linear_cross_entropy.default, arguments)


def wide_vocabulary(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """150 tokens of width 20 and 300 entries: several blocks of both, the last ones not full."""
    source = Draw(seed, torch.float32)
    target = source.integers(300, 150)
    target[::7] = -100
    x, weight = source.normal(150, 20, scale=scale), source.normal(300, 20)
    return x.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(), target.to(DEVICE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing, z_loss, softcap", [(0.0, 0.0, None), (0.1, 0.3, 2.0), (1.0, 0.0, None)])
def test_kernels_equal_the_reference(
    reduction: str, smoothing: float, z_loss: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three spans of the forward, and of the backward where ``chunk`` makes it so."""
    monkeypatch.setattr(launching, "SPAN", 128)
    x, weight, target = wide_vocabulary()
    options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "reduction": reduction}
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted = results(partial(linear_cross_entropy, target=target, **options, backend="reference"), *wide)
    for chunk in (None, 5):
        run = partial(linear_cross_entropy, target=target, **options, chunk=chunk, backend="triton")
        found = results(run, x, weight)
        assert_close(found, wanted, CLOSE, f"chunk {chunk}")
        assert not found[1][target == -100].any()


def test_every_configuration_is_right() -> None:
    def call() -> None:
        x, weight, target = wide_vocabulary()
        options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "chunk": 5, "backend": "triton"}
        linear_cross_entropy(x, weight, target, **options).backward()

    check_configurations(call)


@pytest.mark.parametrize("skipped", [1, 3])
def test_filtered_gradients_are_within_their_bound(skipped: int) -> None:
    """Of two by three blocks those below the threshold are skipped, and only these; it lies between two of them."""
    x, weight, target = wide_vocabulary(scale=0.5)
    weight.data[128:] *= 0.1
    target = torch.where(target < 0, target, target % 128)
    grad = Draw(3, torch.float32).normal(150).to(DEVICE) * (target != -100)
    slopes = (torch.softmax(x @ weight.T, 1) - F.one_hot(target.clamp(min=0), 300)).detach() * (target >= 0)[:, None]
    tiles = [part for rows in slopes.split(128) for part in rows.split(128, 1)]
    tiles.sort(key=lambda tile: tile.abs().max())
    threshold = (tiles[skipped - 1].abs().max() + tiles[skipped].abs().max()).item() / 2
    for tile in tiles[:skipped]:
        tile.zero_()
    slopes *= grad[:, None]
    run = partial(linear_cross_entropy, target=target, reduction="none")
    exact = torch.autograd.grad(run(x, weight), (x, weight), grad)
    assert_same(torch.autograd.grad(run(x, weight, filter=threshold), (x, weight), grad), exact, "plain torch is exact")
    found = torch.autograd.grad(run(x, weight, filter=threshold, backend="triton"), (x, weight), grad)
    of_x = threshold * grad.abs()[:, None] * weight.detach().abs().sum(0)
    of_weight = threshold * (grad[:, None] * x.detach()).abs().sum(0)
    for a, b, bound in zip(found, exact, (of_x, of_weight), strict=True):
        assert ((a - b).abs() <= bound).all() and error(a, b) > 1e-4
    assert_close(found, [slopes @ weight.detach(), slopes.T @ x.detach()], 2 * CLOSE, "every other block counts")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_float16_do_not_underflow(reduction: str, backend: str) -> None:
    """An incoming gradient is 7e-9 here, times a probability 2e-11, and float16 has nothing below 6e-8."""
    x, weight, target = wide_vocabulary(scale=0.0005)
    weight.data *= 500
    narrow = x.detach().half().requires_grad_()
    counted = 1 if reduction == "mean" else (target != -100).sum()

    def gradients(x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(x, weight, target, reduction=reduction, backend=backend)
        return torch.autograd.grad(loss, (x, weight), torch.full_like(loss, 2.0**-20) / counted)

    exact = narrow.detach().double().requires_grad_(), weight.detach().half().double().requires_grad_()
    assert_close(gradients(narrow, weight, backend), gradients(*exact, "torch"), 2**-6, "gradients")


@pytest.mark.parametrize("tokens", [0, 1])
def test_kernels_of_few_tokens(tokens: int) -> None:
    x, weight, target = wide_vocabulary()
    loss = linear_cross_entropy(x[:tokens], weight, target[:tokens] % 300, backend="triton")
    wanted = linear_cross_entropy(x[:tokens], weight, target[:tokens] % 300, backend="torch")
    assert_close([loss.detach()], [wanted.detach()], CLOSE, "loss")
    gradients = (torch.autograd.grad(y, (x, weight)) for y in (loss, wanted))
    assert_close(*gradients, CLOSE, "gradients")


@pytest.mark.parametrize(
    "change, name",
    [
        ({"x": 1.0}, "x"),
        ({"x": torch.zeros(3, 2, dtype=torch.int64)}, "x.dtype"),
        ({"weight": torch.zeros(5, 3)}, "weight.shape"),
        ({"weight": torch.zeros(5, 2, dtype=torch.int64)}, "weight.dtype"),
        ({"weight": torch.zeros(5, 2, device="meta")}, "weight.device"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "target.shape"),
        ({"target": torch.zeros(3)}, "target.dtype"),
        ({"target": torch.zeros(3, dtype=torch.int64, device="meta")}, "target.device"),
        ({"target": torch.tensor([0, 5, 0])}, "target was 5"),
        ({"target": torch.tensor([0, -1, 0])}, "target was -1"),
        ({"ignore_index": None}, "ignore_index"),
        ({"reduction": "max"}, "reduction"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"softcap": 0.0}, "softcap"),
        ({"chunk": 0}, "chunk"),
        ({"filter": 0.0}, "filter"),
        ({"filter": 2.0}, "filter"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], name: str) -> None:
    good = {"x": torch.zeros(3, 2), "weight": torch.zeros(5, 2), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^{name}"):
        linear_cross_entropy(**(good | change))  # type: ignore[arg-type]
