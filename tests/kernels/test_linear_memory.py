"""The linear memories beyond conformance: what they compute in cases with a known answer, switches of the kernels,
decoding, bad input."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from harness import DEVICE, EXACT, GPU_SINGLE, Draw, assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from palimpsest.kernels import backend as backends
from palimpsest.kernels import delta_rule, linear_attention
from palimpsest.kernels.delta_rule.plans import PLANS as DELTA_PLANS
from palimpsest.kernels.launch import KERNELS, Config, forced, planning
from palimpsest.kernels.linear_attention.plans import PLANS as LINEAR_PLANS
from palimpsest.kernels.linear_memory import operator
from palimpsest.kernels.linear_memory.cost import matmul_flops

PLAIN = ["reference", "torch"]
CLOSE = 1e-5 if DEVICE == "cpu" else GPU_SINGLE  # float32 against float64, sums of a hundred terms


@pytest.fixture(autouse=True)
def registered() -> None:
    """Have every kernel registered, whichever test comes first."""
    from palimpsest.kernels.linear_memory import backward, decode, forward  # noqa: F401


def tokens(length: int = 21, heads: int = 2, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in float64, one row."""
    draw = Draw(seed, torch.float64)
    return draw.normal(1, length, heads, width), draw.normal(1, length, heads, width), draw.normal(1, length, heads, 5)


@pytest.mark.parametrize("backend", PLAIN)
def test_linear_attention_is_attention_without_softmax(backend: str) -> None:
    q, k, v = tokens()
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril() * 0.25
    wanted = torch.einsum("bhij,bjhd->bihd", scores, v)
    found, state = linear_attention(q, k, v, scale=0.25, chunk_size=8, backend=backend)
    assert_close([found], [wanted], EXACT, "attention")
    assert state is None


@pytest.mark.parametrize("backend", PLAIN)
def test_a_corrected_key_finds_its_last_value(backend: str) -> None:
    """With β = 1 and orthonormal keys, each written several times, a memory is a dictionary."""
    _, _, v = tokens()
    keys = torch.eye(6, dtype=torch.float64)[torch.arange(21) * 5 % 6].view(1, 21, 1, 6).expand(1, 21, 2, 6)
    beta = torch.ones(1, 21, 2, dtype=torch.float64)
    found, state = delta_rule(keys, keys, v, beta, scale=1.0, chunk_size=8, return_state=True, backend=backend)
    assert_close([found], [v], EXACT, "what was just written")
    last = [int((keys[0, :, 0].argmax(-1) == i).nonzero()[-1]) for i in range(6)]
    assert state is not None
    assert_close([state["memory"][0].transpose(0, 1)], [v[0, last]], EXACT, "memory")


@pytest.mark.parametrize("backend", PLAIN)
def test_beta_of_zero_writes_nothing(backend: str) -> None:
    q, k, v = tokens()
    draw = Draw(1, torch.float64)
    memory, decay = draw.normal(1, 2, 6, 5), draw.uniform(-0.5, 0.0, 1, 21, 2)
    beta = torch.zeros(1, 21, 2, dtype=torch.float64, requires_grad=True)
    found, _ = delta_rule(q, k, v, beta, decay, state={"memory": memory}, scale=1.0, chunk_size=8, backend=backend)
    wanted = torch.einsum("bthd,bhde->bthe", q, memory) * decay.cumsum(1).exp().unsqueeze(-1)
    assert_close([found], [wanted], EXACT, "decayed memory")
    found.sum().backward()
    assert beta.grad is not None and beta.grad.isfinite().all() and beta.grad.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_decay_as_strong_as_it_gets(backend: str) -> None:
    """Down to −20 a token, among weak ones: cumulative sums to −250, whose unit in float32 is 1.5e-5, are only ever
    subtracted from each other."""
    draw = Draw(2, torch.float32)
    q, k, v = draw.normal(1, 21, 1, 16), draw.normal(1, 21, 1, 16, scale=0.25), draw.normal(1, 21, 1, 16)
    decay = torch.where(draw.uniform(0, 1, 1, 21, 1) < 0.6, -20.0, -0.01)
    beta = draw.uniform(0, 1, 1, 21, 1)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v, beta, decay)]
        o, state = delta_rule(*inputs, chunk_size=16, return_state=True, backend=backend)
        assert state is not None
        return [o, state["memory"], *torch.autograd.grad(o.square().sum() + state["memory"].sum(), inputs)]

    assert_close(run(backend, torch.float32), run("reference", torch.float64), CLOSE, "strong decay")


