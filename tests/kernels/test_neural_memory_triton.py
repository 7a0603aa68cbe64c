"""The Triton kernels of neural memory over all choices: every pair of them occurs together in one row of ``ARRAY``."""

import logging
from functools import partial
from itertools import combinations, product
from typing import Any

import pytest
import torch
from cases_neural_memory import FIELDS, make
from harness import (
    Draw,
    OperationCase,
    assert_close,
    check_equals_reference,
    cut,
    outputs_and_gradients,
    to_dtype,
    warm_state,
)
from triton_checks import check_configurations

from palimpsest.kernels import MemorySpec, backend, neural_memory
from palimpsest.kernels.launch import Kernel, planning, targeting
from palimpsest.kernels.neural_memory.backward import CARRY, READS_BACKWARD
from palimpsest.kernels.neural_memory.canary import spec_of
from palimpsest.kernels.neural_memory.coverage import COVERED, uncovered
from palimpsest.kernels.neural_memory.forward import READS, STATES, constants_of, step_length
from palimpsest.kernels.neural_memory.gate_kernels import GATES, GATES_BACKWARD, NAMES
from palimpsest.kernels.neural_memory.plans import PLANS, VARIANTS
from palimpsest.kernels.op import NotCovered

#: network, depth, expansion, norm, residual, bias, retention, rule, chunk_size, read_after_write; packed, warm state.
ARRAY = [
    ("mlp", 2, 2, True, True, "dot", "l2", "momentum", 64, True, True, True),
    ("mlp", 2, 1, False, False, "l2", "none", "gd", 32, True, False, False),
    ("linear", 1, 1, False, True, "l2", "l2", "momentum", 128, False, False, True),
    ("linear", 1, 1, True, False, "dot", "none", "gd", 16, False, True, True),
    ("mlp", 2, 1, True, True, "dot", "none", "momentum", 128, False, True, False),
    ("mlp", 2, 2, False, False, "l2", "l2", "momentum", 16, True, True, False),
    ("mlp", 2, 2, True, False, "dot", "l2", "gd", 32, False, False, True),
    ("linear", 1, 1, False, False, "dot", "none", "gd", 64, False, False, False),
    ("mlp", 2, 1, True, True, "l2", "l2", "gd", 16, False, False, True),
    ("linear", 1, 1, True, True, "l2", "none", "momentum", 32, True, True, False),
    ("mlp", 2, 2, True, False, "dot", "none", "gd", 128, True, False, True),
    ("mlp", 2, 1, False, True, "l2", "none", "momentum", 64, False, True, True),
]
#: Tokens: into the second chunk, past the kept state; of 128, into the second step of the second chunk.
LENGTHS = {16: 35, 32: 45, 64: 70, 128: 200}
# Float32 against float64: the unit is 6e-8, and a LayerNorm's 1/std stands in front of every error. The memories beyond
# the array have their own: with a LayerNorm the reference itself, run in float32, ends up to 1.3e-5 from its float64
# self there.
CLOSE, CLOSE_NORM = 1e-5, 3e-5

