"""Argument checks shared by every operation: an error names the argument, what it was and what it must be."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, name: str, was: object, must: str) -> None:
    """Raise ValueError "``name`` was ``was``; it must ``must``" unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} was {was}; it must {must}")


def shape(name: str, tensor: Tensor, expected: Sequence[int | None], layout: str) -> None:
    """Check a shape; ``None`` in ``expected`` leaves that size free; ``layout`` is as documented, ``[B, T, H, D]``."""
    if not isinstance(tensor, Tensor):
        require(False, name, type(tensor).__name__, f"be a tensor {layout}")
    found = tensor.shape
    fits = len(found) == len(expected)
    for have, want in zip(found, expected, strict=False):
        fits = fits and (want is None or have == want)
    if fits:  # words cost more than the check, and are wanted seldom
        return
    sizes = ", ".join("any" if want is None else str(want) for want in expected)
    require(False, f"{name}.shape", tuple(tensor.shape), f"be {layout} = [{sizes}]")


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Check a dtype."""
    if tensor.dtype in allowed:
        return
    names = " or ".join(str(kind).removeprefix("torch.") for kind in allowed)
    require(False, f"{name}.dtype", str(tensor.dtype).removeprefix("torch."), f"be {names}")


def device(name: str, tensor: Tensor, expected: torch.device) -> None:
    """Check that a tensor lies where the others lie."""
    if tensor.device != expected:
        require(False, f"{name}.device", tensor.device, f"be {expected}, like the other arguments")


def sequence_borders(cu_seqlens: Tensor | None, batch: int, length: int, where: torch.device) -> None:
    """Check ``cu_seqlens``: int32 [N + 1], with B = 1. Its values are read on the host only when it lies there.

    Zero-length sequences are allowed. On a GPU the values are the caller's word: reading them would stall the stream.
    """
    if cu_seqlens is None:
        return
    require(batch == 1, "batch size with cu_seqlens", batch, "be 1: packed documents lie in one row")
    require(
        cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 2, "cu_seqlens.shape", tuple(cu_seqlens.shape), "be [N + 1]"
    )
    dtype("cu_seqlens", cu_seqlens, (torch.int32,))
    device("cu_seqlens", cu_seqlens, where)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        require(borders[0] == 0 and borders[-1] == length, "cu_seqlens", borders, f"run from 0 to T = {length}")
        require(borders == sorted(borders), "cu_seqlens", borders, "never decrease")


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of accumulations and states: float64 for float64 input (exact checks), float32 for all else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def no_float64(name: str, tensor: Tensor) -> tuple[str, object, str] | None:
    """Why the Triton kernels do not cover a tensor, for :meth:`palimpsest.kernels.op.Operation.choose`."""
    return (f"{name}.dtype", "float64", "be float32 or narrower") if tensor.dtype == torch.float64 else None
