"""How a Triton kernel is launched: which configuration it takes, who checked it, and what an offline report sees.

A kernel is launched with three kinds of arguments: tensors and run-time numbers (``arguments``), the constants that
select the function it computes (``constants``: widths, chunk size, switches), and a :class:`Config`, which selects how
it computes it (block sizes, warps, stages). On a GPU a configuration runs only after its kernel's canary, a small
problem with a known answer, came out right with it on that GPU and that Triton version; what passed is kept on disk.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .backend import log_once

VARIABLE = "TRITON_INTERPRET"
AUTOTUNE = "PALIMPSEST_AUTOTUNE"


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on tensors of the CPU. Read by Triton when it is imported."""
    return os.environ.get(VARIABLE, "0").lower() in ("1", "true", "on", "yes", "y")


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a ``tl.dot`` whose operands have a dtype; it means something for float32 alone.

    On a GPU it follows ``torch.set_float32_matmul_precision``: three tf32 products, which are as good as float32, or
    one. Plain float32 has no matrix instruction there. The interpreter has nothing else.
    """
    if dtype != torch.float32 or interpreted():
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@dataclass(frozen=True)
class Config:
    """How a kernel computes: block sizes as (name, value) pairs, a program's warps, stages of its pipelining."""

    blocks: tuple[tuple[str, int], ...] = ()
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.blocks]
        return " ".join([*words, f"warps={self.num_warps}", f"stages={self.num_stages}"])


Pairs = Sequence[tuple[Tensor, Tensor]]


class Kernel:
    """A kernel with its configurations and its canary.

    Args:
        function: what ``@triton.jit`` made. It overwrites its outputs and never adds to them, so that a launch may be
            repeated; results do not depend on the order in which programs run.
        configs: from the constants to the configurations that may run, the one to prefer first. Never empty.
        canary: from the constants to (found, wanted) pairs: it calls the operation on a small problem of those
            constants, several chunks long, and compares all that this kernel produces with the plain torch path.
            Inside it the configuration under test is the one every launch of this kernel takes.
        name: unique; that of the function when None.
    """

    def __init__(
        self,
        function: Any,
        configs: Callable[[Mapping[str, Any]], Sequence[Config]],
        canary: Callable[[Mapping[str, Any]], Pairs],
        *,
        name: str | None = None,
    ) -> None:
        self.function, self.configs, self.canary = function, configs, canary
        self.name = name or function.fn.__name__
        if self.name in KERNELS:
            raise ValueError(f"kernel name was {self.name!r}; it must be new, and that one is registered")
        KERNELS[self.name] = self

    def __call__(
        self, grid: Callable[[Mapping[str, Any]], tuple[int, ...]], arguments: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        """Launch on ``grid(constants and blocks)``; a grid with a zero launches nothing."""
        if _forced.get(self.name) is not None:
            config = _forced[self.name]
        elif _plan is not None or interpreted():
            config = self.configs(constants)[0]
        else:
            from .tuning import choose

            config = choose(self, grid, arguments, constants)
        self.run(config, grid, arguments, constants)

    def run(
        self,
        config: Config,
        grid: Callable[[Mapping[str, Any]], tuple[int, ...]],
        arguments: dict[str, Any],
        constants: dict[str, Any],
    ) -> None:
        """Launch with one configuration, or note the launch where a plan is being made."""
        every = {**constants, **dict(config.blocks)}
        size = grid(every)
        if 0 in size:
            return
        if _plan is not None:
            _plan.append(Launch(self, config, tuple(size), dict(arguments), dict(constants)))
            return
        if interpreted():
            log_once("triton: kernels run in the interpreter (TRITON_INTERPRET), which is for checking, not for speed")
        self.function[size](**arguments, **every, num_warps=config.num_warps, num_stages=config.num_stages)


KERNELS: dict[str, Kernel] = {}
_forced: dict[str, Config] = {}
_plan: "list[Launch] | None" = None
_target: int | None = None

#: What kernels are compiled for and reviewed on; other GPUs go by one of them: :func:`family`.
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Launch:
    """One launch as a plan holds it: enough to compile the kernel for any GPU, and to count what it moves."""

    kernel: Kernel
    config: Config
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)
    constants: dict[str, Any]


@contextmanager
def planning() -> Iterator[list[Launch]]:
    """Inside, ``backend="triton"`` is allowed on any device, and launches are noted in the list instead of made.

    What the operations return is uninitialised. Give them tensors from ``torch.empty`` on the CPU: of those the system
    hands out pages only when they are written.
    """
    global _plan
    before, _plan = _plan, []
    try:
        yield _plan
    finally:
        _plan = before


@contextmanager
def targeting(arch: int) -> Iterator[None]:
    """Inside, plans are for GPUs of an architecture: see :func:`architecture`."""
    global _target
    before, _target = _target, arch
    try:
        yield
    finally:
        _target = before


def family(major: int, minor: int) -> int:
    """The architecture whose compilations speak for GPUs of a compute capability: 90 of Hopper, 100 of data centre
    Blackwell, else 80: all others, consumer Blackwell too, have its matrix instructions."""
    return {9: 90, 10: 100}.get(major, 80) if (major, minor) >= (8, 0) else 10 * major + minor


def architecture() -> int | None:
    """The architecture that kernels are launched on, or planned for; None in the interpreter, without a GPU, and in a
    plan for none in particular. Configurations and coverage may depend on it."""
    if _target is not None or _plan is not None or interpreted() or not torch.cuda.is_available():
        return _target
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return family(found.major, found.minor)


def is_planning() -> bool:
    """Whether launches are noted instead of made."""
    return _plan is not None


def is_forced() -> bool:
    """Whether some kernel's configuration is set from outside: a canary or a test is running."""
    return bool(_forced)


@contextmanager
def forced(kernel: Kernel, config: Config) -> Iterator[None]:
    """Inside, ``kernel`` takes this configuration, checked or not."""
    before = _forced.get(kernel.name)
    _forced[kernel.name] = config
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel.name]
        else:
            _forced[kernel.name] = before