#: Networks, biases, retentions and rules beyond those: choices, packed, warm state. Of muon few Newton-Schulz steps,
#: which make less of rounding.
Row = tuple[dict[str, Any], bool, bool]
PAIRED = {
    "network": ("linear", "mlp"),
    "bias": ("l2", "dot"),
    "retention": ("l2", "none"),
    "rule": ("momentum", "gd"),
}
BEYOND: list[Row] = [
    ({"bias": "huber"}, True, True),
    (
        {
            "bias": "lp",
            "lp_power": 2.5,
            "norm": False,
            "residual": False,
            "retention": "none",
            "rule": "gd",
            "read_after_write": False,
        },
        False,
        True,
    ),
    ({"network": "linear", "bias": "lp", "norm": True, "residual": True}, True, False),
    ({"network": "linear", "bias": "huber", "rule": "gd", "retention": "none"}, False, True),
    ({"retention": "norm"}, True, True),
    ({"network": "linear", "retention": "norm", "rule": "gd", "chunk_size": 128}, False, True),
    ({"retention": "lq"}, True, True),
    ({"network": "linear", "retention": "lq", "lq_power": 2.5, "bias": "dot", "rule": "gd"}, False, True),
    # Errors within a threshold and no LayerNorm of near equal outputs, which would amplify rounding.
    ({"retention": "kl", "bias": "huber", "norm": False}, True, True),
    (
        {"network": "linear", "retention": "kl", "bias": "dot", "norm": True, "rule": "gd", "chunk_size": 128},
        False,
        True,
    ),
    (
        {"network": "gated_mlp", "retention": "kl", "bias": "huber", "norm": False, "read_after_write": False},
        False,
        False,
    ),
    ({"network": "gated_mlp"}, True, True),
    ({"network": "gated_mlp", "norm": False, "bias": "dot", "retention": "norm", "chunk_size": 128}, False, True),
    ({"network": "gated_mlp", "bias": "lp", "retention": "lq", "rule": "gd", "expansion": 2}, False, False),
    ({"window": 5}, True, True),
    ({"network": "linear", "window": 3, "rule": "muon", "ns_steps": 2}, True, True),
    (
        {"network": "linear", "window": 4, "rule": "muon_gd", "ns_steps": 2, "chunk_size": 32, "ns_every": 16}
        | {"read_after_write": False},
        False,
        True,
    ),
    ({"network": "linear", "window": 20, "bias": "huber", "norm": True, "read_after_write": False}, False, True),
    ({"network": "linear", "window": 40, "rule": "gd", "retention": "norm", "chunk_size": 64}, True, False),
    (
        {"network": "gated_mlp", "window": 2, "retention": "kl", "bias": "huber", "norm": False, "chunk_size": 32},
        False,
        False,
    ),
    ({"network": "linear", "retention": "lq", "rule": "muon_gd", "ns_steps": 2, "read_after_write": False}, True, True),
    ({"network": "gated_mlp", "norm": False, "retention": "norm", "rule": "muon", "ns_steps": 1}, False, True),
    ({"network": "linear", "rule": "muon", "ns_steps": 3, "chunk_size": 32, "ns_every": 16}, False, False),
]


def named(row: Row) -> str:
    """A row's name in a report."""
    return "-".join(map(str, row[0].values()))


def beyond(choices: dict[str, Any]) -> MemorySpec:
    """The memory of a row of ``BEYOND``, as small as the kernels go."""
    return MemorySpec(**({"expansion": 1, "chunk_size": 16} | choices))


#: For the canaries of other choices.
OTHERS = [
    MemorySpec("linear", chunk_size=16, bias="huber", retention="norm"),
    MemorySpec("linear", chunk_size=16, norm=True, bias="lp", lp_power=2.5, retention="lq", lq_power=3.0),
    MemorySpec("gated_mlp", expansion=1, chunk_size=16, norm=False, retention="kl"),
]
#: And of the gates' kernels alone; with muon all other kernels have the canary of the memories above.
MUON = [
    MemorySpec("linear", chunk_size=32, rule="muon", ns_every=16, ns_steps=3),
    MemorySpec("linear", chunk_size=16, rule="muon_gd", read_after_write=False),
]


def case_of(spec: MemorySpec, heads: int = 1, width: int = 16, close: float = CLOSE) -> OperationCase:
    """A case for the harness."""
    return OperationCase(
        name="neural_memory",
        operation="neural_memory",
        call=neural_memory,
        make=partial(make, spec=spec, heads=heads, width=width),
        tokens=("q", "k", "v", "step", "log_retain", "log_momentum", "gamma", "delta"),
        state=True,
        packed=True,
        block=spec.chunk_size,
        single=close,
    )


@pytest.mark.parametrize("row", ARRAY, ids=lambda row: "-".join(str(x) for x in row))
def test_every_pair_of_choices_equals_the_reference(row: tuple[Any, ...]) -> None:
    """Values, state and every gradient; two heads in the first row of each chunk size."""
    network, depth, expansion, *rest, packed, warm = row
    spec = MemorySpec(expansion=expansion, **dict(zip(FIELDS, (network, depth, *rest), strict=True)))
    heads = 2 if spec.chunk_size == 16 else 1
    check_equals_reference(
        case_of(spec, heads), "triton", torch.float32, LENGTHS[spec.chunk_size], packed=packed, warm=warm
    )


@pytest.mark.parametrize("row", BEYOND, ids=named)
def test_other_choices_equal_the_reference(row: Row) -> None:
    """Values, state and every gradient, that of huber's thresholds too."""
    choices, packed, warm = row
    spec = beyond(choices)
    close = CLOSE_NORM if spec.norm else CLOSE
    # After a state in the middle of a chunk into the third, and of a chunk of several steps into the second.
    length = 80 if spec.chunk_size > 32 else 40 if packed or spec.chunk_size == 32 else 26
    check_equals_reference(case_of(spec, close=close), "triton", torch.float32, length, packed=packed, warm=warm)


