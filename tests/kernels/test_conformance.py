"""All cases of all operations, on every backend that each has; see ``harness.py`` for how to add one."""

import importlib
from pathlib import Path

import harness
import pytest
import torch
from harness import CASES, OperationCase

for path in sorted(Path(__file__).parent.glob("cases_*.py")):
    importlib.import_module(path.stem)

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
if harness.DEVICE != "cpu":
    DTYPES["float16"] = torch.float16  # of which a CPU is slow


def runs(only: str = "", registered: bool = False) -> list:
    """Every case with every backend; ``only`` those with that property, or those of a registered operator."""
    return [
        pytest.param(case, backend, id=f"{case.name}-{backend}")
        for case in CASES.values()
        for backend in case.backends
        if (not only or getattr(case, only)) and not (registered and backend == "reference")
    ]


def situations(registered: bool = False, but: str = "") -> list:
    """Every case and backend, in rows and packed, fresh and going on from a state, as far as the case has them.

    For a registered operator's own checks, which cost seconds each: without both, and with both, of the cases that
    have them. ``but``: a backend that is left out.
    """
    return [
        pytest.param(*run.values, packed, warm, id=f"{run.id}{'-packed' * packed}{'-state' * warm}")
        for run in runs(registered=registered)
        if run.values[1] != but
        for packed in (False, True)
        for warm in (False, True)
        if run.values[0].packed >= packed
        and run.values[0].state >= warm
        and (not registered or (packed == warm and run.values[0].operator))
    ]


def test_every_operation_has_a_case() -> None:
    assert {case.operation for case in CASES.values()} == set(harness.OPERATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, backend, packed, warm", situations())
def test_equals_reference(case: OperationCase, backend: str, packed: bool, warm: bool, dtype: str) -> None:
    if dtype in ("bfloat16", "float16") and (backend == "reference" or not case.half):
        return  # the reference computes in its inputs' dtype, for reading and for float64
    if backend == "triton" and (dtype == "float64" or (dtype != "float32" and harness.DEVICE == "cpu")):
        return  # the kernels have no float64; the interpreter computes bfloat16 on bit patterns
    harness.check_equals_reference(case, backend, DTYPES[dtype], case.lengths[-1], packed=packed, warm=warm)


@pytest.mark.parametrize("case, backend", runs(registered=True))
def test_lengths(case: OperationCase, backend: str) -> None:
    for length in case.lengths:
        harness.check_equals_reference(case, backend, case.dtype(backend), length, warm=case.state)


@pytest.mark.parametrize("case, backend, packed, warm", situations(but="triton"))
def test_gradcheck(case: OperationCase, backend: str, packed: bool, warm: bool) -> None:
    harness.check_gradcheck(case, backend, packed=packed, warm=warm)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case, backend", runs())
def test_future_is_unseen(case: OperationCase, backend: str, dtype: str) -> None:
    length = case.lengths[-1]
    for t in sorted({1, case.block, length - 1}):
        if dtype == "float32" or backend != "triton":
            harness.check_unseen(case, backend, DTYPES[dtype], length, slice(t, None), slice(0, t))


@pytest.mark.parametrize("case, backend", runs())
def test_rows_are_independent(case: OperationCase, backend: str) -> None:
    everything = slice(None)
    harness.check_unseen(
        case, backend, torch.float32, case.block + 1, everything, everything, slice(1, 2), slice(0, 1)
    )  # fmt: skip
    harness.check_unseen(
        case, backend, torch.float32, case.block + 1, everything, everything, slice(1, 2), slice(2, 3)
    )  # fmt: skip


@pytest.mark.parametrize("case, backend", runs("packed"))
def test_packed_documents_are_apart(case: OperationCase, backend: str) -> None:
    for warm in {False, case.state}:
        harness.check_packed(case, backend, case.lengths[-1] + 13, warm=warm)
    length = case.lengths[-1]
    edges = harness.borders(length)
    for hidden, seen in ((slice(0, 5), slice(5, None)), (slice(6, None), slice(0, 6))):
        harness.check_unseen(case, backend, case.dtype(backend), length, hidden, seen, cu_seqlens=edges)


@pytest.mark.parametrize("case, backend", runs("state"))
def test_split_anywhere_is_whole(case: OperationCase, backend: str) -> None:
    length = case.lengths[-1]
    cuts = [1], [case.block - 1], [case.block], [length - 1], [2, 3, case.block + 2]
    harness.check_split(case, backend, length, *([c for c in each if 0 < c < length] for each in cuts))


@pytest.mark.parametrize("case, backend", runs("state"))
def test_decoding_is_prefill(case: OperationCase, backend: str) -> None:
    """Token by token from the first one, and after a prefill; in the interpreter a few, and after a prefill."""
    length, block = case.lengths[-1], case.block
    if backend == "triton":
        harness.check_split(case, backend, length, [1, 2, *range(block, length)])
    else:
        harness.check_split(case, backend, length, list(range(1, length)), list(range(block, length)))


@pytest.mark.parametrize("case, backend, packed, warm", situations())
def test_repeat_is_bitwise_equal(case: OperationCase, backend: str, packed: bool, warm: bool) -> None:
    harness.check_repeat(case, backend, torch.float32, packed=packed, warm=warm)


@pytest.mark.parametrize("case, backend, packed, warm", situations())
def test_uninitialised_memory_is_overwritten(case: OperationCase, backend: str, packed: bool, warm: bool) -> None:
    harness.check_poisoned(case, backend, packed=packed, warm=warm)


@pytest.mark.parametrize("case, backend, packed, warm", situations(registered=True))
def test_opcheck(case: OperationCase, backend: str, packed: bool, warm: bool) -> None:
    harness.check_operators(case, backend, packed=packed, warm=warm)


@pytest.mark.parametrize("case, backend, packed, warm", situations(registered=True))
def test_compiles_whole(case: OperationCase, backend: str, packed: bool, warm: bool) -> None:
    harness.check_compile(case, backend, packed=packed, warm=warm)


@pytest.mark.parametrize("case, backend", runs("cost", registered=True))
def test_flops_are_counted(case: OperationCase, backend: str) -> None:
    harness.check_cost(case, backend)


@pytest.mark.parametrize("case, backend", runs(registered=True))
def test_autocast_changes_nothing(case: OperationCase, backend: str) -> None:
    harness.check_autocast(case, backend)
