"""How time and memory are measured, in one place, and what a record of a measurement holds."""

import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

HEAD_START = 2_000_000  # cycles of a GPU's clock
M_MMAP_THRESHOLD = -3  # of malloc.h: blocks above it are mapped, and unmapped when freed


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise OSError("the peak memory of a CPU run is read from /proc, which this system does not have")
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """The most memory in use while ``function`` runs, above what was in use before, in bytes.

    On a GPU as the allocator counts it. On a CPU the peak of resident memory, reset before the call (Linux). From the
    first call on, this process returns freed blocks above 256 KiB to the system at once, so that what is resident is
    what is in use: take times before. Run ``function`` once before, small, so that libraries are loaded.

    Raises:
        OSError: on a CPU of a system without /proc.
    """
    gc.collect()
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _resident("VmRSS")  # a system without it is told so before its allocator is touched
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 256 * 1024)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def interleave(
    functions: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each function in each round; all take turns, so that a slow moment of the machine meets them alike.

    On a GPU by its own clock, and with its cache emptied before every call.
    """
    for function in functions.values():
        function()
    timed = _cpu_seconds if device == "cpu" else _gpu_timer()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function))
    return seconds


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _gpu_timer() -> Callable[[Callable[[], object]], float]:
    """A clock between two events. Before the first, 512 MiB, more than any cache in gpus.py, are written, and the GPU
    waits a millisecond or so in which this process can queue what is timed: its own speed is not what is asked for."""
    flush = torch.empty(512 << 20, dtype=torch.int8, device="cuda")

    def timed(function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return timed


def ratio(seconds: Mapping[str, list[float]], of: str, to: str) -> float:
    """How many times faster ``of`` is than ``to``: the median over rounds of their ratio in that round."""
    return statistics.median(b / a for a, b in zip(seconds[of], seconds[to], strict=True))


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def write(path: str | Path | None, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, with the machine it was measured on; nothing when ``path`` is None."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"machine": machine(), **record}, indent=2) + "\n")
