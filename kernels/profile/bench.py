"""Times of the operations, forward and backward, beside the reference, chunked torch and other packages.

    python -m palimpsest.kernels.profile bench [--only delta_rule] [--set B=2] [--sweep T=1k..64k] [--json F] [--plot F]

Nothing is timed whose values or gradients are wrong: each implementation is first compared, at a small size, with the
reference in float64 on the same numbers, and on a GPU, at the size that is timed, with chunked torch in float32. All
implementations take turns in every round. On a CPU, times are of this machine at this moment: compare ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backend import launchable
from ..launch import interpreted
from ..op import Cost
from .draw import BITS, Draw
from .gpus import Gpu, find_gpu
from .growth import growth
from .growth import text as growth_text
from .measure import interleave, peak_bytes, ratio, write
from .peers import peers
from .report import DTYPES, scaled
from .sizes import parse_sizes, parse_sweep, written
from .workloads import Workload, floats, leaves, moved, selected

#: RMS-relative distance from the float64 reference on the same numbers. Half precision: operands and results are
#: rounded to 2^-9 (bf16) or 2^-12, a few times on the way; float32 on a GPU: products may run in tf32 (2^-11).
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 5e-3}
LONGEST_REFERENCE = 1024  # tokens that the token-by-token reference is timed at
Call = Callable[[Mapping[str, Any]], Tensor]


def failures() -> tuple[type[BaseException], ...]:
    """What an implementation raises when it cannot run here: no memory, no such variant, a compiler that gives up."""
    known = (RuntimeError, ValueError, TypeError, AssertionError, ImportError, AttributeError)
    try:
        from triton.runtime.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)


@dataclass(frozen=True)
class Setting:
    """Where and in what dtype to measure, and how often."""

    device: str
    dtype: torch.dtype
    rounds: int
    gpu: Gpu | None

    def tolerance(self, workload: Workload) -> float:
        """Distance from the reference up to which a result is right."""
        exact = self.device == "cpu" and self.dtype == torch.float32
        if exact:
            return 2 * workload.exact
        return TOLERANCE[self.dtype] * (1.0 if self.dtype == torch.float32 else workload.half)


def implementations(workload: Workload, setting: Setting) -> tuple[dict[str, Call], list[str]]:
    """What can be measured, by name, our own first; and a line for each peer that is not there."""
    kernels = launchable(torch.device(setting.device)) and not interpreted()
    names = ["torch", *(["triton"] if kernels else []), "reference"]
    found: dict[str, Call] = {name: partial(workload.run, backend=name) for name in names}
    missing = []
    for peer in peers().values():
        call = peer.calls.get(workload.operation)
        if call is None or (peer.gpu and setting.device == "cpu"):
            continue
        if peer.installed:
            found[peer.name] = call
        else:
            missing.append(f"{peer.name} is not installed; get it with: {peer.install}")
    return found, missing


def gradients(call: Call, arguments: Mapping[str, Any], seed: int = 1) -> list[Tensor]:
    """Output and the gradients of every floating argument, for one fixed gradient of the output."""
    given = leaves(arguments)
    output = call(given)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.device, output.dtype)
    found = torch.autograd.grad(output, floats(given), weight, materialize_grads=True)
    return [output.detach(), *found]


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest RMS-relative distance of a tensor from its like; infinite where one is not finite."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        a, b = a.to(b.device, torch.float64), b.double()
        one = ((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30)).item()
        worst = max(worst, one if one == one else float("inf"))
    return worst


def check(
    workload: Workload, call: Call, setting: Setting, sizes: Mapping[str, int], *, small: bool = True
) -> dict[str, Any]:
    """Whether values and gradients are right; at the workload's ``check`` sizes, or at those that are timed."""
    own = {name: workload.check[name] for name in sizes if name in workload.check} if small else sizes
    against = "float64 reference" if small else "float32 chunked torch"
    draw = Draw(setting.dtype, "cpu" if small else setting.device)
    arguments = moved(workload.arguments(draw, own), setting.dtype, setting.device)
    limit = setting.tolerance(workload)
    try:
        found = gradients(call, arguments)
    except failures() as error:
        return {"right": False, "against": against, "error": f"{type(error).__name__}: {error}"[:300]}
    kind, where, name = (torch.float64, "cpu", "reference") if small else (torch.float32, setting.device, "torch")
    try:
        wanted = gradients(partial(workload.run, backend=name), moved(arguments, kind, where))
    except torch.cuda.OutOfMemoryError:
        return {"right": True, "against": f"nothing: no memory for {against} at these sizes"}
    far = distance(found, wanted)
    return {"right": far <= limit, "against": against, "distance": far, "tolerance": limit}


