"""One training with one optimizer, for the table of ``python -m palimpsest.train.optimizers``."""

import logging
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ...kernels.profile.measure import peak_bytes
from .. import launch, parallel
from ..checkpoint import Checkpointer
from ..config import RunConfig
from ..interrupt import Interrupt
from ..loop import Run
from ..metrics import Progress
from ..optim import state_bytes
from ..parallel import World


def measure(config: RunConfig, world: World, corpus: Any) -> dict[str, Any]:
    """Train, and return the row of the table."""
    core, model, optimizer = launch.model(config, world)
    with tempfile.TemporaryDirectory() as name, Interrupt() as interrupt:
        folder, progress = Path(name), Progress(config.train.steps, 0, silent=True)
        run = Run(
            config, world, folder, core, model, optimizer, corpus, Checkpointer(folder), None, progress, interrupt
        )
        run.loop()
    if run.step < config.train.steps:
        raise KeyboardInterrupt
    settings = config.train.model_dump(mode="json")
    return {
        "optimizer": settings["optimizer"],
        "options": settings.get(settings["optimizer"]) or settings["sltrain"],
        "lr": config.train.lr,
        "trained_parameters": sum(p.numel() for p in core.parameters() if p.requires_grad),
        "state_bytes": state_bytes(optimizer),
        "loss": run.loss,
        "validation_loss": run.validation_loss,
    }


def measure_alone(config: RunConfig) -> dict[str, Any]:
    """:func:`measure`, and as ``peak_bytes`` the most memory that it held beyond what the process had before: for one
    of its own, whose allocator :func:`palimpsest.kernels.profile.measure.peak_bytes` slows."""
    logging.getLogger("palimpsest").setLevel(logging.WARNING)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    world = parallel.start(config.train.device)
    corpus = launch.corpus(config, world)
    row: dict[str, Any] = {}
    peak = peak_bytes(lambda: row.update(measure(config, world, corpus)), world.device.type)
    return {**row, "peak_bytes": peak}


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a fresh process; both must be importable and picklable.

    Raises:
        BrokenProcessPool: when that process dies. What the function raises comes back, too.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
