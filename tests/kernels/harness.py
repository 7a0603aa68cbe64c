"""What every operation must hold, on every backend: one set of checks over a registry of cases.

A case is registered by a file ``cases_<operation>.py`` beside this one, which calls :func:`register_case`;
``test_conformance.py`` runs all checks that apply over all cases and backends. Nothing here knows any operation.
Tensors are on ``DEVICE``: a GPU where there is one, or what ``PALIMPSEST_TEST_DEVICE`` says.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from palimpsest.kernels.op import OPERATIONS, Cost

# Rounding alone: 4500 units of float64, which sums of these lengths stay below by an order or two, while the smallest
# mistake in a formula is larger by several.
EXACT = 1e-12
# The same sums in float32, whose unit is 6e-8: about 80 units, against the reference in float64 on the same numbers.
SINGLE = 5e-6
# The same on a GPU: its exponentials are right to 2^-22, and a float32 product there is three of tf32, which leave out
# the product of two remainders, as much again.
GPU_SINGLE = 5e-5
# Inputs are exact, arithmetic is float32, outputs and gradients are rounded to 8 bits (unit 2^-9), some of them twice
# on their way through the backward.
HALF = 2**-7

DEVICE = os.environ.get("PALIMPSEST_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
BORDERS = (0, 0, 5, 6, 13)  # packed documents: an empty one, and one of a single token; a last one takes the rest


class Draw:
    """Random arguments: the same numbers for every dtype, rounded to it."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of standard deviation ``scale``."""
        return (scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)).to(dtype or self.dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform numbers between ``low`` and ``high``."""
        numbers = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * numbers).to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in 0 .. high - 1."""
        return torch.randint(high, shape, generator=self.generator)


@dataclass(frozen=True)
class OperationCase:
    """One way of calling one operation.

    ``make(draw, batch, length)`` gives the keyword arguments of ``call``; tensors may be nested in lists, tuples and
    dicts. ``tokens`` names those with one entry per token, [B, T, ...]: these are cut along time and rows.
    ``call`` returns the output [B, T, ...], alone or in a pair with the state; with ``state`` it takes ``state`` and
    ``return_state``, with ``packed`` it takes ``cu_seqlens``. ``block`` is the length at which its inner form changes:
    a window, a chunk. ``cost(arguments)`` gives the costs of forward and backward, or is None. ``exact``, ``single``:
    the tolerances in float64 and float32, where a case has a reason for its own. ``backends``: those it runs on. On
    ``triton`` (the interpreter, where there is no GPU) every check is made in float32, to ``single``. ``operator``:
    whether a registered operator's own checks, which cost seconds, are made of it: not of cases that differ from
    another in what is computed, and neither in which tensors there are nor in their shapes.
    """

    name: str
    operation: str
    call: Callable[..., Any]
    make: Callable[[Draw, int, int], dict[str, Any]]
    tokens: tuple[str, ...]
    state: bool = False
    packed: bool = False
    block: int = 8
    cost: Callable[[dict[str, Any]], tuple[Cost, Cost]] | None = None
    exact: float = EXACT
    single: float = SINGLE
    half: bool = True
    backends: tuple[str, ...] = ("reference", "torch")
    operator: bool = True

    @property
    def tolerance(self) -> float:
        """In float32, on this device."""
        return self.single if DEVICE == "cpu" else max(self.single, GPU_SINGLE)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths at which an implementation in blocks has its borders."""
        return tuple(sorted({1, max(1, self.block - 1), self.block, self.block + 1, 2 * self.block + 3}))

    def dtype(self, backend: str) -> torch.dtype:
        """The widest dtype that a backend computes in."""
        return torch.float32 if backend == "triton" else torch.float64

    def close(self, backend: str) -> float:
        """The tolerance between two of a backend's own results, in that dtype."""
        return self.tolerance if backend == "triton" else self.exact

    def arguments(self, seed: int, dtype: torch.dtype, batch: int, length: int) -> dict[str, Any]:
        """Keyword arguments drawn from a seed."""
        return tree_map_only(Tensor, lambda x: x.to(DEVICE), self.make(Draw(seed, dtype), batch, length))

    def run(self, arguments: dict[str, Any], backend: str, **extra: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and state ({} for an operation that has none)."""
        if self.state:
            extra.setdefault("return_state", True)
        result = self.call(**arguments, **extra, backend=backend)
        output, state = result if isinstance(result, tuple) else (result, None)
        return output, state or {}


CASES: dict[str, OperationCase] = {}


def register_case(case: OperationCase) -> OperationCase:
    """Add a case to those that ``test_conformance.py`` runs."""
    if case.name in CASES or case.operation not in OPERATIONS:
        raise ValueError(
            f"case was {case.name!r} of {case.operation!r}; its name must be new, its operation registered"
        )
    CASES[case.name] = case
    return case


def floats(tree: Any) -> list[Tensor]:
    """The floating tensors of nested arguments, in order."""
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor) and x.is_floating_point()]


def leaves(tree: Any) -> Any:
    """A copy in which every floating tensor is a leaf that wants a gradient."""
    return tree_map_only(Tensor, lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), tree)


def to_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """A copy with every floating tensor in another dtype."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def cut(case: OperationCase, arguments: dict[str, Any], time: slice, rows: slice = slice(None)) -> dict[str, Any]:
    """The arguments of some tokens and rows."""
    return {
        name: value[rows, time] if name in case.tokens and value is not None else value
        for name, value in arguments.items()
    }


def borders(length: int) -> Tensor:
    """cu_seqlens of documents of unequal lengths in a row of ``length``."""
    return torch.tensor([*(b for b in BORDERS if b < length), length], dtype=torch.int32, device=DEVICE)


def error(found: Tensor, wanted: Tensor) -> float:
    """Root of the mean squared difference over that of the wanted values; absolute where those are zero."""
    found, wanted = found.double(), wanted.double()
    if found.shape != wanted.shape:
        raise AssertionError(f"shape {tuple(found.shape)} is not {tuple(wanted.shape)}")
    if not found.numel():
        return 0.0
    size = wanted.square().mean().sqrt().item()
    return (found - wanted).square().mean().sqrt().item() / (size or 1.0)


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float, what: str) -> None:
    """Assert that each tensor is within a tolerance of its like, and finite."""
    assert len(found) == len(wanted), f"{what}: {len(found)} tensors, not {len(wanted)}"
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        distance = error(a, b)
        assert distance <= tolerance, f"{what}, tensor {i} {tuple(a.shape)}: {distance:.3g} > {tolerance:.3g}"


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> None:
    """Assert bitwise equality."""
    assert len(found) == len(wanted), f"{what}: {len(found)} tensors, not {len(wanted)}"
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(a, b), f"{what}, tensor {i} {tuple(a.shape)} differs by {(a - b).abs().max().item():.3g}"


def outputs_and_gradients(
    case: OperationCase, arguments: dict[str, Any], backend: str, *, state: Any = None, **extra: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and floating state of a call on fresh leaves, and the gradients of a fixed weighting of them all."""
    arguments = leaves(arguments)
    if state is not None:
        extra["state"] = leaves(state)
    output, after = case.run(arguments, backend, **extra)
    found = [output, *floats(after)]
    draw = Draw(99, torch.float64)
    loss = sum((x * draw.normal(*x.shape).to(x)).sum() for x in found)
    wanted = floats([arguments, extra.get("state")])
    gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)  # type: ignore[arg-type]
    return [x.detach() for x in found], list(gradients)


def warm_state(case: OperationCase, dtype: torch.dtype, rows: int, seen: int) -> dict[str, Tensor]:
    """A state after ``seen`` tokens of ``rows`` rows, by the reference."""
    with torch.no_grad():
        return case.run(case.arguments(7, dtype, rows, seen), "reference")[1]


def situation(
    case: OperationCase, dtype: torch.dtype, length: int, *, packed: bool, warm: bool, batch: int = 2, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and extra arguments: rows or packed documents, fresh or after a few tokens."""
    arguments = case.arguments(seed, dtype, 1 if packed else batch, length)
    extra: dict[str, Any] = {}
    if packed:
        extra["cu_seqlens"] = borders(length)
    if warm:
        rows = extra["cu_seqlens"].numel() - 1 if packed else batch
        extra["state"] = warm_state(case, dtype, rows, case.block // 2 + 1)
    return arguments, extra


def check_equals_reference(
    case: OperationCase, backend: str, dtype: torch.dtype, length: int, *, packed: bool = False, warm: bool = False
) -> None:
    """Values, states and every gradient are those of the reference in float64 on the same numbers."""
    arguments, extra = situation(case, dtype, length, packed=packed, warm=warm)
    found, gradients = outputs_and_gradients(case, arguments, backend, **extra)
    wide = to_dtype(extra, torch.float64)
    wanted, expected = outputs_and_gradients(case, to_dtype(arguments, torch.float64), "reference", **wide)
    tolerance = {torch.float64: case.exact, torch.float32: case.tolerance}.get(dtype, HALF)
    assert_close(found, wanted, tolerance, "values")
    assert_close(gradients, expected, tolerance, "gradients")


def check_gradcheck(case: OperationCase, backend: str, *, packed: bool, warm: bool) -> None:
    """Gradients are those of finite differences, in float64."""
    arguments, extra = situation(case, torch.float64, 7, packed=packed, warm=warm, batch=1)
    flat, tree = tree_flatten([arguments, extra])
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        whole = list(flat)
        for i, x in zip(places, tensors, strict=True):
            whole[i] = x
        given, more = tree_unflatten(whole, tree)
        output, after = case.run(given, backend, **more)
        return output, *(x for x in floats(after) if x.numel() and x.requires_grad)

    inputs = tuple(flat[i].detach().clone().requires_grad_() for i in places)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def perturbed(case: OperationCase, arguments: dict[str, Any], time: slice, rows: slice = slice(None)) -> dict[str, Any]:
    """The arguments with other numbers in some tokens and rows."""
    name = case.tokens[0]
    batch, length = arguments[name].shape[:2]
    dtype = next(
        arguments[n].dtype for n in case.tokens if arguments[n] is not None and arguments[n].is_floating_point()
    )
    other = case.arguments(1234, dtype, batch, length)
    result = dict(arguments)
    for name in case.tokens:
        if arguments[name] is not None:
            result[name] = arguments[name].clone()
            result[name][rows, time] = other[name][rows, time]
    return result


def check_unseen(
    case: OperationCase, backend: str, dtype: torch.dtype, length: int, hidden: slice, seen: slice,
    hidden_rows: slice = slice(None), seen_rows: slice = slice(None), cu_seqlens: Tensor | None = None,
) -> None:  # fmt: skip
    """Outputs of ``seen`` tokens do not move by a bit with the ``hidden`` ones, and have exactly no gradient there."""
    extra = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    rows = 1 if hidden_rows == slice(None) else 3
    arguments = leaves(case.arguments(0, dtype, rows, length))
    for training in (False, True):  # the two may take different paths, of different rounding
        with torch.set_grad_enabled(training):
            output, _ = case.run(arguments, backend, **extra)
            moved, _ = case.run(leaves(perturbed(case, arguments, hidden, hidden_rows)), backend, **extra)
        assert_same([moved[seen_rows, seen]], [output[seen_rows, seen]], "outputs that cannot see the change")
        rest = moved[hidden_rows, hidden]
        assert not torch.equal(rest, output[hidden_rows, hidden]), "the change itself must be seen"
    part = output[seen_rows, seen]
    tokens = [arguments[n] for n in case.tokens if arguments[n] is not None and arguments[n].is_floating_point()]
    gradients = torch.autograd.grad(part.square().sum(), tokens, materialize_grads=True)
    for name, gradient in zip(case.tokens, gradients, strict=False):
        assert not gradient[hidden_rows, hidden].any(), f"gradient reaches {name} where it must be exactly zero"


def check_packed(case: OperationCase, backend: str, length: int, *, warm: bool) -> None:
    """Packed documents give what each gives alone."""
    tolerance = case.close(backend)
    arguments, extra = situation(case, case.dtype(backend), length, packed=True, warm=warm)
    output, after = case.run(arguments, backend, **extra)
    edges = extra["cu_seqlens"].tolist()
    for n in range(len(edges) - 1):
        time = slice(edges[n], edges[n + 1])
        before = {name: x[n : n + 1] for name, x in extra.get("state", {}).items()}
        if time.start == time.stop:
            continue
        alone = {"state": before} if before else {}
        wanted, state = case.run(cut(case, arguments, time), backend, **alone)
        assert_close([output[:, time]], [wanted], tolerance, f"document {n}")
        own = {name: x[n : n + 1] for name, x in after.items()}
        assert_state(own, state, tolerance, f"state of document {n}")


def assert_state(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float, what: str) -> None:
    """States are one when every tensor is; where a cache has more room on its left, that room must be empty."""
    assert found.keys() == wanted.keys(), what
    for name, have in found.items():
        want = wanted[name]
        if have.dim() > 1 and have.shape[1] != want.shape[1]:
            short = min(have.shape[1], want.shape[1])
            longer = have if have.shape[1] > short else want
            assert not longer[:, : longer.shape[1] - short].any(), f"{what}: {name} beyond what was seen"
            have, want = (x[:, x.shape[1] - short :] for x in (have, want))
        assert_close([have], [want], tolerance, f"{what}: {name}")


def check_split(case: OperationCase, backend: str, length: int, *all_cuts: Sequence[int]) -> None:
    """A sequence cut anywhere, going on from the state, is the sequence uncut: values, final state, every gradient."""
    tolerance = case.close(backend)
    arguments = leaves(case.arguments(0, case.dtype(backend), 2, length))
    whole, end = case.run(arguments, backend)
    weight = Draw(3, whole.dtype).normal(*whole.shape).to(DEVICE)

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((y * weight).sum(), floats(arguments), materialize_grads=True))

    wanted = gradients(whole)
    for cuts in all_cuts:
        parts, state = [], {}
        for first, last in zip([0, *cuts], [*cuts, length], strict=True):
            extra = {"state": state} if state else {}
            part, state = case.run(cut(case, arguments, slice(first, last)), backend, **extra)
            parts.append(part)
        joined = torch.cat(parts, 1)
        assert_close([joined], [whole], tolerance, f"cut at {list(cuts)}")
        assert_state(state, end, tolerance, f"final state, cut at {list(cuts)}")
        assert_close(gradients(joined), wanted, tolerance, f"gradients, cut at {list(cuts)}")


def check_repeat(case: OperationCase, backend: str, dtype: torch.dtype, *, packed: bool, warm: bool) -> None:
    """The same call gives the same bits, and leaves its arguments as they were."""
    arguments, extra = situation(case, dtype, case.lengths[-1], packed=packed, warm=warm)
    before = [x.clone() for x in tree_flatten([arguments, extra])[0] if isinstance(x, Tensor)]
    first = outputs_and_gradients(case, arguments, backend, **extra)
    second = outputs_and_gradients(case, arguments, backend, **extra)
    with torch.no_grad():
        case.run(arguments, backend, **extra)
    after = [x for x in tree_flatten([arguments, extra])[0] if isinstance(x, Tensor)]
    assert_same(after, before, "arguments")
    assert_same(sum(first, []), sum(second, []), "repeated call")


def check_poisoned(case: OperationCase, backend: str, *, packed: bool, warm: bool) -> None:
    """With uninitialised memory full of NaN the results are the same: all of it is overwritten."""
    arguments, extra = situation(case, case.dtype(backend), case.lengths[-1], packed=packed, warm=warm)
    clean = outputs_and_gradients(case, arguments, backend, **extra)
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=DEVICE).isnan().all(), "poisoning must work for the check to mean anything"
        poisoned = outputs_and_gradients(case, arguments, backend, **extra)
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
    assert_close(sum(poisoned, []), sum(clean, []), case.close(backend), "with poisoned memory")


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's registered operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "palimpsest":
            self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)


