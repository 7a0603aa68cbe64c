"""Routing beyond conformance: against a plain sort, at its extremes, without host reads, and bad input."""

from typing import Any

import pytest
import torch
from harness import DEVICE, EXACT, Draw, assert_close, assert_same
from host_reads import no_reads
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton_checks import CLOSE, check_configurations

from palimpsest.kernels import Routing, balance_loss, combine, dispatch, route, router_z_loss
from palimpsest.kernels.launch import planning
from palimpsest.kernels.routing import backward as backward_kernel
from palimpsest.kernels.routing import forward as forward_kernels
from palimpsest.kernels.routing.cost import dispatch_cost

BACKENDS = ("reference", "torch", "triton")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in few tokens."""
    monkeypatch.setattr(forward_kernels, "TILE", 8)
    monkeypatch.setattr(backward_kernel, "TILE", 8)


def scores(batch: int = 2, length: int = 19, memories: int = 5, seed: int = 0) -> Tensor:
    """Logits with many ties."""
    return Draw(seed, torch.float32).normal(batch, length, memories).mul(2).round().to(DEVICE)


def by_sorting(logits: Tensor, top_k: int, shared: bool, edges: list[int]) -> tuple[list[list[int]], list[int]]:
    """Memories of each token and tokens of the slots, by Python's stable sort."""
    memories = logits.shape[2]
    chosen = [
        sorted(range(memories), key=lambda m, row=row: -row[m])[:top_k] + [memories] * shared  # type: ignore[misc]
        for row in logits.flatten(0, 1).tolist()
    ]
    row = [sum(edge <= t for edge in edges[1:]) for t in range(len(chosen))]
    pairs = [(row[t], m, t) for t, taken in enumerate(chosen) for m in taken]
    return chosen, [t for _, _, t in sorted(pairs, key=lambda pair: pair[:2])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k, shared", [(1, False), (2, True), (5, False)])
@pytest.mark.parametrize("packed", [False, True])
def test_is_a_stable_sort(backend: str, top_k: int, shared: bool, packed: bool) -> None:
    logits = scores(1, 38) if packed else scores()
    edges = [0, 0, 1, 8, 20, 38] if packed else [0, 19, 38]
    borders = torch.tensor(edges, dtype=torch.int32, device=DEVICE) if packed else None
    r = route(logits, top_k, shared=shared, cu_seqlens=borders, backend=backend)
    chosen, tokens = by_sorting(logits, top_k, shared, edges)
    assert r.memory.flatten(0, 1).tolist() == chosen and r.token.tolist() == tokens
    where = torch.arange(38, device=DEVICE).repeat_interleave(r.choices).view(r.slot.shape)
    assert_same(
        [r.token[r.slot], r.slot.flatten().sort().values], [where, torch.arange(r.token.numel()).to(DEVICE)], ""
    )
    assert (r.memories, r.choices) == (5 + shared, top_k + shared) and r.cu_seqlens.dtype == torch.int32
    sequences = [
        (n, m) for n in range(len(edges) - 1) for m in range(r.memories) for t in range(edges[n], edges[n + 1])
        if m in chosen[t]
    ]  # fmt: skip
    lengths = [sequences.count((n, m)) for n in range(len(edges) - 1) for m in range(r.memories)]
    assert r.cu_seqlens.diff().tolist() == lengths and r.cu_seqlens[0] == 0
    total = torch.ones(r.weight.shape[:2], device=DEVICE)
    assert_close([r.weight[..., :top_k].sum(-1), r.probability.sum(-1)], [total, total], 1e-6, "weights sum to 1")
    assert not shared or bool((r.weight[..., -1] == 1).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend: str) -> None:
    """All tokens to one memory, the others empty; equal logits; minus infinity; what is not a number comes last."""
    logits = torch.zeros(2, 19, 4, device=DEVICE)
    logits[..., 2] = 9
    logits[0, 3] = 0
    logits[0, 4] = torch.tensor([float("-inf"), 1, float("-inf"), 0])
    r = route(logits, 1, backend=backend)
    assert r.memory[0, 3:5, 0].tolist() == [0, 1] and bool((r.memory[1] == 2).all())
    assert r.cu_seqlens.tolist() == [0, 1, 2, 19, 19, 19, 19, 38, 38]
    r = route(logits, 3, backend=backend)
    assert r.memory[0, 3].tolist() == [0, 1, 2] and r.memory[0, 4].tolist() == [1, 3, 0] and r.weight[0, 4, 2] == 0
    logits[1, 5] = torch.tensor([float("nan"), 1, 2, 3])
    r = route(logits, 4, backend=backend)
    assert r.memory[1, 5].tolist() == [3, 2, 1, 0] and bool((r.memory[1, 6] == r.memory[1, 7]).all())
    assert_same(
        [r.slot.flatten().sort().values], [torch.arange(2 * 19 * 4, device=DEVICE)], "slots, whatever the logits"
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_past_does_not_move(backend: str) -> None:
    """What a memory's sequence holds before token t, and other rows, are the same whatever comes at t."""
    logits, changed = scores(), scores()
    changed[1, 7:] = scores(seed=1)[1, 7:]
    a, b = (route(x, 2, shared=True, backend=backend) for x in (logits, changed))

    def order(r: Routing, row: int, until: int) -> list[list[int]]:
        edges = r.cu_seqlens.tolist()
        parts = [r.token[edges[n] : edges[n + 1]].tolist() for n in range(row * 6, row * 6 + 6)]
        return [[t for t in part if t < row * 19 + until] for part in parts]

    assert (
        order(a, 0, 19) == order(b, 0, 19) and order(a, 1, 7) == order(b, 1, 7) and order(a, 1, 19) != order(b, 1, 19)
    )
    assert all(part == sorted(part) for part in order(b, 1, 19))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", [(), (3,), (2, 5)])
def test_there_and_back(backend: str, tail: tuple[int, ...]) -> None:
    """With weights that sum to one, what was sent comes back; the gradient of a sum over slots counts the choices."""
    r = route(scores(), 3, backend="torch")
    x = Draw(1, torch.float32).normal(2, 19, *tail).to(DEVICE).requires_grad_()
    y = dispatch(x, r, backend)
    assert y.shape == (1, 2 * 19 * 3, *tail)
    assert_same([y[0].detach()], [x.detach().flatten(0, 1)[r.token]], "slots hold their tokens")
    assert_close([combine(y, r, backend)], [x], 1e-6, "there and back")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_same([gradient], [torch.full_like(gradient, 3.0)], "gradient")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_weights_and_tokens_of_other_dtypes(backend: str) -> None:
    """Weights stay float32 beside half precision."""
    if backend == "triton" and DEVICE == "cpu":
        return  # the interpreter computes bfloat16 on bit patterns
    logits = scores().bfloat16().requires_grad_()
    r = route(logits, 2, backend=backend)
    x = Draw(1, torch.bfloat16).normal(2, 19, 4).to(DEVICE).requires_grad_()
    out = combine(dispatch(x, r, backend), r, backend)
    out.float().square().sum().backward()
    assert (out.dtype, r.weight.dtype, r.probability.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert x.grad is not None and logits.grad is not None and logits.grad.dtype == x.grad.dtype == torch.bfloat16


def test_balance_loss() -> None:
    """One for a uniform router, M for a single memory; the shared memory does not count; gradient by the means."""
    assert balance_loss(route(torch.zeros(2, 6, 4), 2, shared=True)).item() == 1
    alone = torch.zeros(2, 6, 4)
    alone[..., 1] = 50
    assert balance_loss(route(alone, 1)).item() == pytest.approx(4)
    logits = Draw(0, torch.float64).normal(2, 7, 4).requires_grad_()
    r = route(logits, 2, shared=True)
    share = torch.stack([(r.memory == m).sum() for m in range(4)]).double() / (2 * 7 * 2)
    wanted = 4 * (share * logits.softmax(-1).mean((0, 1))).sum()
    assert_close([balance_loss(r)], [wanted], EXACT, "value")
    found, expected = (torch.autograd.grad(loss, logits)[0] for loss in (balance_loss(r), wanted))
    assert_close([found], [expected], EXACT, "gradient")


def test_router_z_loss() -> None:
    logits = Draw(0, torch.float64).normal(2, 7, 4)
    assert_close([router_z_loss(logits)], [logits.exp().sum(-1).log().square().mean()], EXACT, "z")
    assert router_z_loss(logits.bfloat16()).dtype == torch.float32


def step(logits: Tensor, x: Tensor, borders: Tensor | None, backend: str | None) -> list[Tensor]:
    """Routing there and back with losses, and its gradients."""
    logits, x = (t.detach().requires_grad_() for t in (logits, x))
    r = route(logits, 2, shared=True, cu_seqlens=borders, backend=backend)
    out = combine(dispatch(x, r, backend), r, backend)
    loss = out.square().sum() + balance_loss(r) + router_z_loss(logits)
    return [out.detach(), *torch.autograd.grad(loss, [logits, x])]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_read_on_the_host(backend: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels are planned, not interpreted: the interpreter reads. Borders are checked where they lie on a
    CPU, which is left out here."""
    monkeypatch.setattr("palimpsest.kernels.check.sequence_borders", lambda *_: None)
    logits, x = scores(1, 38), Draw(1, torch.float32).normal(1, 38, 4).to(DEVICE)
    borders = torch.tensor([0, 5, 38], dtype=torch.int32, device=DEVICE) if packed else None
    with no_reads(monkeypatch):
        if backend == "torch":
            step(logits, x, borders, backend)
        else:
            with planning() as plan:
                step(logits, x, borders, backend)
            assert len(plan) == 8
    for read in (lambda: x.sum().item(), lambda: logits[logits > 0], lambda: bool(x.sum() > 0), x.nonzero):
        with pytest.raises(AssertionError), no_reads(monkeypatch):
            read()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole_with_the_losses(backend: str) -> None:
    logits, x = scores(), Draw(1, torch.float32).normal(2, 19, 4).to(DEVICE)
    wanted = step(logits, x, None, backend)
    torch._dynamo.reset()

    def forward(logits: Tensor, x: Tensor) -> tuple[Tensor, Routing]:
        r = route(logits, 2, shared=True, backend=backend)
        return combine(dispatch(x, r, backend), r, backend), r

    leaves = [t.clone().requires_grad_() for t in (logits, x)]
    out, r = torch.compile(forward, fullgraph=True, backend="aot_eager")(*leaves)
    loss = out.square().sum() + balance_loss(r) + router_z_loss(leaves[0])
    assert_close([out.detach(), *torch.autograd.grad(loss, leaves)], wanted, 1e-6, "compiled")


def test_flops_of_dispatch_are_counted() -> None:
    r = route(scores(), 2)
    x = torch.randn(2, 19, 4, device=DEVICE, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = dispatch(x, r)
    assert counter.get_total_flops() == dispatch_cost(x.shape, 2).flops == 0
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == dispatch_cost(x.shape, 2, backward=True).flops == x.numel()


@pytest.mark.parametrize("packed", [False, True])
def test_every_configuration_is_right(packed: bool) -> None:
    """Channels that do not fill a block, eight choices and a shared one among memories that do not fill a tile."""

    def call() -> None:
        logits = torch.zeros(1, 20, 11, device=DEVICE, requires_grad=True)
        x = torch.zeros(1, 20, 300 if packed else 5, device=DEVICE, requires_grad=True)
        borders = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE) if packed else None
        r = route(logits, 2 if packed else 8, shared=True, cu_seqlens=borders, backend="triton")
        combine(dispatch(x, r, "triton"), r, "triton").sum().backward()

    check_configurations(call)


def test_a_part_of_wider_rows_is_read_in_place() -> None:
    r = route(scores(), 2, backend="torch")
    x = torch.randn(2, 19, 12, device=DEVICE)
    for part in (x[..., 3:9], x[:, :, ::2], torch.randn(2, 30, 6, device=DEVICE)[:, 5:24]):
        assert_same([dispatch(part, r, "triton")], [dispatch(part.contiguous(), r, "triton")], "strided")


def test_what_the_kernels_do_not_cover() -> None:
    with pytest.raises(ValueError, match=r"^logits.dtype was float64; it must be float32 or narrower"):
        route(scores().double(), 2, backend="triton")
    with pytest.raises(ValueError, match=r"^M of logits was 256; it must be below 256"):
        route(torch.zeros(1, 2, 256, device=DEVICE), 2, backend="triton")
    assert CLOSE > 0


@pytest.mark.parametrize(
    "change, name",
    [
        ({"logits": torch.zeros(2, 9)}, "logits.shape"),
        ({"logits": torch.zeros(2, 0, 4)}, "logits.shape"),
        ({"logits": torch.zeros(2, 9, 4, dtype=torch.int64)}, "logits.dtype"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 5}, "top_k"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "batch size with cu_seqlens"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_input_of_route_is_named(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        route(**({"logits": torch.zeros(2, 9, 4), "top_k": 2} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "operation, x, name",
    [
        (dispatch, torch.zeros(2, 8, 3), "x.shape"),
        (dispatch, torch.zeros(2), "x.shape"),
        (dispatch, torch.zeros(2, 9, 3, dtype=torch.int64), "x.dtype"),
        (dispatch, torch.zeros(2, 9, 3, device="meta"), "x.device"),
        (combine, torch.zeros(1, 35, 3), "y.shape"),
        (combine, torch.zeros(2, 18, 3), "y.shape"),
        (combine, torch.zeros(1, 36, 3, device="meta"), "y.device"),
    ],
)
def test_bad_input_of_the_way_is_named(operation: Any, x: Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        operation(x, route(torch.zeros(2, 9, 4), 2))
    with pytest.raises(ValueError, match="^routing was Tensor"):
        operation(x, x)
