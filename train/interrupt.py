"""The wish to stop: signals that a scheduler or a person sends, as something that the loop can ask for."""

import signal
import threading
import time
from typing import Any

from typing_extensions import Self

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
"""SIGUSR1 is what Slurm's ``--signal`` sends ahead of a time limit; Windows has none."""
ECHO = 1.0
"""Seconds within which another signal is the same one: schedulers signal a process, and its parent passes it on."""


class Interrupt:
    """Signals become a wish (``asked``) that the loop honours between two steps; a second one later acts at once."""

    def __init__(self) -> None:
        self.asked = False
        self.since = 0.0
        self.former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for name in NAMES:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self.former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
        self.former = {}

    def _note(self, number: int, _: object) -> None:
        if not self.asked:
            self.asked, self.since = True, time.monotonic()
        elif time.monotonic() - self.since > ECHO:
            self.__exit__()
            signal.raise_signal(number)