def check_operators(case: OperationCase, backend: str, *, packed: bool, warm: bool) -> None:
    """Every registered operator that the call reaches, forward and backward, passes torch.library.opcheck."""
    arguments, extra = situation(case, torch.float32, case.block + 1, packed=packed, warm=warm)
    with Recorder() as recorder:
        outputs_and_gradients(case, arguments, backend, **extra)
    assert recorder.calls, f"{case.name} on {backend} reaches no registered operator"
    for func, args, kwargs in recorder.calls:
        backward = func._opname.endswith("_backward")
        args, kwargs = tree_map_only(
            Tensor,
            lambda x, backward=backward: x.detach().clone().requires_grad_(x.is_floating_point() and not backward),
            (args, kwargs),
        )
        torch.library.opcheck(func, args, kwargs)


def check_compile(case: OperationCase, backend: str, *, packed: bool, warm: bool) -> None:
    """Compiles as one graph, forward and backward, to the same numbers."""
    arguments, extra = situation(case, case.dtype(backend), case.block + 1, packed=packed, warm=warm)
    expected = outputs_and_gradients(case, arguments, backend, **extra)
    torch._dynamo.reset()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    arguments, state = leaves(arguments), extra.pop("state", None)
    if state is not None:
        extra["state"] = leaves(state)
    output, after = compiled(arguments, backend, **extra)
    found = [output, *floats(after)]
    draw = Draw(99, torch.float64)
    loss = sum((x * draw.normal(*x.shape).to(x)).sum() for x in found)
    gradients = torch.autograd.grad(loss, floats([arguments, extra.get("state")]), materialize_grads=True)
    assert_close([*found, *gradients], sum(expected, []), case.close(backend), "compiled")


def check_autocast(case: OperationCase, backend: str) -> None:
    """Autocast, under which a model calls it, changes nothing: an operation computes in the dtypes it is given."""
    arguments, extra = situation(case, torch.float32, case.block + 1, packed=False, warm=case.state)
    wanted = outputs_and_gradients(case, arguments, backend, **extra)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = outputs_and_gradients(case, arguments, backend, **extra)
    assert_same([*found[0], *found[1]], [*wanted[0], *wanted[1]], "under autocast")


def check_cost(case: OperationCase, backend: str) -> None:
    """FlopCounterMode counts what the cost function says, forward and backward."""
    assert case.cost is not None
    arguments = leaves(case.arguments(0, torch.float32, 2, case.lengths[-1]))
    forward, backward = case.cost(arguments)
    assert min(forward.flops, forward.bytes, backward.flops, backward.bytes) > 0
    with FlopCounterMode(display=False) as counter:
        output, _ = case.run(arguments, backend)
    assert counter.get_total_flops() == forward.flops
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == backward.flops
