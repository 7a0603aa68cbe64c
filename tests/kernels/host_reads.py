"""Refuses what would make a host wait for its device: for tests of operations whose shapes are known without values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "bincount", "equal", "is_nonzero")


class NoReads(TorchDispatchMode):
    """Refuses whatever needs a value of a tensor on the host, or gives a shape that depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(name.startswith(word) for word in READS) or "repeat_interleave.Tensor" in str(func):
            raise AssertionError(f"{func} reads a value on the host")
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise AssertionError("a mask as an index reads a value on the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also what does not reach the dispatcher."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor is read on the host")

    with patch.context() as inside, NoReads():
        for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            inside.setattr(Tensor, name, refuse)
        yield
