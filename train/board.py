"""TensorBoard: a run's numbers, and beside them what a person looks at as training goes.

    every record        its numbers, under their keys
    diagnostics_every   histograms of what the memories do at each token: their gates, the surprise
    validate_every      a text that the model writes, or, of a task, the accuracy of each group of examples so far

What cannot be written (a full disk) is said loudly once, and training goes on without.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.backend import log_once

logger = logging.getLogger("palimpsest.train")

GROUP = "validation_accuracy/"
"""What the keys of a record begin with that tell the accuracy of one group of a task's examples."""


class Board:
    """The events in ``folder/tensorboard`` of a run that goes on after ``step``.

    ``history``: the records of the run so far, for figures of a whole run.
    """

    def __init__(self, folder: Path, step: int, history: Sequence[Mapping[str, Any]] = ()) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self.history = [_groups(record) for record in history if _groups(record)]

    def numbers(self, record: Mapping[str, Any]) -> None:
        """A record's numbers, and where it has a task's groups the figure of their accuracy so far."""
        step = record["step"]
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._do("add_scalar", key, value, step)
        groups = _groups(record)
        if groups:
            self.history.append(groups)
            picture = accuracy_figure(self.history)
            if picture is not None:
                self._do("add_image", "accuracy by group", picture, step, dataformats="HWC")

    def text(self, name: str, text: str, step: int) -> None:
        """A text, shown as it is."""
        lines = text.replace("\t", "    ").splitlines()
        self._do("add_text", name, "\n".join("    " + line for line in lines), step)

    def histograms(self, found: Mapping[str, Tensor], step: int) -> None:
        """A histogram of each of ``found`` that is a number of every token [B, T]; what is not finite is left out."""
        for name, value in found.items():
            known = value.float()[value.isfinite()].cpu()
            if value.dim() == 2 and len(known):
                self._do("add_histogram", name, known, step)

    def flush(self) -> None:
        """Make what is written durable."""
        self._do("flush")

    def close(self) -> None:
        """Flush and close."""
        self._do("close")

    def _do(self, method: str, *args: Any, **options: Any) -> None:
        if self.events is None:
            return
        try:
            getattr(self.events, method)(*args, **options)
        except OSError as error:
            logger.error("TENSORBOARD NOT WRITTEN from here on: %s; metrics.jsonl has the numbers", error)
            self.events = None


def _groups(record: Mapping[str, Any]) -> dict[str, Any]:
    """The step and the groups' accuracy of a record; {} for one that has none."""
    found = {key.removeprefix(GROUP): value for key, value in record.items() if key.startswith(GROUP)}
    return {"step": record["step"], **found} if found else {}


def accuracy_figure(history: Sequence[Mapping[str, Any]]) -> Any:
    """The accuracy of each group against the step, as a picture, numpy uint8 [height, width, 3]; None without
    matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        log_once("figures of tasks are not drawn: matplotlib is not installed; pip install 'palimpsest[plot]'")
        return None
    import numpy as np  # which training does without on a GPU machine that has little else
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6.4, 4.0), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(drawing), drawing.subplots()
    for name in (key for key in history[-1] if key != "step"):
        points = [(record["step"], record[name]) for record in history if record.get(name) is not None]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.legend(fontsize=8, frameon=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@torch.no_grad()
def sample(model: Any, prompt: Sequence[int], count: int, seed: int, vocabulary: int | None = None) -> list[int]:
    """``count`` tokens drawn after ``prompt`` [T], from a generator of their own, so that training draws what it would;
    of the first ``vocabulary`` ids, None: all.

    Every process of a run that shards its weights takes part, with the same number of steps.
    """
    draw = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    output = model(torch.tensor([list(prompt)], device=device), return_state=True)
    said: list[int] = []
    for _ in range(count):
        chances = output.logits[0, -1, :vocabulary].float().cpu().softmax(-1)
        said.append(int(torch.multinomial(chances, 1, generator=draw)) if chances.isfinite().all() else 0)
        if len(said) < count:
            output = model(torch.tensor([said[-1:]], device=device), state=output.state, return_state=True)
    return said
