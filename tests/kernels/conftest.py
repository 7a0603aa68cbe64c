"""Lets the tests of this room import the harness and the cases that lie beside them, and run Triton without a GPU."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

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


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: Triton reads it then
    if importlib.util.find_spec("triton") is not None:
        hasten_interpreter()