def checked(
    workload: Workload, calls: Mapping[str, Call], setting: Setting, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The verdict on each implementation: the small check, then on a GPU the one at full size."""
    verdicts = {}
    for name, call in calls.items():
        verdicts[name] = check(workload, call, setting, sizes)
        if verdicts[name]["right"] and setting.device != "cpu" and name not in ("torch", "reference"):
            verdicts[name] = check(workload, call, setting, sizes, small=False)
    return verdicts


def passes(call: Call, arguments: Mapping[str, Any]) -> dict[str, Callable[[], object]]:
    """Forward alone without gradients, and forward with backward."""
    given = leaves(arguments)
    wanted = floats(given)
    with torch.no_grad():
        weight = torch.randn_like(call(given))

    def forward() -> None:
        with torch.no_grad():
            call(given)

    def both() -> None:
        torch.autograd.grad(call(given), wanted, weight, materialize_grads=True)

    return {"forward": forward, "forward+backward": both}


def figures(seconds: list[float], cost: Cost, bits: int, gpu: Gpu | None) -> dict[str, Any]:
    """Median, spread, and what follows from them."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
    found = {
        "median": median,
        "spread": (high - low) / median,
        "least": min(seconds),
        "rounds": len(seconds),
        "flops_per_second": cost.flops / median,
        "bytes_per_second": cost.bytes / median,
    }
    return {**found, "share_of_floor": gpu.floor(cost, bits)[0] / median} if gpu else found


def measure(workload: Workload, sizes: Mapping[str, int], setting: Setting) -> list[dict[str, Any]]:
    """One row per implementation and pass; a row without ``seconds`` was not timed, and says why in ``check``."""
    calls, missing = implementations(workload, setting)
    if sizes["T"] > LONGEST_REFERENCE:
        del calls["reference"]
    verdicts = checked(workload, calls, setting, sizes)
    arguments = workload.arguments(Draw(setting.dtype, setting.device), sizes)
    right = {name: passes(call, arguments) for name, call in calls.items() if verdicts[name]["right"]}
    forward, backward = workload.cost(sizes, setting.dtype.itemsize)
    costs = {"forward": forward, "forward+backward": forward + backward}
    rows = []
    for kind, cost in costs.items():
        timed = interleave({name: each[kind] for name, each in right.items()}, setting.rounds, setting.device)
        for name in calls:
            row: dict[str, Any] = {
                "workload": workload.name,
                "sizes": dict(sizes),
                "pass": kind,
                "implementation": name,
            }
            row |= {"dtype": str(setting.dtype).removeprefix("torch."), "check": verdicts[name]}
            if name in timed:
                row["seconds"] = figures(timed[name], cost, BITS[setting.dtype], setting.gpu)
                row["times_torch"] = ratio(timed, name, "torch") if "torch" in timed else None
            rows.append(row)
    rows[0]["missing"] = missing
    return rows


def add_peaks(rows: Sequence[dict[str, Any]], workload: Workload, setting: Setting) -> None:
    """Add the peak memory of what was timed, above its arguments. After all times: it slows a CPU's allocator down."""
    calls, _ = implementations(workload, setting)
    arguments = workload.arguments(Draw(setting.dtype, setting.device), rows[0]["sizes"])
    for row in rows:
        if "seconds" in row:
            call = passes(calls[row["implementation"]], arguments)[row["pass"]]
            call()
            row["peak_bytes"] = peak_bytes(call, setting.device)


def row_text(row: dict[str, Any], on_gpu: bool) -> str:
    """A line about an implementation."""
    name, verdict = f"    {row['implementation']:24}", row["check"]
    if "seconds" not in row:
        far = verdict.get("error") or f"{verdict['distance']:.2g} from the {verdict['against']}"
        return f"{name}NOT TIMED: {far}"
    s = row["seconds"]
    parts = [f"{scaled(s['median'], 's'):>8} ± {s['spread'] / 2:.0%}"]
    if row["times_torch"] is not None:
        parts.append(f"{row['times_torch']:.2f} × torch")
    if on_gpu:
        parts += [scaled(s["flops_per_second"], "FLOP/s"), scaled(s["bytes_per_second"], "B/s")]
    if "share_of_floor" in s:
        parts.append(f"{s['share_of_floor']:.0%} of the floor")
    if "peak_bytes" in row:
        parts.append(f"peak {scaled(row['peak_bytes'], 'B')}")
    return name + "  ".join(parts)


def text(rows: Sequence[dict[str, Any]], on_gpu: bool) -> str:
    """What was measured at one size."""
    lines = [f"{rows[0]['workload']}  {written(rows[0]['sizes'])}  {rows[0]['dtype']}"]
    for kind in dict.fromkeys(row["pass"] for row in rows):
        lines += [f"  {kind}", *(row_text(row, on_gpu) for row in rows if row["pass"] == kind)]
    return "\n".join([*lines, *(f"  {line}" for line in rows[0].get("missing", []))])


def memory_text(rows: Sequence[dict[str, Any]]) -> str:
    """Peak memory of each implementation, forward with backward."""
    peaks = {row["implementation"]: row["peak_bytes"] for row in rows if row["pass"] != "forward" and "seconds" in row}
    told = "  ".join(f"{name} {scaled(peak, 'B')}" for name, peak in peaks.items())
    return f"{rows[0]['workload']}  {written(rows[0]['sizes'])}  peak memory: {told}"


def trace(path: Path, workload: Workload, sizes: Mapping[str, int], setting: Setting) -> None:
    """A Chrome trace of forward and backward, once per implementation of ours."""
    from torch.profiler import ProfilerActivity, profile, record_function

    calls, _ = implementations(workload, setting)
    arguments = workload.arguments(Draw(setting.dtype, setting.device), sizes)
    ours = {name: passes(calls[name], arguments) for name in ("torch", "triton") if name in calls}
    for each in ours.values():
        each["forward+backward"]()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.device != "cpu" else [])]
    with profile(activities=kinds) as profiler:
        for name, each in ours.items():
            with record_function(f"{workload.name} {name}"):
                each["forward+backward"]()
    profiler.export_chrome_trace(str(path))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--only", nargs="+", default=[], help="workloads whose name holds one of these texts")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--rounds", type=int, default=0, help="30 on a GPU, 5 on a CPU")
    parser.add_argument("--set", nargs="+", default=[], metavar="T=16k", help="other sizes than the documented ones")
    parser.add_argument("--sweep", default="", metavar="T=1k..64k", help="several values of one size")
    parser.add_argument("--memory", action="store_true", help="peak memory on a CPU too (Linux), after all times")
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin no workload after so many seconds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="time against the swept size, as PNG; needs matplotlib")
    parser.add_argument("--trace", type=Path, help="Chrome trace of the first workload")