def test_chunk_size_changes_nothing() -> None:
    q, k, v = tokens()
    draw = Draw(1, torch.float64)
    beta, decay = draw.uniform(0, 1, 1, 21, 2), draw.uniform(-0.5, 0.0, 1, 21, 2)
    k = torch.nn.functional.normalize(k, dim=-1)
    wanted, _ = delta_rule(q, k, v, beta, decay, backend="reference")
    for size in (1, 3, 16, 21, 64):
        assert_close([delta_rule(q, k, v, beta, decay, chunk_size=size)[0]], [wanted], EXACT, f"chunk {size}")


@pytest.mark.parametrize("delta", [False, True])
def test_cost_is_that_of_the_products(delta: bool) -> None:
    """The torch path's own products, of which the half of every C x C above the diagonal need not be computed. Torch
    counts no triangular solve (the inverse, C³/3 a chunk) and no product added in place (N (K exp G) S)."""
    q, k, v = tokens(24)
    beta = torch.ones(1, 24, 2, dtype=torch.float64) if delta else None
    with FlopCounterMode(display=False) as counter:
        operator.linear_memory_op.body(q, k, v, beta, None, None, None, 1.0, 8, False, False)
    squares = (3 * 6 + 2 * 5) if delta else (6 + 5)
    unseen = 8 * 8 // 3 + 2 * 6 * 5 if delta else 0
    wanted = counter.get_total_flops() + 24 * 2 * (unseen - 7 * squares)
    assert matmul_flops(24, 2, 6, 5, 8, delta) == wanted


class NoHostReads(TorchDispatchMode):
    """Refuses what makes a GPU's stream wait for the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._opname not in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_sequences_are_not_read_on_the_host(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in Draw(0, torch.float32).normal(3, 1, 24, 1, 16).unbind())
    beta, borders = torch.ones(1, 24, 1), torch.tensor([0, 0, 7, 24], dtype=torch.int32)
    with planning(), NoHostReads():
        o, _ = delta_rule(q, k, v, beta, cu_seqlens=borders, chunk_size=16, backend=backend)
        o.sum().backward()


CONSTANTS = {"H": 1, "D": 16, "DV": 16, "C": 16, "DELTA": True, "DECAY": True, "PACKED": False, "STATE": False}
CONSTANTS |= {"PRECISION": "ieee", "DTYPE": "float32", "Q_STRIDE": 16, "K_STRIDE": 16, "V_STRIDE": 16}


def check_canaries(kernels: list[str], **change: Any) -> None:
    """All that the canaries of some kernels compare, in float32."""
    for canary in {KERNELS[name].canary for name in kernels}:
        found, wanted = zip(*canary(CONSTANTS | change), strict=True)
        assert_close(found, wanted, CLOSE, f"canary with {change}")


#: What differs from CONSTANTS, so that widths, chunk sizes, gates, layouts and states meet.
SWITCHES = [
    {"H": 2, "DECAY": False, "PACKED": True, "STATE": True, "Q_STRIDE": 48, "K_STRIDE": 48, "V_STRIDE": 32},
    {"DELTA": False, "DECAY": False, "D": 32, "Q_STRIDE": 32, "K_STRIDE": 32, "STATE": True},
    {"DELTA": False, "H": 2, "PACKED": True, "DV": 32, "Q_STRIDE": 32, "K_STRIDE": 32, "V_STRIDE": 64, "C": 32},
    {"C": 32, "DV": 32, "V_STRIDE": 32, "PACKED": True},
    {"C": 64, "STATE": True},
]


@pytest.mark.parametrize("change", SWITCHES, ids=str)
def test_kernels_with_every_switch(change: dict[str, Any]) -> None:
    check_canaries(["memory_states", "memory_states_backward", "memory_steps"], **change)


@pytest.mark.parametrize("width", [16, 32])
def test_kernels_with_every_block(width: int) -> None:
    """All of them with one width of the memory's column blocks; warps and stages mean nothing to the interpreter."""
    ours = [name for name in KERNELS if name.startswith(("memory_", "delta_"))]
    assert len(ours) == 9
    with ExitStack() as stack:
        for name in ours:
            blocks = KERNELS[name].configs(CONSTANTS)[0].blocks
            stack.enter_context(forced(KERNELS[name], Config((("BV", width),) if blocks else ())))
        check_canaries(ours, DV=32, V_STRIDE=32)


