"""Which implementation of an operation runs: by argument, by ``PALIMPSEST_BACKEND``, by device, in that order."""

import importlib.util
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger("palimpsest.kernels")

BACKENDS = ("reference", "torch", "triton")
VARIABLE = "PALIMPSEST_BACKEND"
INSTALLED = importlib.util.find_spec("triton") is not None
_said: set[str] = set()
_outlining = False


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, tensors of the meta device take the paths that a GPU's would: operators whose Triton kernels cover the
    call, of which only shapes are computed then. What a GPU would keep can so be counted anywhere; nothing is logged.
    """
    global _outlining
    before, _outlining = _outlining, True
    try:
        yield
    finally:
        _outlining = before


def log_once(message: str) -> None:
    """Log a line at INFO the first time it is said in this process."""
    if message not in _said and not _outlining:
        _said.add(message)
        logger.info(message)


def launchable(device: torch.device) -> bool:
    """Whether Triton kernels can be launched on tensors of a device: on a GPU, in the interpreter, or in a plan."""
    from .launch import interpreted, is_planning

    return INSTALLED and (device.type == "cuda" or interpreted() or is_planning())


def resolve(operation: str, available: Collection[str], device: torch.device, requested: str | None = None) -> str:
    """The backend that ``operation`` runs with; logged once per operation and choice.

    An explicit ``requested`` (the operation's ``backend`` argument) is binding. ``PALIMPSEST_BACKEND`` is a wish for
    the whole program: an operation that lacks that backend takes its device's default and says so. The default is
    ``triton`` on a GPU where the operation has it, else ``torch``.

    Raises:
        ValueError: for an unknown name, or a requested backend that the operation lacks or the device cannot run.
    """
    if _outlining and device.type == "meta" and requested is None:
        return "triton" if "triton" in available and INSTALLED else "torch"
    if requested is not None:
        if requested not in available:
            raise ValueError(f"backend of {operation} was {requested!r}; it must be one of {sorted(available)}")
        if requested == "triton" and not launchable(device):
            raise ValueError(
                f"backend of {operation} was 'triton' for tensors on {device}; they must be on a GPU with triton "
                f"installed, or TRITON_INTERPRET must be 1 before triton is imported"
            )
        choice, reason = requested, "by argument"
    else:
        wish = os.environ.get(VARIABLE)
        if wish is not None and wish not in BACKENDS:
            raise ValueError(f"{VARIABLE} was {wish!r}; it must be one of {sorted(BACKENDS)}")
        fits = wish in available and (wish != "triton" or launchable(device))
        default = "triton" if device.type == "cuda" and "triton" in available and INSTALLED else "torch"
        choice = wish if wish is not None and fits else default
        reason = f"by {VARIABLE}" if fits else f"by device {device.type}"
        if wish is not None and not fits:
            reason += f"; {VARIABLE}={wish} cannot run here"
        elif device.type == "cuda" and not INSTALLED:
            reason += "; triton is not installed"
    if not torch.compiler.is_compiling():
        log_once(f"{operation}: {choice} ({reason})")
    return choice
