"""Which neural memories the Triton kernels cover; all others run plain torch, on a GPU too."""

import torch

from ..launch import ARCHITECTURES, architecture
from .slots import tile_of, widest_window
from .spec import MemorySpec

#: Choices of a memory that there are kernels for.
COVERED: dict[str, tuple[object, ...]] = {
    "network": ("linear", "mlp", "gated_mlp"),
    "bias": ("l2", "dot", "lp", "huber"),
    "retention": ("l2", "none", "norm", "lq", "kl"),
    "rule": ("gd", "momentum", "muon", "muon_gd"),
    "gates": ("head",),
}
WIDTHS = (16, 32, 64, 128)
EXPANSIONS = (1, 2, 4, 8)


def listed(values: tuple[object, ...]) -> str:
    """Words of a sentence: a, b or c."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def fitting(width: int, spec: MemorySpec) -> tuple[tuple[int, ...], str]:
    """The architectures whose registers hold a memory's kernels, and what of it is too much for the others: there all
    configurations that were tried have spills (docs/neural_memory.md)."""
    if spec.layers > 1 and spec.orthogonal and width > 64:
        return (90,), f"rule {spec.rule} and heads of {width}"
    if spec.layers == 3 and spec.orthogonal:
        return (90, 100), f"rule {spec.rule} and network {spec.network}"
    if spec.layers > 1 and spec.orthogonal and spec.window > 1:
        return (90, 100), f"rule {spec.rule} and a window"
    if spec.layers > 1 and spec.retention == "kl" and width > 64:
        return (90, 100), f"retention kl and heads of {width}"
    return ARCHITECTURES, ""


def spilling_on(width: int, spec: MemorySpec) -> tuple[int, ...]:
    """The architectures on which a memory that there are kernels for runs plain torch."""
    fit, _ = fitting(width, spec)
    return tuple(arch for arch in ARCHITECTURES if arch not in fit)


def spilling(width: int, spec: MemorySpec) -> tuple[str, object, str] | None:
    """Why a call has no kernels on the GPU at hand though others have, as :func:`uncovered`."""
    fit, what = fitting(width, spec)
    arch = architecture()
    if arch is None or arch in fit or not what:
        return None
    return "GPU", f"sm_{arch}", f"be {' or '.join(f'sm_{a}' for a in fit)} with {what}, whose registers spill"


def uncovered(kind: torch.dtype, width: int, value_width: int, spec: MemorySpec) -> tuple[str, object, str] | None:
    """Why there is no kernel for a call, as (argument, what it was, what it must), or None.

    Args:
        kind: dtype of the tokens.
        width: D of queries and keys.
        value_width: D_v.
        spec: the memory.
    """
    if kind == torch.float64:
        return "q.dtype", "float64", "be float32, bfloat16 or float16"
    for name, covered in COVERED.items():
        if getattr(spec, name) not in covered:
            return name, getattr(spec, name), f"be {listed(covered)}"
    if spec.network == "mlp" and spec.depth != 2:
        return "depth", spec.depth, "be 1 or 2"
    if width not in WIDTHS:
        return "q.shape[-1]", width, "be 16, 32, 64 or 128"
    if value_width != width:
        return "v.shape[-1]", value_width, f"be {width}, the width of keys,"
    if spec.layers > 1 and spec.expansion not in EXPANSIONS:
        return "expansion", spec.expansion, "be 1, 2, 4 or 8"
    if spec.chunk_size not in (16, 32) and spec.chunk_size % 64:
        return "chunk_size", spec.chunk_size, "be 16, 32 or a multiple of 64"
    if spec.step_size not in (16, 32) and spec.step_size % 64:
        return "ns_every", spec.ns_every, "be 16, 32 or a multiple of 64"
    if spec.window > 1 and tile_of(spec, width) is None:
        return "window", spec.window, f"be at most {widest_window(width)} with heads of {width}"
    return spilling(width, spec)
