"""Which configuration of a kernel runs on this GPU: those its canary passed, and of these the fastest.

Results are kept in one JSON file per (GPU, Triton version) under ``PALIMPSEST_CACHE`` (``~/.cache/palimpsest``), so
that the check and the timing of a kernel and its constants happen once on a machine. ``PALIMPSEST_AUTOTUNE=0`` takes
the first configuration that is right and times nothing.
"""

import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .launch import AUTOTUNE, Config, Kernel, forced

logger = logging.getLogger("palimpsest.kernels")

#: Largest RMS-relative distance of a canary from the plain torch path in float32, by the dtype of what was found.
#: float32 products may run in tf32 (unit 2^-11) and half precision rounds operands and results (2^-9); a miscompiled
#: product is wrong by about 1.
TOLERANCE = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 5e-2}
RUNS = 20


def cache_file(gpu: str, version: str) -> Path:
    """Where the results of one GPU and Triton version are kept."""
    folder = Path(os.environ.get("PALIMPSEST_CACHE", Path.home() / ".cache" / "palimpsest"))
    name = "".join(c if c.isalnum() else "-" for c in f"{gpu}-triton-{version}")
    return folder / f"kernels-{name}.json"


class Verdicts:
    """What is known of configurations: ``{kernel, constants: {config: {"error": …, "seconds": …}}}``, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, dict[str, Any]]] = {}
        if path.exists():
            try:
                self.known = json.loads(path.read_text())
            except json.JSONDecodeError:
                logger.warning("%s is damaged; kernels are checked anew", path)

    def note(self, key: str, config: Config, **facts: Any) -> None:
        """Add what was found, and write the file whole: another process may be reading it."""
        self.known.setdefault(key, {}).setdefault(str(config), {}).update(facts)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            json.dump(self.known, file, indent=1)
        os.replace(file.name, self.path)


_verdicts: dict[Path, Verdicts] = {}
_chosen: dict[tuple[Any, ...], Config] = {}


def _here() -> Verdicts:
    import triton

    path = cache_file(torch.cuda.get_device_name(), triton.__version__)
    return _verdicts.setdefault(path, Verdicts(path))


def describe(kernel: Kernel, constants: Mapping[str, Any]) -> str:
    """The key of a kernel's verdicts: its name and its constants."""
    return " ".join([kernel.name, *(f"{name}={value}" for name, value in sorted(constants.items()))])


def validate(kernel: Kernel, config: Config, constants: Mapping[str, Any]) -> tuple[bool, str]:
    """Run the canary with a configuration: whether it is right, and the largest distance or what went wrong."""
    worst = 0.0
    try:
        with forced(kernel, config):
            pairs = kernel.canary(constants)
    except (RuntimeError, ValueError) as error:  # too much shared memory, or a compiler that gives up
        return False, f"{type(error).__name__}: {error}"[:300]
    for found, wanted in pairs:
        size = wanted.double().square().mean().sqrt()
        distance = ((found.double() - wanted.double()).square().mean().sqrt() / size.clamp(min=1e-30)).item()
        worst = max(worst, distance if distance == distance else float("inf"))
        if not distance <= TOLERANCE[found.dtype]:
            return False, f"RMS-relative distance {distance:.3g} of a {tuple(found.shape)} {found.dtype}"
    return True, f"{worst:.3g}"


def choose(
    kernel: Kernel,
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]],
    arguments: dict[str, Any],
    constants: dict[str, Any],
) -> Config:
    """The configuration to launch with.

    Raises:
        RuntimeError: when no configuration passes the canary; it names the kernel, its constants and what was found.
    """
    key = (kernel.name, torch.cuda.current_device(), tuple(sorted(constants.items(), key=lambda item: item[0])))
    if key in _chosen:
        return _chosen[key]
    verdicts, name = _here(), describe(kernel, constants)
    right = []
    for config in kernel.configs(constants):
        known = verdicts.known.get(name, {}).get(str(config))
        if known is None:
            passed, found = validate(kernel, config, constants)
            verdicts.note(name, config, passed=passed, found=found)
            log = logger.info if passed else logger.warning
            log("canary of %s with %s: %s (%s)", name, config, "right" if passed else "WRONG, not used", found)
            known = {"passed": passed}
        if known["passed"]:
            right.append(config)
    if not right:
        raise RuntimeError(f"no configuration of {name} passed its canary: {verdicts.known.get(name)}")
    tune = os.environ.get(AUTOTUNE, "1") != "0" and len(right) > 1 and not torch.cuda.is_current_stream_capturing()
    if tune:
        right.sort(key=lambda config: _seconds(kernel, config, grid, arguments, constants, verdicts, name))
    _chosen[key] = right[0]
    return right[0]


def _seconds(kernel, config, grid, arguments, constants, verdicts, name) -> float:
    """Median time of a launch, from the file or measured now."""
    known = verdicts.known[name][str(config)].get("seconds")
    if known is not None:
        return float(known)
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kernel.run(config, grid, arguments, constants)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    verdicts.note(name, config, seconds=statistics.median(times))
    return statistics.median(times)
