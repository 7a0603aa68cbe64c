"""What each operation must compute and move, what its kernels make of it, and the least time it can take; no GPU.

    python -m palimpsest.kernels.profile report [--gpu H200] [--only neural_memory] [--set T=16k] [--json F] [--html F]

FLOPs and ideal bytes are those of the operation's registered cost: inputs read once, outputs written once. The floor
is what these take at the peaks in ``gpus.py``. Actual bytes are counted from the launches that the Triton path plans:
every tensor argument of every launch once, whether read or written. That includes what passes between kernels (kept
states, partial sums) and leaves out what a launch reads more than once and the cache does not hold: it is a lower bound
of the traffic. Waves are programs over those that all multiprocessors hold at once.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..launch import Launch, family, planning, targeting
from ..op import Cost
from .draw import BITS, Draw
from .gpus import GPUS, Gpu, find_gpu
from .offline import Facts, specialise_launch
from .plans import compile_all
from .sizes import parse_sizes, written
from .workloads import Workload, floats, leaves, selected

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def launched_bytes(launches: Sequence[Launch]) -> int:
    """Bytes of every distinct tensor argument of every launch."""
    total = 0
    for launch in launches:
        tensors = [x for x in launch.arguments.values() if isinstance(x, Tensor)]
        distinct = {(x.data_ptr(), x.numel(), x.dtype): x.numel() * x.element_size() for x in tensors}
        total += sum(distinct.values())
    return total


def plan_passes(
    workload: Workload, sizes: dict[str, int], dtype: torch.dtype, gpu: Gpu
) -> tuple[list[Launch], list[Launch], str]:
    """What forward and backward launch on a GPU, and why there is no Triton path where there is none."""
    arguments = leaves(workload.arguments(Draw(dtype, empty=True), sizes))
    with planning() as launches, targeting(family(*divmod(gpu.arch, 10))), torch.enable_grad():
        try:
            output = workload.run(arguments, "triton")
        except ValueError as error:
            return [], [], str(error)
        count = len(launches)
        torch.autograd.grad(output, floats(arguments), torch.empty_like(output), materialize_grads=True)
    return launches[:count], launches[count:], ""


def _kernel_row(launch: Launch, facts: Facts, gpu: Gpu) -> dict[str, Any]:
    """A launch and its machine code."""
    programs = prod(launch.grid)
    at_once = facts.programs * gpu.multiprocessors
    return {
        "kernel": launch.kernel.name,
        "config": str(launch.config),
        "grid": list(launch.grid),
        "programs": programs,
        "waves": programs / at_once if at_once else None,
        "bytes": launched_bytes([launch]),
        **{key: value for key, value in asdict(facts).items() if key != "programs"},
        "programs_per_multiprocessor": facts.programs,
    }


def _pass_row(
    cost: Cost, launches: Sequence[Launch], compiled: dict[Any, Facts], bits: int, gpu: Gpu
) -> dict[str, Any]:
    """A forward or a backward: its cost, its floor, its kernels."""
    seconds, bound = gpu.floor(cost, bits)
    actual = launched_bytes(launches)
    return {
        "flops": cost.flops,
        "ideal_bytes": cost.bytes,
        "actual_bytes": actual or None,
        "intensity": cost.flops / cost.bytes,
        "actual_intensity": cost.flops / actual if actual else None,
        "floor_seconds": seconds,
        "bound": bound,
        "kernels": [_kernel_row(launch, compiled[specialise_launch(launch, gpu.arch)], gpu) for launch in launches],
    }


def make_report(
    workloads: Sequence[Workload], gpu: Gpu, dtype: torch.dtype, sizes: dict[str, int], workers: int = 1
) -> dict[str, Any]:
    """The whole report as plain values; seconds, bytes and FLOPs."""
    planned = [(w, {**w.sizes, **{k: v for k, v in sizes.items() if k in w.sizes}}) for w in workloads]
    passes = [plan_passes(workload, own, dtype, gpu) for workload, own in planned]
    every = [launch for forward, backward, _ in passes for launch in (*forward, *backward)]
    compiled = compile_all([specialise_launch(launch, gpu.arch) for launch in every], workers)
    rows = []
    for (workload, own), (forward, backward, reason) in zip(planned, passes, strict=True):
        costs = workload.cost(own, dtype.itemsize)
        rows.append(
            {
                "workload": workload.name,
                "sizes": own,
                "path": "torch" if reason else "triton",
                "reason": reason,
                "forward": _pass_row(costs[0], forward, compiled, BITS[dtype], gpu),
                "backward": _pass_row(costs[1], backward, compiled, BITS[dtype], gpu),
                "floor_seconds": gpu.floor(costs[0] + costs[1], BITS[dtype])[0],
            }
        )
    return {
        "gpu": {**asdict(gpu), "peak_used": gpu.peak(BITS[dtype]), "bandwidth_used": gpu.bandwidth},
        "dtype": str(dtype).removeprefix("torch."),
        "triton": _triton_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }


def _triton_version() -> str:
    import triton

    return triton.__version__


def scaled(number: float | None, unit: str) -> str:
    """A number with three digits and a decimal prefix."""
    if number is None:
        return "-"
    for power, prefix in enumerate("PTGMk mµ"):
        size = 10.0 ** (15 - 3 * power)
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix.strip()}{unit}"
    return f"{number:.3g} {unit}"


def counted(counts: dict[str, int]) -> str:
    """``12 HGMMA, 4 HMMA``, the most frequent first."""
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda item: -item[1])) or "none"


def kernel_text(kernel: dict[str, Any]) -> list[str]:
    """Lines about a launch."""
    grid = " × ".join(map(str, kernel["grid"]))
    head = f"{kernel['kernel']} [{kernel['config']}]  grid {grid} = {kernel['programs']} programs"
    if kernel["error"]:
        return [head, f"  does not compile: {kernel['error'].splitlines()[0]}"]
    waves = "does not fit" if kernel["waves"] is None else f"{kernel['waves']:.2f} waves"
    loads = ", ".join(f"{n} of {bits} bit" for bits, n in sorted(kernel["loads"].items()))
    return [
        f"{head}, {kernel['programs_per_multiprocessor']} per multiprocessor ({kernel['limit']}), {waves}",
        f"  {kernel['registers']} registers, {kernel['spill_loads'] + kernel['spill_stores']} spills, "
        f"{kernel['shared'] / 1024:.1f} KiB shared, occupancy {kernel['occupancy']:.0%}, "
        f"{scaled(kernel['bytes'], 'B')} of arguments, compiled in {kernel['seconds']:.1f} s",
        f"  matrix: {counted(kernel['matrix'])}; loads: {loads or 'none'}; mix: {counted(kernel['mix'])}",
    ]


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    gpu = report["gpu"]
    lines = [
        f"{gpu['name']} (sm_{gpu['arch']}, {gpu['multiprocessors']} multiprocessors), {report['dtype']}: "
        f"{scaled(gpu['peak_used'], 'FLOP/s')}, {scaled(gpu['bandwidth_used'], 'B/s')}; Triton {report['triton']}",
        "Nothing here is measured: floors are what the peaks allow, the rest is read off compiled code.",
    ]
    for row in report["rows"]:
        lines += ["", f"{row['workload']}  {written(row['sizes'])}  floor {scaled(row['floor_seconds'], 's')}"]
        if row["reason"]:
            lines.append(f"  no Triton path, runs chunked torch: {row['reason']}")
        for name in ("forward", "backward"):
            one = row[name]
            lines.append(
                f"  {name:8}  {scaled(one['flops'], 'FLOP')}, {scaled(one['ideal_bytes'], 'B')} ideal, "
                f"{scaled(one['actual_bytes'], 'B')} actual, {one['intensity']:.1f} FLOP/B, "
                f"floor {scaled(one['floor_seconds'], 's')} ({one['bound']})"
            )
            lines += [f"    {line}" for kernel in one["kernels"] for line in kernel_text(kernel)]
    without = [row["workload"] for row in report["rows"] if row["path"] == "torch"]
    lines += ["", f"without a Triton path: {', '.join(without) or 'none'}"]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--gpu", default="H200", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--only", nargs="+", default=[], help="workloads whose name holds one of these texts")
    parser.add_argument("--set", nargs="+", default=[], metavar="T=16k", help="other sizes")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path)


def main(args: argparse.Namespace) -> int:
    """Print the report, and write it."""
    gpu = find_gpu(args.gpu)
    report = make_report(selected(args.only), gpu, DTYPES[args.dtype], parse_sizes(args.set), args.jobs)
    print(text(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.html:
        from .html import page

        args.html.write_text(page(report), encoding="utf-8")
    return 0