def test_chunks_of_wide_heads_are_taken_in_steps() -> None:
    """Of 32 tokens with heads of 128: a chunk of 64 is two of them with one anchor."""
    spec = MemorySpec("gated_mlp", expansion=1, chunk_size=64)
    assert step_length(spec, 128) == 32
    check_equals_reference(case_of(spec, width=128), "triton", torch.float32, 70, packed=True, warm=True)


#: What takes keys of more than 32 numbers, or more than 32 tokens, by parts: muon's states, the reads of wide heads
#: with three matrices, and the backward of kl.
PARTED: list[tuple[dict[str, Any], int]] = [
    ({"network": "gated_mlp", "rule": "muon", "ns_steps": 1, "norm": False, "chunk_size": 64}, 64),
    ({"rule": "muon_gd", "ns_steps": 1, "norm": False, "retention": "lq"}, 128),
    ({"network": "gated_mlp", "norm": False, "retention": "kl", "bias": "huber"}, 128),
    ({"retention": "kl", "bias": "huber", "norm": False, "chunk_size": 64}, 16),
    ({"rule": "muon", "ns_steps": 1, "norm": False, "retention": "lq", "chunk_size": 64}, 32),
    ({"network": "gated_mlp", "rule": "muon", "ns_steps": 1, "norm": False, "retention": "lq", "chunk_size": 64}, 16),
]


@pytest.mark.parametrize(
    "choices, width",
    PARTED,
    ids=lambda x: "-".join(str(y) for y in x.values() if isinstance(y, str)) if isinstance(x, dict) else "",
)
def test_what_is_taken_by_parts_equals_the_reference(choices: dict[str, Any], width: int) -> None:
    """Values, state and every gradient, into the second step; sums are of more terms than those above."""
    spec = beyond(choices)
    check_equals_reference(
        case_of(spec, width=width, close=CLOSE_NORM), "triton", torch.float32, spec.chunk_size + 6, warm=True
    )


def test_logarithms_of_weights_may_be_large() -> None:
    """Of kl, where some writes were: at a chunk's end a weight is as exact as its own size lets it be."""
    spec = MemorySpec("linear", retention="kl", rule="gd", bias="dot", norm=False, chunk_size=16)
    case, arguments = case_of(spec), make(Draw(0, torch.float32), 1, 20, spec=spec, heads=1, width=16)
    arguments["v"][:, :16] *= 1e5
    arguments["log_retain"].zero_()  # else what decay takes of the logarithms is most of what is read
    found, _ = case.run(arguments, "triton")
    wanted, state = case.run(to_dtype(arguments, torch.float64), "reference")
    assert state["anchor.0"].abs().max() > 1e4
    assert_close([found[:, 16:]], [wanted[:, 16:]], CLOSE, "values")


def test_tokens_of_a_part_are_as_many_as_a_plan_says() -> None:
    """On Blackwell 16 in muon's states, and all of a step in the way back."""
    choices, width = PARTED[0]
    spec = beyond(choices)
    with targeting(100):
        check_equals_reference(case_of(spec, width=width, close=CLOSE_NORM), "triton", torch.float32, 70, warm=True)


#: What has no kernels without spills on some GPUs: choices, width, how it is named, where it has them.
ELSEWHERE: list[tuple[dict[str, Any], int, str, tuple[int, ...]]] = [
    ({"network": "gated_mlp", "rule": "muon"}, 64, "rule muon and network gated_mlp", (90, 100)),
    ({"rule": "muon_gd"}, 128, "rule muon_gd and heads of 128", (90,)),
    ({"rule": "muon", "window": 4}, 64, "rule muon and a window", (90, 100)),
    ({"retention": "kl", "chunk_size": 64}, 128, "retention kl and heads of 128", (90, 100)),
]


