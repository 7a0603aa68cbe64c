"""How an operation is registered: its implementations by backend, and its cost from shapes alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import backend as backends


@dataclass(frozen=True)
class Cost:
    """What one call must do at least: floating-point operations (a multiply-add is 2), and bytes to or from memory."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class NotCovered(ValueError):
    """A call that the Triton kernels do not cover, of which they were asked for."""


@dataclass(frozen=True)
class Choice:
    """A call of an operation, and why the Triton kernels do not cover it: empty where they do. ``without``: the
    architectures on which it runs plain torch all the same."""

    operation: str
    reason: str
    without: tuple[int, ...] = ()


_watchers: list[list[Choice]] = []


@contextmanager
def watching() -> Iterator[list[Choice]]:
    """Every call of an operation made inside, in order. Says what a GPU would run, whatever this machine has."""
    calls: list[Choice] = []
    _watchers.append(calls)
    try:
        yield calls
    finally:
        _watchers.remove(calls)


@dataclass(frozen=True)
class Operation:
    """One operation: ``implementations`` maps a backend's name to a function of one common signature."""

    name: str
    implementations: Mapping[str, Callable[..., Any]]
    cost: Callable[..., Cost]

    def choose(
        self,
        device: torch.device,
        requested: str | None = None,
        unfit: tuple[str, object, str] | None = None,
        without: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """The implementation that runs on ``device``; see :func:`palimpsest.kernels.backend.resolve` for the order.

        ``unfit``: why the Triton kernels do not cover this call, as (argument, what it was, what it must). Such a call
        runs plain torch and says so once, or is refused where ``requested`` names triton. ``without``: architectures
        where a call like this one is not covered, though it may be here; for those that watch.

        Raises:
            ValueError: naming the ``backend``; :class:`NotCovered`, the argument that the kernels do not cover.
        """
        name = backends.resolve(self.name, self.implementations, device, requested)
        reason = "" if unfit is None else f"{unfit[0]} was {unfit[1]}; it must {unfit[2]}"
        for calls in _watchers:
            calls.append(Choice(self.name, reason, without))
        if name == "triton" and reason:
            if requested == name:
                raise NotCovered(f"{reason} for backend 'triton' of {self.name}")
            if not torch.compiler.is_compiling():
                backends.log_once(f"{self.name}: torch, for the Triton kernels do not cover this call: {reason}")
            name = "torch"
        return self.implementations[name]


OPERATIONS: dict[str, Operation] = {}


def register(name: str, *, cost: Callable[..., Cost], **implementations: Callable[..., Any]) -> Operation:
    """Add an operation to ``OPERATIONS``, over which the conformance suite and the profiler iterate.

    Raises:
        ValueError: when the name is taken, or a backend's name is not one of ``backend.BACKENDS``.
    """
    if name in OPERATIONS:
        raise ValueError(f"operation name was {name!r}; it must be new, and that one is registered")
    unknown = set(implementations) - set(backends.BACKENDS)
    if unknown:
        raise ValueError(f"backends of {name} were {sorted(unknown)}; they must be among {sorted(backends.BACKENDS)}")
    OPERATIONS[name] = Operation(name, implementations, cost)
    return OPERATIONS[name]


def flop_formula(operator: Any, formula: Callable[..., int]) -> None:
    """Count ``operator`` (a ``torch.ops.palimpsest`` packet) in FlopCounterMode by ``formula``, called with the
    operator's own arguments, tensors replaced by their shapes, plus ``out_shape``."""
    register_flop_formula(operator)(formula)