def test_plans_reach_every_kernel() -> None:
    with planning() as launches:
        for plan in (*DELTA_PLANS.values(), *LINEAR_PLANS.values()):
            plan()
    assert {launch.kernel.name for launch in launches} >= {n for n in KERNELS if n.startswith(("memory_", "delta_"))}


@pytest.mark.parametrize("operation", [delta_rule, linear_attention])
def test_decoding_in_triton(operation: Callable[..., Any]) -> None:
    """Token by token without gradients: another kernel, from a state in chunks, in rows and packed."""
    draw = Draw(3, torch.float32)
    q, k, v = draw.normal(2, 22, 2, 16), draw.normal(2, 22, 2, 16, scale=0.25), draw.normal(2, 22, 2, 32)
    gates = [draw.uniform(0, 1, 2, 22, 2)] * (operation is delta_rule) + [draw.uniform(-0.5, 0, 2, 22, 2)]
    given = [x.to(DEVICE) for x in (q, k, v, *gates)]
    wide = [x.double() for x in given]
    wanted, end = operation(*wide, return_state=True, backend="reference")
    o, state = operation(*(x[:, :18] for x in given), chunk_size=16, return_state=True, backend="triton")
    parts = [o]
    for t in (18, 19):
        with planning() as launches:
            operation(*(x[:, t : t + 1] for x in given), state=state, return_state=True, backend="triton")
        assert [launch.kernel.name for launch in launches] == ["memory_steps"]
        o, state = operation(*(x[:, t : t + 1] for x in given), state=state, return_state=True, backend="triton")
        parts.append(o)
    # The last tokens of both rows as packed sequences, of which one more has none.
    last = [x[:, 20:].flatten(0, 1).unsqueeze(0) for x in given]
    memory = torch.cat([state["memory"][:1], torch.ones(3, 2, 16, 32, device=DEVICE), state["memory"][1:]])
    borders = torch.tensor([0, 2, 2, 2, 2, 4], dtype=torch.int32, device=DEVICE)
    o, state = operation(*last, state={"memory": memory}, cu_seqlens=borders, return_state=True, backend="triton")
    parts.append(o.view(2, 2, 2, 32))
    assert_close([torch.cat(parts, 1)], [wanted], CLOSE, "outputs")
    assert_close([state["memory"][[0, 4]]], [end["memory"]], CLOSE, "state")
    assert torch.equal(state["memory"][1:4], memory[1:4])


def test_inputs_may_be_views() -> None:
    """Of one projection, read where they lie; and of any other layout, copied."""
    whole = Draw(4, torch.float32).normal(1, 18, 3 * 32).to(DEVICE)
    views = [x.unflatten(-1, (2, 16)) for x in whole.chunk(3, -1)]
    wanted, _ = linear_attention(*(x.contiguous() for x in views), chunk_size=16, backend="triton")
    assert torch.equal(linear_attention(*views, chunk_size=16, backend="triton")[0], wanted)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    assert torch.equal(linear_attention(*turned, chunk_size=16, backend="triton")[0], wanted)


