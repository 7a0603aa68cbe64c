"""Which implementation of an operation runs: by argument, by ``PALIMPSEST_BACKEND``, by device, in that order."""

import logging
import os
from collections.abc import Collection

import torch

logger = logging.getLogger("palimpsest.kernels")

BACKENDS = ("reference", "torch", "triton")
VARIABLE = "PALIMPSEST_BACKEND"
_said: set[str] = set()


def log_once(message: str) -> None:
    """Log a line at INFO the first time it is said in this process."""
    if message not in _said:
        _said.add(message)
        logger.info(message)


def resolve(operation: str, available: Collection[str], device: torch.device, requested: str | None = None) -> str:
    """The backend that ``operation`` runs with; logged once per operation and choice.

    An explicit ``requested`` (the operation's ``backend`` argument) is binding. ``PALIMPSEST_BACKEND`` is a wish for
    the whole program: an operation that lacks that backend takes its device's default and says so. The default is
    ``triton`` on a GPU where the operation has it, else ``torch``.

    Raises:
        ValueError: for an unknown name, or a requested backend that the operation lacks.
    """
    if requested is not None:
        if requested not in available:
            raise ValueError(f"backend of {operation} was {requested!r}; it must be one of {sorted(available)}")
        choice, reason = requested, "by argument"
    else:
        wish = os.environ.get(VARIABLE)
        if wish is not None and wish not in BACKENDS:
            raise ValueError(f"{VARIABLE} was {wish!r}; it must be one of {sorted(BACKENDS)}")
        default = "triton" if device.type == "cuda" and "triton" in available else "torch"
        choice = wish if wish is not None and wish in available else default
        reason = f"by {VARIABLE}" if wish in available else f"by device {device.type}"
        if wish is not None and wish not in available:
            reason += f"; {VARIABLE}={wish} has no implementation here"
    if not torch.compiler.is_compiling():
        log_once(f"{operation}: {choice} ({reason})")
    return choice
