"""The most memory that a run holds, measured: of a process of its own on a CPU, of torch's allocator on a GPU."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

CLEAR = Path("/proc/self/clear_refs")


class Peak:
    """Within ``with``, the most bytes held beyond those at its beginning; ``bytes`` afterwards.

    On a CPU it is resident memory (Linux: ``VmHWM``, set back at the beginning), all that operations take inside of
    themselves included, in steps of a page; on a GPU ``torch.cuda.max_memory_allocated``. A process that has freed
    memory before it, and whose allocator has kept it, shows too little: measure in one of its own.

    Raises:
        RuntimeError: where the system has no such numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes, self.before = device, 0, 0

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        if not CLEAR.exists():
            raise RuntimeError(f"--peak was given on {sys.platform}; resident memory is measured on Linux alone")
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
        self.before = _status("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        now = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        self.bytes = now - self.before


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