def call(operation: Callable[..., Any], **change: Any) -> None:
    given: dict[str, Any] = {name: torch.zeros(2, 9, 2, 16) for name in ("q", "k", "v")}
    given["log_decay"] = torch.zeros(2, 9, 2)
    if operation is delta_rule:
        given["beta"] = torch.zeros(2, 9, 2)
    operation(**(given | change))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(2, 9, 32)}, "q.shape"),
    ({"q": torch.zeros(2, 0, 2, 16)}, "q.shape"),
    ({"q": torch.zeros(2, 9, 2, 16, dtype=torch.int64)}, "q.dtype"),
    ({"k": torch.zeros(2, 9, 2, 8)}, "k.shape"),
    ({"k": torch.zeros(2, 9, 2, 16, dtype=torch.float64)}, "k.dtype"),
    ({"v": torch.zeros(2, 8, 2, 16)}, "v.shape"),
    ({"v": torch.zeros(2, 9, 2, 16, device="meta")}, "v.device"),
    ({"log_decay": torch.zeros(2, 9)}, "log_decay.shape"),
    ({"log_decay": torch.zeros(2, 9, 2, dtype=torch.bfloat16)}, "log_decay.dtype"),
    ({"scale": "one"}, "scale"),
    ({"chunk_size": 0}, "chunk_size"),
    ({"chunk_size": 2.5}, "chunk_size"),
    ({"state": {"weights": torch.zeros(2, 2, 16, 16)}}, "state"),
    ({"state": {"memory": torch.zeros(2, 2, 16, 8)}}, r"state\['memory'\].shape"),
    ({"state": {"memory": torch.zeros(2, 2, 16, 16, dtype=torch.bfloat16)}}, r"state\['memory'\].dtype"),
    ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "batch size with cu_seqlens"),
    ({"backend": "cuda"}, "backend"),
    ({"chunk_size": 8, "backend": "triton"}, "chunk_size"),
    ({"v": torch.zeros(2, 9, 2, 24), "backend": "triton"}, r"v.shape\[3\]"),
    ({name: torch.zeros(2, 9, 2, 256) for name in ("q", "k")} | {"backend": "triton"}, r"q.shape\[3\]"),
    (
        {name: torch.zeros(2, 9, 2, 16).double() for name in ("q", "k", "v")}
        | {name: torch.zeros(2, 9, 2).double() for name in ("beta", "log_decay")}
        | {"backend": "triton"},
        "q.dtype",
    ),
]


@pytest.mark.parametrize("operation", [delta_rule, linear_attention])
@pytest.mark.parametrize("change, name", BAD, ids=[name for _, name in BAD])
def test_bad_input_is_named(
    operation: Callable[..., Any], change: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = {key: x for key, x in change.items() if key != "beta" or operation is delta_rule}
    if change.get("backend") == "triton":
        monkeypatch.setattr(backends, "launchable", lambda device: True)  # it is the arguments that are refused
    with pytest.raises(ValueError, match=f"^{name}"):
        call(operation, **change)


@pytest.mark.parametrize(
    "beta, name",
    [(None, "beta"), (torch.zeros(2, 9), "beta.shape"), (torch.zeros(2, 9, 2).half(), "beta.dtype")],
)
def test_bad_beta_is_named(beta: Tensor | None, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} was"):
        call(delta_rule, beta=beta)


def test_what_the_kernels_do_not_cover_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_BACKEND", "triton")
    q, k, v = tokens()
    wanted, _ = linear_attention(q, k, v, backend="torch")
    assert torch.equal(linear_attention(q, k, v)[0], wanted)
