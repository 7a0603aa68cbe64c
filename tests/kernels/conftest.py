"""Lets the tests of this room import the harness and the cases that lie beside them, and run Triton without a GPU.

``PALIMPSEST_TEST_DEVICE`` chooses the device of the conformance suite (a GPU where there is one); ``PALIMPSEST_SHARD``,
as ``0/4``, runs the first of four equal parts of the tests.
"""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def hasten_interpreter() -> None:
    """Make the interpreter nearly three times as fast, by leaving out what it does again and again.

    It patches ``triton.language`` at every call of one function by another, where once per module is enough; and it
    computes every sum and product of integers twice, to look for overflow, which tensors as small as these cannot have.
    """
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this process's share."""
    if "PALIMPSEST_SHARD" not in os.environ:
        return
    number, parts = map(int, os.environ["PALIMPSEST_SHARD"].split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % parts != number])
    items[:] = items[number::parts]


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS chooses among algorithms: repeats may differ
if (os.environ.get("PALIMPSEST_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # as in the conftest above, for those who run this folder alone
    if importlib.util.find_spec("triton") is not None:
        hasten_interpreter()
