"""Training: ``python -m palimpsest.train CONFIG key=value …``, or ``train(read_config(path))`` in-process."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RunConfig, TrainConfig, read_config
    from .loop import Summary, TrainingDiverged, train
    from .metrics import read_metrics

__all__ = ["RunConfig", "Summary", "TrainConfig", "TrainingDiverged", "read_config", "read_metrics", "train"]

_PLACES = {
    "RunConfig": "config",
    "TrainConfig": "config",
    "read_config": "config",
    "Summary": "loop",
    "TrainingDiverged": "loop",
    "train": "loop",
    "read_metrics": "metrics",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: ``python -m palimpsest.train.data`` must find its module unimported."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
