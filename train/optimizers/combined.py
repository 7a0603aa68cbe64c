"""Several optimizers, each with parameters of its own, as one."""

from collections.abc import Sequence
from typing import Any

import torch


class Combined(torch.optim.Optimizer):
    """Steps its parts one after the other. Groups and state are the parts' own objects, so that a learning rate set
    here reaches them, and a checkpoint of this one holds all of them."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.__setstate__({"state": self.state, "param_groups": self.param_groups[start:stop]})
            start = stop

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # loading a state replaces the objects

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every part."""
        for part in self.parts:
            part.step()