@pytest.mark.parametrize("choices, width, named, fit", ELSEWHERE, ids=["gated", "muon", "window", "kl"])
def test_what_spills_on_one_architecture_runs_plain_torch_there(
    choices: dict[str, Any],
    width: int,
    named: str,
    fit: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It says so in one line, and is refused where Triton is asked for by name; other GPUs have the kernels."""
    spec = beyond(choices)
    given = make(Draw(0, torch.float32), 1, 3, spec=spec, heads=1, width=width)
    why = f"GPU was sm_80; it must be {' or '.join(f'sm_{arch}' for arch in fit)} with {named}, whose registers spill"
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.setenv("PALIMPSEST_BACKEND", "triton")
    with targeting(80), caplog.at_level(logging.INFO, "palimpsest.kernels"):
        with pytest.raises(NotCovered, match=why):
            neural_memory(**given, backend="triton")
        for _ in range(2):
            o, _ = neural_memory(**given)
    assert [line for line in caplog.messages if "sm_80" in line] == [
        f"neural_memory: torch, for the Triton kernels do not cover this call: {why}"
    ]
    assert torch.equal(o, neural_memory(**given, backend="torch")[0])
    assert uncovered(torch.bfloat16, width, width, spec) is None, "no GPU in particular"
    for arch in (80, 90, 100):
        with targeting(arch):
            assert (uncovered(torch.bfloat16, width, width, spec) is None) == (arch in fit)
            assert uncovered(torch.bfloat16, width, width, beyond({"retention": "lq"})) is None


USUAL, FOUR, WAITS = "warps=8 stages=1", "warps=4 stages=1", "warps=8 stages=2"
WIDE: dict[str, Any] = {"width": 128, "chunk_size": 64}
NARROW: dict[str, Any] = {"network": "linear", "width": 32}
#: Kernel, choices, and what it is launched with on sm_80, sm_90 and sm_100, where these differ.
LAUNCHES: list[tuple[Kernel, dict[str, Any], tuple[str, str, str]]] = [
    (STATES, {"network": "gated_mlp", "rule": "muon", "chunk_size": 64}, (FOUR, FOUR, f"ROWS=16 {USUAL}")),
    (STATES, {"rule": "muon", "expansion": 4, "chunk_size": 64}, (FOUR, USUAL, f"ROWS=16 {USUAL}")),
    (STATES, {"retention": "lq", "expansion": 4, "chunk_size": 64}, (USUAL, USUAL, FOUR)),
    (STATES, {"network": "gated_mlp", "rule": "gd", **WIDE}, (FOUR, USUAL, USUAL)),
    (STATES, {"rule": "muon", "chunk_size": 32, **NARROW}, ("warps=4 stages=2", FOUR, FOUR)),
    (STATES, {"retention": "kl", **NARROW}, ("warps=4 stages=2", FOUR, FOUR)),
    (STATES, {"retention": "norm", **NARROW}, (FOUR, FOUR, "warps=4 stages=2")),
    (STATES, {"network": "linear", **WIDE}, (FOUR, USUAL, USUAL)),
    (READS, {"network": "linear", **WIDE}, (f"{USUAL}, {FOUR}", f"{USUAL}, {FOUR}", FOUR)),
    (READS, {"chunk_size": 32}, (USUAL, USUAL, FOUR)),
    (READS, {"rule": "gd", "expansion": 4, **WIDE}, (f"{USUAL}, {FOUR}", f"{USUAL}, {FOUR}", USUAL)),
    (READS, {"rule": "gd", "retention": "lq", **WIDE}, (USUAL, f"{USUAL}, {FOUR}", USUAL)),
    (READS_BACKWARD, {"retention": "norm", **NARROW}, (USUAL, USUAL, FOUR)),
    (CARRY, {"rule": "muon", "expansion": 4, "chunk_size": 64}, (USUAL, USUAL, f"ROWS=64 {FOUR}")),
    (CARRY, {"network": "gated_mlp", **WIDE}, (WAITS, USUAL, USUAL)),
    (CARRY, {"retention": "norm", **WIDE}, (WAITS, USUAL, USUAL)),
]


@pytest.mark.parametrize("kernel, choices, wanted", LAUNCHES, ids=lambda x: x.name if isinstance(x, Kernel) else "")
def test_launch_plans_go_by_architecture(kernel: Kernel, choices: dict[str, Any], wanted: tuple[str, ...]) -> None:
    """What spills with the warps or stages of the others on one GPU alone has its own there."""
    given = {name: value for name, value in choices.items() if name != "width"}
    spec, width = beyond(given), choices.get("width", 64)
    arguments = make(Draw(0, torch.float32), 1, 3, spec=spec, heads=1, width=width)
    constants = constants_of(arguments["q"], arguments["weights"], False, False, True, spec)
    for arch, plan in zip((80, 90, 100), wanted, strict=True):
        with targeting(arch):
            found = ", ".join(str(config).removeprefix("BF=16 ") for config in kernel.configs(constants))
        assert found == plan, arch


def choices_of(call: Any) -> dict[str, Any]:
    """What a plan calls; chunks of more than one step as one."""
    spec = call.args[0]
    given = {name: getattr(spec, name) for name in (*FIELDS, "expansion") if name not in ("depth", "chunk_size")}
    if spec.network == "linear":
        del given["expansion"]
    return given | {"chunk": min(spec.chunk_size, 128), **call.keywords}


def test_every_pair_of_choices_is_in_a_plan_or_variant() -> None:
    """What compiles for GPUs that are not here; of hidden widths the least and the largest documented. Of networks,
    biases and retentions that are not paired, each with what matters most to registers."""
    every = [choices_of(call) for name, call in (PLANS | VARIANTS).items() if "decode" not in name]
    rows = [row for row in every if all(row[name] in paired for name, paired in PAIRED.items())]
    values = {name: {row[name] for row in rows if name in row} for row in rows for name in row}
    assert values["width"] == {32, 64, 128} and values["chunk"] == {16, 32, 64, 128} and values["expansion"] == {1, 4}
    assert all(len(found) > 1 for found in values.values()), values
    for one, other in combinations(values, 2):
        linear = {
            (x, y) for x in values[one] for y in values[other] if "linear" in (x, y) and "expansion" in (one, other)
        }
        found = {(row[one], row[other]) for row in rows if one in row and other in row}
        assert set(product(values[one], values[other])) == found | linear, (one, other)
    for name, paired in PAIRED.items():
        for value in set(COVERED[name]) - set(paired):
            own = [row for row in every if row[name] == value]
            for other in {"network", "norm", "rule", "packed", "width"} - {name}:
                assert len({row.get(other, False) for row in own}) > 1, (value, other)


@pytest.mark.parametrize("row", [ARRAY[0], ARRAY[2], ARRAY[5], ARRAY[8]], ids=lambda row: "-".join(map(str, row)))
def test_decoding_equals_the_reference(row: tuple[Any, ...]) -> None:
    """Without gradients one token after a state has a kernel of its own; past a chunk's end, the anchor moves."""
    network, depth, expansion, *rest, _, _ = row
    check_decoding(MemorySpec(expansion=expansion, **dict(zip(FIELDS, (network, depth, *rest), strict=True))), heads=2)


@pytest.mark.parametrize("row", BEYOND, ids=named)
def test_decoding_of_other_choices_equals_the_reference(row: Row) -> None:
    check_decoding(beyond(row[0]), heads=1)


def check_decoding(spec: MemorySpec, heads: int) -> None:
    """Four tokens, one at a time, of which the second ends a chunk, or what muon orthogonalises at once."""
    case = case_of(spec, heads)
    length = spec.step_size + 2
    arguments = case.arguments(0, torch.float32, 2, length)
    wide = to_dtype(arguments, torch.float64)
    with torch.no_grad():
        split = slice(0, spec.step_size - 2)
        _, state = case.run(cut(case, arguments, split), "triton")
        _, wanted_state = case.run(cut(case, wide, split), "reference")
        for t in range(spec.step_size - 2, length):
            with planning() as plan:
                case.run(cut(case, arguments, slice(t, t + 1)), "triton", state=state)
            assert [launch.kernel.name for launch in plan] == ["neural_memory_decode"]
            o, state = case.run(cut(case, arguments, slice(t, t + 1)), "triton", state=state)
            wanted, wanted_state = case.run(cut(case, wide, slice(t, t + 1)), "reference", state=wanted_state)
            assert_close([o, *state.values()], [wanted, *wanted_state.values()], CLOSE, f"token {t}")


def test_short_documents_that_cross_a_chunk_have_places_of_their_own() -> None:
    """Each goes on in the middle of a chunk and ends in the next: two steps for two tokens."""
    spec = MemorySpec(expansion=1, chunk_size=16)
    case = case_of(spec)
    arguments = case.arguments(0, torch.float32, 1, 7)
    borders = torch.tensor([0, 2, 4, 7], dtype=torch.int32)
    state = warm_state(case, torch.float32, 3, 3)
    state["position"] = torch.tensor([15, 15, 14], dtype=torch.int32)
    found = outputs_and_gradients(case, arguments, "triton", state=state, cu_seqlens=borders)
    wide = to_dtype({"arguments": arguments, "state": state}, torch.float64)
    wanted = outputs_and_gradients(case, wide["arguments"], "reference", state=wide["state"], cu_seqlens=borders)
    for a, b, what in zip(found, wanted, ("values", "gradients"), strict=True):
        assert_close(a, b, CLOSE, what)


def test_muon_of_nothing_is_nothing() -> None:
    """Where nothing was written S is zero: NS(S) is too, and its gradient finite."""
    spec = MemorySpec("linear", chunk_size=16, rule="muon", ns_steps=2)
    case = case_of(spec)
    arguments = case.arguments(0, torch.float32, 1, 17)
    arguments["step"] = torch.zeros_like(arguments["step"])
    found = outputs_and_gradients(case, arguments, "triton")
    wanted = outputs_and_gradients(case, to_dtype(arguments, torch.float64), "reference")
    for a, b, what in zip(found, wanted, ("values", "gradients"), strict=True):
        assert_close(a, b, CLOSE, what)


@pytest.mark.parametrize("spec", [MemorySpec(expansion=2, chunk_size=16), MemorySpec("linear", chunk_size=16), *OTHERS])
def test_every_configuration_is_right(spec: MemorySpec) -> None:
    """By the canaries that guard them on a GPU."""
    given = make(Draw(0, torch.float32), 1, 3, spec=spec, heads=1, width=32 if spec.network == "linear" else 16)

    def call() -> None:
        arguments = {name: x.requires_grad_() if name == "v" else x for name, x in given.items()}
        o, state = neural_memory(**arguments, return_state=True, backend="triton")
        o.sum().backward()
        with torch.no_grad():
            one = {name: x[:, :1] if name in case_of(spec).tokens and x is not None else x for name, x in given.items()}
            neural_memory(**one, state=state, backend="triton")

    check_configurations(call)


@pytest.mark.parametrize("spec", MUON, ids=lambda spec: spec.rule)
def test_the_gates_of_muon_are_right(spec: MemorySpec) -> None:
    """By their canaries."""
    given = make(Draw(0, torch.float32), 1, 3, spec=spec, heads=1, width=16)
    constants = constants_of(given["q"], given["weights"], False, False, False, spec)
    for kernel in (GATES, GATES_BACKWARD):
        pairs = kernel.canary({name: constants[name] for name in (*NAMES, "WINDOW")})
        assert_close(*zip(*pairs, strict=True), CLOSE, kernel.name)


@pytest.mark.parametrize("spec", [MemorySpec(expansion=2, chunk_size=16), *OTHERS, *MUON])
def test_a_canary_is_of_the_memory_that_it_guards(spec: MemorySpec) -> None:
    given = make(Draw(0, torch.float32), 1, 3, spec=spec, heads=1, width=16)
    found = spec_of(constants_of(given["q"], given["weights"], False, False, False, spec))
    for name in (*FIELDS, "lp_power", "lq_power", "step_size", "ns_steps"):
        assert getattr(found, name) == getattr(spec, name), name


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"width": 8}, r"q\.shape\[-1\] was 8; it must be 16, 32, 64 or 128 for backend 'triton'"),
        ({"depth": 3}, "depth was 3; it must be 1 or 2"),
        ({"expansion": 3}, "expansion was 3; it must be 1, 2, 4 or 8"),
        ({"chunk_size": 48}, "chunk_size was 48; it must be 16, 32 or a multiple of 64"),
        ({"dtype": torch.float64}, r"q\.dtype was float64; it must be float32, bfloat16 or float16"),
        ({"rule": "muon", "ns_every": 8}, "ns_every was 8; it must be 16, 32 or a multiple of 64"),
        ({"window": 58}, "window was 58; it must be at most 57 with heads of 16"),
    ],
)
def test_what_the_kernels_do_not_cover_is_named(changes: dict[str, Any], named: str) -> None:
    width, dtype = changes.pop("width", 16), changes.pop("dtype", torch.float32)
    spec = MemorySpec(**({"expansion": 1, "chunk_size": 16} | changes))
    given = make(Draw(0, dtype), 1, 3, spec=spec, heads=1, width=width)
    with pytest.raises(ValueError, match=named):
        neural_memory(**given, backend="triton")
    neural_memory(**given)
