"""How an operation is registered: its implementations by backend, and its cost from shapes alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backend as backends


@dataclass(frozen=True)
class Cost:
    """What one call must do at least: floating-point operations (a multiply-add is 2), and bytes to or from memory."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Operation:
    """One operation: ``implementations`` maps a backend's name to a function of one common signature."""

    name: str
    implementations: Mapping[str, Callable[..., Any]]
    cost: Callable[..., Cost]

    def choose(self, device: torch.device, requested: str | None = None) -> Callable[..., Any]:
        """The implementation that runs on ``device``; see :func:`palimpsest.kernels.backend.resolve` for the order."""
        return self.implementations[backends.resolve(self.name, self.implementations, device, requested)]


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


@contextmanager
def recording() -> Iterator[None]:
    """Autograd inside the body of a registered operator, where the dispatcher leaves it out."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.AutogradOther, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def replay(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` with respect to each floating input, by running it again under autograd.

    For the backward of a registered operator, whose forward kept its inputs and nothing else. Outputs with no incoming
    gradient are left out; an input that no output depends on gets zeros, and one that is None or integral gets None.
    """
    with recording():
        leaves = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
        outputs = function(*leaves)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        found = iter(
            torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True)
            if pairs
            else [torch.zeros_like(x) for x in wanted]
        )
    return [next(found) if x is not None and x.requires_grad else None for x in leaves]