def make_setting(device: str | None, dtype: str | None, rounds: int) -> Setting:
    """A setting with what was not said chosen by the machine."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device != "cpu"
    kind = DTYPES[dtype or ("bf16" if on_gpu else "fp32")]
    gpu = None
    if on_gpu:
        try:
            gpu = find_gpu(torch.cuda.get_device_name())
        except ValueError as error:
            print(f"no floor: {error}")
    return Setting(device, kind, rounds or (30 if on_gpu else 5), gpu)


def main(args: argparse.Namespace) -> int:
    """Measure, print and write; 1 when one of our own implementations is wrong."""
    setting = make_setting(args.device, args.dtype, args.rounds)
    on_gpu = setting.device != "cpu"
    measured: list[tuple[Workload, list[dict[str, Any]]]] = []
    if not on_gpu:
        print("On a CPU: times are this machine's, for the ratios between them; no floor is known for it.")
    begin, late = time.monotonic(), []
    for workload in selected(args.only):
        if time.monotonic() - begin > args.limit:
            late.append(workload.name)
            continue
        chosen = {**(workload.sizes if on_gpu else workload.small), **parse_sizes(args.set)}
        for more in parse_sweep(args.sweep) if args.sweep else [{}]:
            sizes = {name: {**chosen, **more}[name] for name in workload.sizes}
            if args.trace and not measured:
                trace(args.trace, workload, sizes, setting)
            measured.append((workload, measure(workload, sizes, setting)))
            if on_gpu:
                add_peaks(measured[-1][1], workload, setting)
            print(text(measured[-1][1], on_gpu), flush=True)
            write(args.json, {"rows": [row for _, found in measured for row in found]})
    if args.memory and not on_gpu:
        for workload, found in measured:
            add_peaks(found, workload, setting)
            print(memory_text(found), flush=True)
    if late:
        print(f"no time left for {', '.join(late)}")
    rows = [row for _, found in measured for row in found]
    swept = parse_sweep(args.sweep)[0] if args.sweep else {}
    grown = growth(rows, *swept) if swept else []
    if grown:
        print(growth_text(grown))
    write(args.json, {"rows": rows, "growth": grown})
    if args.plot:
        from .plot import plot

        plot(args.plot, rows, swept)
    wrong = {
        f"{row['workload']} {row['implementation']}"
        for row in rows
        if row["implementation"] in ("torch", "triton") and not row["check"]["right"]
    }
    for name in sorted(wrong):
        print(f"WRONG {name}")
    return 1 if wrong else 0
