"""The whole design space of neural memory: a covering array of it against the token loop, and its other promises.

The array is cheap because it is small, 216 memories of four tokens a chunk; what holds of every operation besides its
values (``harness.py``) is asked of two memories that have between them all that is not in ``cases_neural_memory.py``.
"""

import random
import re
from dataclasses import replace
from functools import cache, partial
from itertools import combinations, product
from typing import Any

import pytest
import torch
from cases_neural_memory import NORM_EXACT, NORM_SINGLE, WIDTH, costs, make
from harness import (
    EXACT,
    Draw,
    OperationCase,
    assert_close,
    check_autocast,
    check_compile,
    check_cost,
    check_equals_reference,
    check_operators,
    check_packed,
    check_poisoned,
    check_repeat,
    check_split,
    check_unseen,
    error,
    leaves,
    outputs_and_gradients,
    to_dtype,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palimpsest.kernels import MemorySpec, neural_memory, neural_memory_read, neural_memory_state
from palimpsest.kernels.neural_memory.cost import matmul_flops
from palimpsest.kernels.neural_memory.generic import Carry, Tokens, step_forward
from palimpsest.kernels.neural_memory.spec import BIASES, GATES, RETENTIONS, RULES

CHUNK, LENGTH = 4, 6
BORDERS = torch.tensor([0, 1, 1, 6], dtype=torch.int32)  # packed: one document is empty, another crosses chunks
WORDS = {"linear": {"network": "linear"}, "mlp": {"depth": 2}, "deep": {"depth": 3}, "gated": {"network": "gated_mlp"}}
#: Every choice with all its values: a network by its word, ``ns_every`` where the rule is a muon.
VALUES: dict[str, tuple[Any, ...]] = {
    "bias": BIASES,
    "retention": RETENTIONS,
    "rule": RULES,
    "network": tuple(WORDS),
    "norm": (True, False),
    "residual": (True, False),
    "window": (1, 2, 6),
    "read_after_write": (True, False),
    "ns_every": (None, 2),
    "gates": GATES,
    "packed": (False, True),
    "warm": (False, True),
}
# Five Newton-Schulz steps multiply small singular values, and the rounding in them, by 3.4445^5 = 480.
MUON_EXACT, MUON_SINGLE = 5e-11, 1e-3
# Between them, all that no case of ``cases_neural_memory.py`` has; a halo that is shorter than a step, and one longer.
BOTH = {
    "gated_huber_norm_muon": MemorySpec(
        "gated_mlp", expansion=2, bias="huber", retention="norm", rule="muon", chunk_size=CHUNK, ns_every=2, window=2
    ),
    "linear_lp_kl": MemorySpec(
        "linear",
        norm=True,
        bias="lp",
        retention="kl",
        chunk_size=CHUNK,
        read_after_write=False,
        window=6,
        gates="channel",
    ),
}
both = pytest.mark.parametrize("spec", BOTH.values(), ids=BOTH)


def spec_of(row: dict[str, Any]) -> MemorySpec:
    """The memory of a row; ValueError where it means nothing."""
    choices = {name: x for name, x in row.items() if name not in ("network", "packed", "warm")}
    return MemorySpec(expansion=2, chunk_size=CHUNK, **WORDS[row["network"]], **choices)


@cache
def means_something(*choices: tuple[str, Any]) -> bool:
    """Whether a memory with these choices is allowed, whatever the others are."""
    given = dict(choices)
    if given.get("ns_every") is not None:
        given.setdefault("rule", "muon")
    try:
        spec_of({"network": "linear"} | given)
    except ValueError:
        return False
    return True


def pairs(row: dict[str, Any]) -> set[tuple[tuple[str, Any], ...]]:
    """All pairs of choices in a row."""
    return set(combinations(row.items(), 2))


@cache
def array() -> list[dict[str, Any]]:
    """Three rows for every bias, retention and rule that go together, the rest such that all pairs occur."""
    draw, seen, rows = random.Random(0), set(), []
    for _, *first in product(range(3), BIASES, RETENTIONS, RULES):
        fixed = dict(zip(("bias", "retention", "rule"), first, strict=True))
        if not means_something(*fixed.items()):
            continue
        candidates = []
        for _ in range(20):
            row = {name: fixed.get(name, draw.choice(values)) for name, values in VALUES.items()}
            row["ns_every"] = row["ns_every"] if "muon" in row["rule"] else None
            candidates.append((len(pairs(row) - seen), len(candidates), row))
        rows.append(max(candidates)[2])
        seen |= pairs(rows[-1])
    return rows


def given(draw: Draw, batch: int, length: int, *, spec: MemorySpec, heads: int = 2) -> dict[str, Any]:
    """Arguments of the operation; gates of channels are unlike each other."""
    found = make(draw, batch, length, spec=spec, heads=heads)
    for name in ("step", "log_retain", "log_momentum"):
        if spec.gates == "channel" and (gate := found[name]) is not None:
            found[name] = gate.unsqueeze(-1) * draw.uniform(0.3, 1.7, *gate.shape, WIDTH, dtype=gate.dtype)
    return found


def case_of(spec: MemorySpec, heads: int = 1) -> OperationCase:
    """A case of the operation with a memory."""
    # Of kl all weights are positive: the differences that a loss sees cancel, as in a LayerNorm.
    exact = MUON_EXACT if spec.orthogonal else NORM_EXACT if spec.norm or spec.retention == "kl" else EXACT
    return OperationCase(
        name="neural_memory",
        operation="neural_memory",
        call=neural_memory,
        make=partial(given, spec=spec, heads=heads),
        tokens=("q", "k", "v", "step", "log_retain", "log_momentum", "gamma", "delta"),
        state=True,
        packed=True,
        block=CHUNK,
        cost=costs,
        exact=exact,
        single=MUON_SINGLE if spec.orthogonal else NORM_SINGLE,
        backends=("torch",),
    )


def any_state(spec: MemorySpec, weights: list[torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """A state as no sequence leaves it: every tensor is drawn by itself, so that none is taken for another."""
    draw, state = Draw(3, torch.float64), neural_memory_state(weights, rows, spec)
    found = {name: x + draw.normal(*x.shape, scale=0.1) for name, x in state.items() if name != "position"}
    found |= {
        name: draw.uniform(0.2, 1.0, *x.shape) for name, x in found.items() if name in ("halo.gamma", "halo.delta")
    }
    return found | {"position": draw.integers(CHUNK, rows).to(torch.int32)}


def test_the_array_holds_every_pair() -> None:
    assert len(array()) >= 200
    wanted = {
        pair
        for one, other in combinations(VALUES, 2)
        for pair in product(*([(name, x) for x in VALUES[name]] for name in (one, other)))
        if means_something(*pair)
    }
    found = set().union(*map(pairs, array()))
    assert found == wanted


@pytest.mark.parametrize("row", array(), ids=lambda row: "-".join(map(str, row.values())))
def test_every_memory_is_its_token_loop(row: dict[str, Any]) -> None:
    """Values, state and every gradient, in float64."""
    spec = spec_of(row)
    case = case_of(spec, heads=2 if spec.window == 1 else 1)
    arguments = case.arguments(0, torch.float64, 1, LENGTH)
    extra: dict[str, Any] = {"cu_seqlens": BORDERS} if row["packed"] else {}
    if row["warm"]:
        extra["state"] = any_state(spec, arguments["weights"], 3 if row["packed"] else 1)
    found, gradients = outputs_and_gradients(case, arguments, "torch", **extra)
    wanted, expected = outputs_and_gradients(case, arguments, "reference", **extra)
    assert_close(found, wanted, case.exact, "values")
    assert_close(gradients, expected, case.exact, "gradients")


@both
def test_split_anywhere_is_whole(spec: MemorySpec) -> None:
    """And decoding token by token: values, state and gradients."""
    check_split(case_of(spec), "torch", 9, [3], [CHUNK, 7], list(range(1, 9)))


@both
def test_packed_documents_are_apart(spec: MemorySpec) -> None:
    for warm in (False, True):
        check_packed(case_of(spec), "torch", 15, warm=warm)


@both
def test_future_and_other_rows_are_unseen(spec: MemorySpec) -> None:
    case = case_of(spec)
    check_unseen(case, "torch", torch.float64, 9, slice(3, None), slice(0, 3))
    check_unseen(case, "torch", torch.float64, 9, slice(8, None), slice(0, 8))
    check_unseen(case, "torch", torch.float32, 5, slice(None), slice(None), slice(1, 2), slice(2, 3))


@both
def test_single_precision_is_near(spec: MemorySpec) -> None:
    check_equals_reference(case_of(spec), "torch", torch.float32, 6, packed=True, warm=True)


@both
def test_repeats_and_writes_all_it_returns(spec: MemorySpec) -> None:
    case = case_of(spec)
    check_repeat(case, "torch", torch.float32, packed=True, warm=True)
    check_poisoned(case, "torch", packed=True, warm=False)
    check_autocast(case, "torch")
    check_cost(case, "torch")


def test_flops_are_those_of_the_products() -> None:
    """Counted by hand, D = 4, F = 8: for a step of n = 2 tokens and a halo of one key that is taken again."""
    gated, widths = BOTH["gated_huber_norm_muon"], [(4, 8), (8, 4), (4, 8)]
    # Forward of three keys, two reads of W, updates of S: three products; once more for δ W2ᵀ.
    products = 3 * (2 * 32 * (3 + 2 + 3)) + 2 * 32 * 3
    squares = 3 * 5 * (4 * 4**2 * 8 + 2 * 4**3)
    assert matmul_flops(2, 1, widths, gated) == products + squares
    # A linear memory, nine keys for a step of four: x W, W's update, S's; of four queries x W, x S and kl's. Of their
    # 10 + 20 pairs the product, and with Δ one for W and one for S; of a head's gates one for both.
    linear = BOTH["linear_lp_kl"]
    products = 2 * 16 * (3 * 9 + 3 * 4)
    assert matmul_flops(4, 1, [(4, 4)], linear) == products + 2 * (10 + 20) * (4 + 4 + 4)
    assert matmul_flops(4, 1, [(4, 4)], replace(linear, gates="head")) == products + 2 * (10 + 20) * (4 + 4)


@pytest.mark.parametrize("retention", ["lq", "kl"])
def test_weights_of_a_state_are_what_is_read(retention: str) -> None:
    """Also inside of a chunk: a token that writes nothing, of any rule, reads what ``neural_memory_read`` does."""
    spec = MemorySpec(expansion=2, retention=retention, rule="gd", chunk_size=CHUNK)
    given = make(Draw(0, torch.float64), 2, 6, spec=spec)
    _, state = neural_memory(**given, return_state=True)
    assert state is not None
    last = {
        name: x[:, -1:] if isinstance(x, torch.Tensor) and x.dim() > 2 and name not in ("norm",) else x
        for name, x in given.items()
    }
    still = last | {"step": torch.zeros_like(last["step"]), "log_retain": torch.zeros_like(last["log_retain"])}
    wanted, _ = neural_memory(**still, state=state)
    found = neural_memory_read(still["q"], weights=state, spec=spec, norm=given["norm"])
    assert error(found, wanted) <= NORM_EXACT


def test_what_a_state_begins_with() -> None:
    """W_0 of kl is positive and sums to its inputs, whatever is given; of lq it has the norm that D's says."""
    given = [torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)]
    kl = neural_memory_state(given, 3, MemorySpec("linear", retention="kl"))["weights.0"]
    assert (kl > 0).all() and error(kl.sum(-2), torch.full((3, 2, 4), 4.0, dtype=torch.float64)) <= EXACT
    assert error(kl / kl[..., :1, :], (given[0] - given[0][:, :1]).exp().expand(3, -1, -1, -1)) <= EXACT
    lq = neural_memory_state(given, 3, MemorySpec("linear", retention="lq", lq_power=4))["weights.0"]
    norms = lq.abs().pow(4).sum((-2, -1)).pow(0.25)
    assert error(norms, given[0].abs().pow(4).sum((-2, -1)).pow(-0.25).expand(3, 2)) <= EXACT


def test_before_the_first_token_there_is_nothing_in_the_window() -> None:
    """It writes γ θ of its own, as without a window; and no tokens leave the state as it was."""
    spec = MemorySpec("gated_mlp", expansion=2, bias="huber", window=6, chunk_size=CHUNK)
    given = make(Draw(0, torch.float64), 2, 1, spec=spec)
    alone = given | {"spec": replace(spec, window=1), "step": given["step"] * given["gamma"], "gamma": None}
    found, state = neural_memory(**given, return_state=True)
    assert error(found, neural_memory(**alone)[0]) <= NORM_EXACT
    o, after = neural_memory(**make(Draw(0, torch.float64), 2, 0, spec=spec), state=state, return_state=True)
    assert state is not None and after is not None
    assert o.shape == (2, 0, 2, 4) and all(after[name].equal(x) for name, x in state.items())


@pytest.mark.parametrize("rule", ["gd", "muon"])
def test_norms_are_kept(rule: str) -> None:
    """Of every output unit's weights, chunk by chunk, whatever is written: LaCT's retention."""
    spec = MemorySpec(expansion=2, retention="norm", rule=rule, chunk_size=CHUNK)
    given = make(Draw(0, torch.float64), 2, 2 * CHUNK, spec=spec)
    _, state = neural_memory(**given, return_state=True)
    assert state is not None
    for i, start in enumerate(given["weights"]):
        assert not torch.allclose(state[f"weights.{i}"], start.expand(2, -1, -1, -1))
        assert error(state[f"weights.{i}"].norm(dim=-2), start.norm(dim=-2).expand(2, -1, -1)) <= EXACT


#: Steps of more than two rounds of halves: one of every slot's own gates, one of a window that crosses steps.
LONG = {
    "gated_gd": MemorySpec("gated_mlp", expansion=1, rule="gd", chunk_size=16, gates="channel"),
    "deep_window": MemorySpec(
        depth=3, expansion=1, retention="lq", chunk_size=16, window=5, read_after_write=False, gates="channel"
    ),
}


@pytest.mark.parametrize("spec", LONG.values(), ids=LONG)
def test_long_steps_of_channels(spec: MemorySpec) -> None:
    """Halves of 8 slots, documents that begin and end inside a step, and states of 11 tokens."""
    case = replace(case_of(spec), block=20)
    check_equals_reference(case, "torch", torch.float64, 29, packed=True, warm=True)


@pytest.mark.parametrize("network", ["linear", "mlp", "gated_mlp"])
def test_channels_that_are_alike_are_a_head(network: str) -> None:
    """Of the memories with a backward of their own, and of the others: values, states and gradients."""
    spec = MemorySpec(network, expansion=2, chunk_size=CHUNK)
    case = case_of(spec)
    arguments = case.arguments(0, torch.float64, 2, LENGTH)
    wanted, gradients = outputs_and_gradients(case, arguments, "torch")
    wide = dict(arguments, spec=replace(spec, gates="channel"))
    for name in ("step", "log_retain", "log_momentum"):
        wide[name] = arguments[name].unsqueeze(-1).expand(*arguments[name].shape, WIDTH)
    found, of_channels = outputs_and_gradients(case, wide, "torch")
    assert_close(found, wanted, NORM_EXACT, "values")
    together = [x.sum(-1) if x.dim() == 4 and y.dim() == 3 else x for x, y in zip(of_channels, gradients, strict=True)]
    assert_close(together, gradients, NORM_EXACT, "gradients")


@pytest.mark.parametrize("size", [0.0, -1e-3, -300.0])
def test_gates_of_channels_at_their_ends(size: float) -> None:
    """Channels that keep all beside others that keep nothing, e^-300 being 0 in float32: no quotient, no overflow."""
    spec = MemorySpec("linear", bias="dot", chunk_size=16, gates="channel")
    arguments = given(Draw(0, torch.float32), 1, 20, spec=spec)
    for name in ("log_retain", "log_momentum"):
        arguments[name] = torch.zeros_like(arguments[name])
        arguments[name][..., ::2] = size
        arguments[name][:, 7] = 0.0
    case = case_of(spec)
    found, gradients = outputs_and_gradients(case, arguments, "torch")
    wanted, expected = outputs_and_gradients(case, to_dtype(arguments, torch.float64), "reference")
    assert_close(found, wanted, NORM_SINGLE, "values")
    assert_close(gradients, expected, NORM_SINGLE, "gradients")


class Sizes(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *made])
        return out


@pytest.mark.parametrize("window", [1, 3])
def test_no_tensor_has_channels_of_every_pair_of_tokens(window: int) -> None:
    """Forward and backward of a chunk of n tokens make none of more than 2 (n + c − 1) n numbers."""
    n, spec = 32, MemorySpec("linear", chunk_size=32, window=window, gates="channel")
    arguments = leaves(given(Draw(0, torch.float32), 1, n, spec=spec, heads=1))
    tokens, empty = [arguments[name][0].transpose(0, 1) for name in ("q", "k", "v", "step", "log_retain")], None
    carry = Carry(*([arguments["weights"][0]] for _ in range(3)), [])
    gamma = None if window == 1 else torch.ones(1, n)
    if window > 1:
        carry.halo = [torch.zeros(1, window - 1, WIDTH)] * 2 + [torch.zeros(1, window - 1)]
    momentum = arguments["log_momentum"][0].transpose(0, 1)
    with Sizes() as sizes:
        step = Tokens(*tokens, momentum, gamma, empty, empty, True, True)
        step_forward(step, carry, None, spec)[0].sum().backward()
    assert 0 < sizes.largest <= 2 * (n + window - 1) * n < n * n * WIDTH


def test_gates_are_of_heads_or_channels() -> None:
    with pytest.raises(ValueError, match="gates was 'row'; it must be one of head, channel"):
        MemorySpec(gates="row")
    spec = MemorySpec("linear", gates="channel")
    assert MemorySpec.decode(spec.encode()) == spec and not spec.derived_by_hand
    arguments = given(Draw(0, torch.float32), 2, 3, spec=spec)
    for name in ("step", "log_retain", "log_momentum"):
        with pytest.raises(ValueError, match=rf"{name}\.shape .*{re.escape('[B, T, H, D_v]')}"):
            neural_memory(**arguments | {name: arguments[name][..., 0]})
    with pytest.raises(ValueError, match=rf"step\.shape .*{re.escape('[B, T, H]')}"):
        neural_memory(**arguments | {"spec": replace(spec, gates="head")})


def test_is_an_operator() -> None:
    check_operators(case_of(BOTH["linear_lp_kl"]), "torch", packed=True, warm=True)


def test_compiles_whole() -> None:
    check_compile(case_of(BOTH["gated_huber_norm_muon"]), "torch", packed=False, warm=True)
