"""One run of an ablation, in a process of its own: train it, or go on with it, and measure it."""

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Any

from ..models import load
from ..models.describe import describe
from ..train import RunConfig, read_config, read_metrics, train
from ..train.examples import open_task, scores
from . import record
from .harness import pick_device

logger = logging.getLogger("palimpsest.eval")


def measure(config: RunConfig, stream: int | None = None) -> dict[str, Any]:
    """Train a run, or go on with it, and measure it: the content of its result.

    ``stream``: examples of the test are read so many tokens at a time; see :func:`palimpsest.train.examples.scores`.
    """
    began = time.perf_counter()
    summary = train(config)
    if summary.status != "complete":
        raise KeyboardInterrupt
    device = pick_device(config.train.device)
    model = load(config.folder, device).eval().requires_grad_(False)
    last: dict[str, Any] = {}
    for line in read_metrics(config.folder):
        last |= {key: value for key, value in line.items() if key.startswith("validation")}
    tests: dict[str, dict[str, float]] = {}
    if config.data.task is not None:
        task = open_task(config.data.task, config.data.options)
        tests = {group.name: scores(model, group, stream=stream) for group in task.test}
    others = {name: {key: x for key, x in found.items() if key != "accuracy"} for name, found in tests.items()}
    sizes = describe(config.plain())
    about = record.provenance(device, time.perf_counter() - began)
    del about["command"]  # of one process of the pool
    return {
        "parameters": sizes.parameters,
        "flops_per_token": sizes.flops_per_token - sizes.head_flops_per_token,
        "state_bytes": sizes.state_bytes,
        "loss": summary.loss,
        **last,
        "test": {name: found["accuracy"] for name, found in tests.items()},
        **({"scores": others} if any(others.values()) else {}),
        **about,
    }


def wait_until_free(folder: Path) -> None:
    """Return when no other process trains in ``folder``: one that a killed sweep left behind is still saving."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is at work in %s: waiting for its end", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
    finally:
        os.close(handle)


def one(path: Path, stream: int | None = None) -> None:
    """From ``<folder>.yaml`` to the result in ``<folder>``."""
    config = read_config(path)
    result = record.result_of(config.folder, stream)
    wait_until_free(config.folder)
    if not result.exists():
        record.write_json(result, measure(config, stream))
