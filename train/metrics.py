"""What a run tells: metrics.jsonl, TensorBoard, progress on stdout; and the machine's peak, that MFU is a share of."""

import json
import logging
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from typing_extensions import Self

from .board import Board

logger = logging.getLogger("palimpsest.train")

Record = dict[str, Any]


class MetricLog:
    """``metrics.jsonl`` (one JSON object a line, each with ``step``) and TensorBoard events in a run folder.

    Opening it drops the lines after ``step``, the last update that the restored weights contain, and a line that a kill
    cut short: a resumed run writes them again. NaN and infinities are written as null, so that every line is JSON.

    Args:
        listener: called with each record, for a program that trains in-process.
    """

    def __init__(
        self, folder: Path, step: int = 0, tensorboard: bool = True, listener: Callable[[Record], None] | None = None
    ):
        self.path = folder / "metrics.jsonl"
        self.listener = listener
        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        beside = self.path.with_name(".metrics.jsonl")
        beside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        beside.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = Board(folder, step, kept) if tensorboard else None

    def write(self, record: Record) -> None:
        """Append one record; its numbers go to TensorBoard too."""
        record = {key: _finite(value) for key, value in record.items()}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()  # a killed process loses nothing that is flushed
        if self.board is not None:
            self.board.numbers(record)
        if self.listener is not None:
            self.listener(record)

    def sync(self) -> None:
        """Make what is written durable; before a checkpoint, so that no checkpoint is ahead of its metrics."""
        os.fsync(self.file.fileno())
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        """Flush and close both."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(folder: str | Path) -> list[Record]:
    """The records of a run's metrics.jsonl in order; a last line that is not whole is left out; [] without the file.

    Raises:
        ValueError: for a broken line that is not the last.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # empty, or cut short
            break
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
    return records


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """A bar on a terminal, drawn anew at most ten times a second; elsewhere a plain line every ``log_every`` steps.

    Both show the loss, tokens/s and the time left.
    """

    def __init__(self, steps: int, step: int, stream: TextIO | None = None, silent: bool = False):
        self.steps, self.first, self.silent = steps, step, silent
        self.stream = stream or sys.stdout
        self.tty = self.stream.isatty()
        self.begin = self.drawn = time.monotonic()

    def show(self, record: Record, speed: float, log: bool) -> None:
        """Tell of one update; ``log``: its line is due."""
        now, step = time.monotonic(), record["step"]
        left = (now - self.begin) / max(1, step - self.first) * (self.steps - step)
        text = f"loss {record['loss']:.4f}  {_short(speed)} tok/s  ETA {_clock(left)}"
        if not self.tty:
            if log:
                self._put(f"step {step}/{self.steps}  {text}\n")
        elif now - self.drawn > 0.1 or step == self.steps:
            self.drawn = now
            room = shutil.get_terminal_size().columns - len(text) - 2 * len(str(self.steps)) - 8
            width = max(0, min(40, room))
            done = width * step // self.steps
            bar = f"[{'━' * done}{' ' * (width - done)}] " if width else ""
            self._put(f"\r\x1b[K{bar}{step}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._put(f"\r\x1b[K{text}\n" if self.tty else f"{text}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        if self.tty:
            self._put("\n")

    def _put(self, text: str) -> None:
        if not self.silent:
            self.stream.write(text)
            self.stream.flush()


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


PEAKS: Mapping[str, tuple[float, float]] = {
    # Dense FLOP/s of (float32 without TF32, bfloat16 tensor cores with float32 accumulation), by a part of the name
    # that torch.cuda.get_device_name() gives; the first that occurs in it counts, so longer names stand first.
    "B200": (75e12, 2250e12),  # NVIDIA Blackwell architecture brief: HGX B200, per GPU
    "GH200": (67e12, 989.4e12),  # NVIDIA GH200 datasheet; the H100 SXM's figures
    "H200 NVL": (60e12, 835.5e12),  # NVIDIA H200 datasheet
    "H200": (67e12, 989.4e12),  # NVIDIA H200 datasheet, SXM
    "H100 NVL": (60e12, 835.5e12),  # NVIDIA H100 datasheet
    "H100 PCIe": (51e12, 756e12),  # NVIDIA H100 datasheet
    "H100": (67e12, 989.4e12),  # NVIDIA H100 datasheet, SXM
    "A100": (19.5e12, 312e12),  # NVIDIA A100 datasheet
    "L40S": (91.6e12, 362e12),  # NVIDIA L40S datasheet
    "L4": (30.3e12, 121e12),  # NVIDIA L4 datasheet
    "A10G": (35e12, 70e12),  # NVIDIA A10G, AWS edition of the A10
    "A10": (31.2e12, 125e12),  # NVIDIA A10 datasheet
    "RTX 4090": (82.6e12, 165.2e12),  # NVIDIA Ada architecture white paper, appendix A
    "RTX 3090": (35.6e12, 71e12),  # NVIDIA GA102 architecture white paper, appendix A
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What the device could do at most, FLOP/s: from ``PEAKS`` for a GPU, measured once here for a CPU.

    Returns None, and says so, for a GPU that is not in the table: MFU is then left out.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peaks in PEAKS.items():
            if part in name:
                return peaks[precision != "fp32"]  # of fp8 too: a share of what bfloat16 could do
        logger.info("no peak FLOP/s known for %s: mfu is left out", name)
        return None
    return _measured_peak()


def _measured_peak(size: int = 768, repeats: int = 6) -> float:
    """The best of a few float32 matrix products on the CPU with the threads that training will use, FLOP/s; ~0.1 s.

    Of bf16 runs too: a CPU without bfloat16 instructions emulates them, a hundred times slower, and that is no peak.
    """
    a = torch.ones(size, size)
    best = math.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
