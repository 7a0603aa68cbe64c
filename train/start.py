"""Training in stages: a run that starts from another run's weights, and one that trains the memory alone.

HMT is trained so (He et al., 2024): first without recall, then, from those weights, with it::

    python -m palimpsest.train configs/tiny/hmt.yaml name=stage1 model.hmt.recall=none
    python -m palimpsest.train configs/tiny/hmt.yaml name=stage2 train.init=runs/stage1
"""

import logging
from pathlib import Path

import torch
from torch import nn

from ..models.config import ConfigError

logger = logging.getLogger("palimpsest.train")

MEMORY = "hmt."
"""What the names of the parameters that are not the backbone's begin with."""


def start_from(model: nn.Module, folder: str | Path, *, quiet: bool = False) -> None:
    """Copy into ``model`` the weights of a finished run wherever name and shape are the same; log what is not.

    Raises:
        ConfigError: when the folder holds no weights, or none that fits.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ConfigError(f"train.init was {str(folder)!r}; it must be the folder of a finished run, with {path.name}")
    try:
        given = load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"train.init was {str(folder)!r}; its {path.name} is damaged: {error}") from None
    mine = model.state_dict()
    lines, fitting = [], {}
    for name in sorted({*mine, *given}):
        if name not in given:
            lines.append(f"{name} is not there: it keeps its fresh weights")
        elif name not in mine:
            lines.append(f"{name} is not in this model: it is left out")
        elif mine[name].shape != given[name].shape:
            shapes = f"{tuple(given[name].shape)} there and {tuple(mine[name].shape)} here"
            lines.append(f"{name} is {shapes}: it keeps its fresh weights")
        else:
            fitting[name] = given[name]
    if not fitting:
        raise ConfigError(f"train.init was {str(folder)!r}; none of its weights fits this model: " + "; ".join(lines))
    with torch.no_grad():
        for name, value in fitting.items():
            mine[name].copy_(value)
    if not quiet:
        logger.info("starting from %s: %d of %d weights", folder, len(fitting), len(mine))
        for line in lines:
            logger.info("  %s", line)


def freeze_backbone(model: nn.Module) -> None:
    """Leave only the parameters of the memory over segments (``hmt.…``) to be trained.

    Raises:
        ConfigError: for a model that has none.
    """
    if not any(name.startswith(MEMORY) for name, _ in model.named_parameters()):
        raise ConfigError("train.freeze_backbone was true; it must be false for a model without a section hmt")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(MEMORY))
    left = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("the backbone is frozen: %d parameters are trained", left)
