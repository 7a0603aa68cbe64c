"""What a result must say beside its numbers: the machine, the versions, the date, the command, the seconds."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("palimpsest", "torch", "triton", "numpy")


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: torch.device) -> dict[str, Any]:
    """The machine that the numbers come from; ``device`` is where the model ran."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def versions() -> dict[str, str]:
    """Python and the packages that the numbers depend on; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def provenance(device: torch.device, seconds: float) -> dict[str, Any]:
    """Everything beside the numbers, for a JSON record."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seconds": round(seconds, 1),
        "machine": machine(device),
        "versions": versions(),
    }


def places(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where and when the runs of these rows (with a :func:`provenance` each) were made, all that differ."""
    machines = dict.fromkeys(f"{row['machine']['cpu']} ({row['machine']['device']})" for row in rows)
    versions = dict.fromkeys(", ".join(f"{name} {one}" for name, one in row["versions"].items()) for row in rows)
    days = sorted({row["date"][:10] for row in rows})
    return f"{' and '.join(machines)}, {', '.join(days)}, {'; '.join(versions)}"


def result_of(folder: Path, stream: int | None) -> Path:
    """Where the result of an ablation's run lies. How the test was read is no part of the run, and has its own file."""
    return folder / ("result.json" if stream is None else f"result-stream-{stream}.json")


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: beside it first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
