"""The harness itself: whatever the device, all that a case is given and gives back is on it."""

import importlib
from pathlib import Path

import harness
import pytest
import torch
from harness import CASES

from palimpsest.kernels.launch import planning

for path in sorted(Path(__file__).parent.glob("cases_*.py")):
    importlib.import_module(path.stem)


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device without memory, which mixes with no other, as a GPU does not; nothing is computed there."""
    monkeypatch.setattr(harness, "DEVICE", "meta")
    case = CASES[name]
    for backend in (backend for backend in case.backends if backend != "reference"):
        for packed in {False, case.packed}:
            with planning():
                arguments, extra = harness.situation(case, torch.float32, 9, packed=packed, warm=False)
                found, gradients = harness.outputs_and_gradients(case, arguments, backend, **extra)
            assert {x.device.type for x in (*found, *gradients)} == {"meta"}
