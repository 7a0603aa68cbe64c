"""Side-by-side measurements with other packages. None is installed from here; each file says how to get its peer.

A file with a ``PEER`` takes part in ``bench`` when its package can be imported. ``titans_pytorch`` is a script of its
own: that package has whole layers, no operations.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """Another package's implementations of our operations.

    ``calls`` maps an operation to a function of its arguments, a workload's, that gives the same output and whose
    gradients are the same; it raises NotImplementedError for arguments that the package has nothing for. ``install`` is
    a command; ``gpu`` says whether tensors must be on one.
    """

    name: str
    package: str
    install: str
    calls: Mapping[str, Callable[[Mapping[str, Any]], Tensor]]
    gpu: bool = True

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return importlib.util.find_spec(self.package) is not None


def peers() -> dict[str, Peer]:
    """Every peer that there is a file for, installed or not."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    found = [module.PEER for module in modules if hasattr(module, "PEER")]
    return {peer.name: peer for peer in found}
