"""Two architectures at one parameter count: the baseline's MLP is made as wide as it takes."""

from collections.abc import Mapping
from typing import Any

import torch

from ..models import build
from ..models.config import apply_overrides


def parameters(config: Mapping[str, Any]) -> int:
    """The trainable parameters of a run's config, counted without memory for them; a shared one counts once."""
    with torch.device("meta"):
        model = build(dict(config))
    return sum(p.numel() for p in model.parameters())


def match(config: Mapping[str, Any], target: int, multiple: int = 8, within: float = 0.01) -> dict[str, Any]:
    """``config`` with the ``model.ffn_hidden``, a multiple of ``multiple``, that comes nearest ``target`` parameters.

    The count is affine in the width, so two counts give the answer.

    Raises:
        ValueError: when the nearest count is further than ``within`` of ``target``, as a share of it.
    """
    low, high = (parameters(apply_overrides(config, {"model.ffn_hidden": width})) for width in (multiple, 2 * multiple))
    count = max(1, 1 + round((target - low) / (high - low)))
    matched = apply_overrides(config, {"model.ffn_hidden": count * multiple})
    found = parameters(matched)
    if abs(found - target) > within * target:
        raise ValueError(
            f"model.ffn_hidden = {count * multiple} gave {found:,} parameters; "
            f"they must be within {100 * within:g} % of {target:,}: change model.dim or model.layers"
        )
    return matched
