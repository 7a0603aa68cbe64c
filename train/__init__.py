"""Training: ``python -m palimpsest.train CONFIG key=value …``, or ``train(read_config(path))`` in-process."""

from .config import RunConfig, TrainConfig, read_config
from .loop import Summary, TrainingDiverged, train
from .metrics import read_metrics

__all__ = ["RunConfig", "Summary", "TrainConfig", "TrainingDiverged", "read_config", "read_metrics", "train"]
