"""Writing a checkpoint beside training: a copy of the state in main memory, and the thread that writes it."""

import copy
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("palimpsest.train")

PATIENCE = 1.0
"""Seconds that waiting for a write may take before the log says how long it was."""


def stage(state: Any) -> Any:
    """A copy of nested dicts and lists of tensors in main memory, sharded ones sharded as they were.

    It is taken in the order of the device's work, so that later updates do not show in it; it costs the bytes of this
    process's share of the state, and the time to copy them.
    """
    if isinstance(state, dict):
        return {key: stage(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(stage(value) for value in state)
    if isinstance(state, Tensor):
        here = state.detach()
        return here.clone() if here.device.type == "cpu" else here.to("cpu")
    return copy.deepcopy(state)


class Background:
    """One piece of work in a thread, that ends whatever happens, and never raises: what fails is an ERROR line.

    Args:
        what: what is being done, for messages.
    """

    def __init__(self, work: Callable[[], Any], what: str):
        self.work, self.what = work, what
        self.result: Any = None
        self.thread = threading.Thread(target=self._run, name=what)
        self.thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self.result = self.work()
        except Exception as error:  # training goes on: the checkpoints before are whole
            logger.error("%s NOT SAVED: %s: %s; the ones before are whole", self.what, type(error).__name__, error)

    def wait(self) -> Any:
        """What the work returned, once it is done; None when it failed."""
        begin = time.monotonic()
        self.thread.join()
        if (waited := time.monotonic() - begin) > PATIENCE:
            logger.info("waited %.1f s for the %s", waited, self.what)
        return self.result
