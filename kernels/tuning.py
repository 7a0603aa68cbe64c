"""Which configuration of a kernel runs on this GPU: those its canary passed, and of these the fastest.

Results are kept in one JSON file per (GPU, Triton version) under ``PALIMPSEST_CACHE`` (``~/.cache/palimpsest``), so
that the check and the timing of a kernel and its constants happen once on a machine; another source of the kernel is
another kernel. Configurations are timed on the first launch of at least a program per multiprocessor, and on the first
of fewer. ``PALIMPSEST_AUTOTUNE=0`` takes the first configuration that is right, checks no further and times nothing.
"""

import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from .launch import AUTOTUNE, Config, Kernel, forced, is_forced

logger = logging.getLogger("palimpsest.kernels")

#: Largest RMS-relative distance of a canary from the plain torch path in float32, by the dtype of what was found.
#: float32 products may run in tf32 (unit 2^-11) and half precision rounds operands and results (2^-9); a miscompiled
#: product is wrong by about 1.
TOLERANCE = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 5e-2}
RUNS = 20
Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]
Facts = dict[str, Any]


def cache_file(gpu: str, version: str) -> Path:
    """Where the results of one GPU and Triton version are kept."""
    folder = Path(os.environ.get("PALIMPSEST_CACHE", Path.home() / ".cache" / "palimpsest"))
    name = "".join(c if c.isalnum() else "-" for c in f"{gpu}-triton-{version}")
    return folder / f"kernels-{name}.json"


class Verdicts:
    """What is known of configurations: ``{kernel, constants: {config: {"passed": …, "found": …}}}``, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = self._read()

    def _read(self) -> dict[str, dict[str, Facts]]:
        """What the file holds; nothing, and a warning, where it is damaged."""
        if not self.path.exists():
            return {}
        try:
            whole = json.loads(self.path.read_text())
            if all(isinstance(facts["passed"], bool) for configs in whole.values() for facts in configs.values()):
                return whole
        except (ValueError, AttributeError, KeyError, TypeError):
            pass
        logger.warning("%s is damaged; kernels are checked anew", self.path)
        return {}

    def note(self, key: str, config: Config, facts: Facts) -> None:
        """Add what was found, and write the file whole, with what other processes have added to it."""
        own = self.known.setdefault(key, {}).setdefault(str(config), {})
        own.update(facts)
        whole = self._read()
        whole.setdefault(key, {}).setdefault(str(config), {}).update(own)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            json.dump(whole, file, indent=1)
        os.replace(file.name, self.path)


_verdicts: dict[Path, Verdicts] = {}
_chosen: dict[tuple[Any, ...], Config] = {}


def here() -> Verdicts:
    """The verdicts of the current GPU and this Triton."""
    import triton

    path = cache_file(torch.cuda.get_device_name(), triton.__version__)
    return _verdicts.setdefault(path, Verdicts(path))


def describe(kernel: Kernel, constants: Mapping[str, Any]) -> str:
    """The key of a kernel's verdicts: its name, the digest of its source and of all that it calls, its constants."""
    source = hashlib.sha256(str(kernel.function.cache_key).encode()).hexdigest()[:12]
    return " ".join([f"{kernel.name}@{source}", *(f"{name}={value}" for name, value in sorted(constants.items()))])


def validate(kernel: Kernel, config: Config, constants: Mapping[str, Any]) -> tuple[bool, str]:
    """Run the canary with a configuration: whether it is right, and the largest distance or what went wrong."""
    from triton.runtime.errors import TritonError

    worst = 0.0
    try:
        with forced(kernel, config), torch.enable_grad():
            pairs = kernel.canary(constants)
    except (RuntimeError, ValueError, TritonError) as error:  # too much shared memory, or a compiler that gives up
        return False, f"{type(error).__name__}: {error}"[:300]
    if not pairs:
        raise ValueError(f"canary of {kernel.name} compares nothing")
    for found, wanted in pairs:
        size = wanted.double().square().mean().sqrt()
        distance = ((found.double() - wanted.double()).square().mean().sqrt() / size.clamp(min=1e-30)).item()
        worst = max(worst, distance if distance == distance else float("inf"))
        if not distance <= TOLERANCE[found.dtype]:
            return False, f"RMS-relative distance {distance:.3g} of a {tuple(found.shape)} {found.dtype}"
    return True, f"{worst:.3g}"


def choose(kernel: Kernel, grid: Grid, arguments: dict[str, Any], constants: dict[str, Any]) -> Config:
    """The configuration to launch with.

    Inside another kernel's canary it is the first that is right: nothing is timed on that small problem, and a failure
    is not written down, since it may be that other kernel's.

    Raises:
        RuntimeError: when no configuration passes the canary; it names the kernel, its constants and what was found.
    """
    configs = kernel.configs(constants)
    full = prod(grid({**constants, **dict(configs[0].blocks)})) >= _multiprocessors()
    key = (kernel.name, torch.cuda.current_device(), full, tuple(sorted(constants.items(), key=lambda item: item[0])))
    if key in _chosen:
        return _chosen[key]
    verdicts, name = here(), describe(kernel, constants)
    nested = is_forced()
    tune = os.environ.get(AUTOTUNE, "1") != "0" and not nested and not torch.cuda.is_current_stream_capturing()
    right, found = [], {}
    for config in configs:
        facts = _verdict(kernel, config, constants, verdicts, name, keep_failure=not nested)
        found[str(config)] = facts["found"]
        if facts["passed"]:
            right.append(config)
            if not tune:
                break
    if not right:
        raise RuntimeError(f"no configuration of {name} passed its canary: {found}")
    if tune and len(right) > 1:
        size = "full" if full else "few"
        right.sort(key=lambda config: _seconds(kernel, config, grid, arguments, constants, verdicts, name, size))
    if not nested:
        _chosen[key] = right[0]
    return right[0]


def _multiprocessors() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def _verdict(
    kernel: Kernel, config: Config, constants: Mapping[str, Any], verdicts: Verdicts, name: str, *, keep_failure: bool
) -> Facts:
    """What is known of a configuration, or what its canary says now."""
    known = verdicts.known.get(name, {}).get(str(config))
    if known is not None:
        return known
    passed, found = validate(kernel, config, constants)
    facts = {"passed": passed, "found": found}
    if passed or keep_failure:
        verdicts.note(name, config, facts)
        log = logger.info if passed else logger.warning
        log("canary of %s with %s: %s (%s)", name, config, "right" if passed else "WRONG, not used", found)
    return facts


def _seconds(
    kernel: Kernel,
    config: Config,
    grid: Grid,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    verdicts: Verdicts,
    name: str,
    size: str,
) -> float:
    """Median time of a launch, from the file or measured now; a kernel overwrites its outputs, so it may run again."""
    known = verdicts.known[name][str(config)].get(f"seconds, {size}")
    if known is None:
        known = measure(lambda: kernel.run(config, grid, arguments, constants))
        verdicts.note(name, config, {f"seconds, {size}": known})
    return float(known)


def measure(launch: Callable[[], None]) -> float:
    """Median seconds of a launch on this GPU, the first two left out."""
    times = []
    for _ in range(RUNS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[2:])
