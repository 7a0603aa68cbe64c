"""Architectures at one size: a width is solved for, so that parameters, FLOPs or state bytes agree.

In an ablation's file, for all arms or, inside an arm, for that one (``null``: not for it)::

    match: {by: parameters, to: full, width: model.ffn_hidden, within: 0.01}

Sizes are those that :mod:`palimpsest.models.describe` counts, on tensors without memory.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from ..models.config import ConfigError, ModelConfig, Strict, apply_overrides
from ..models.describe import count, outline, read, state_of
from ..models.strict import Count, Positive

Measure = Literal["parameters", "flops", "state_bytes"]
UNITS = {"parameters": "parameters", "flops": "FLOPs per token", "state_bytes": "state bytes"}
WIDEST = 2**17


class Match(Strict):
    """What is made equal.

    ``by``: parameters; FLOPs of a token's forward and backward at ``train.seq_len``, without the output head; or bytes
    of one sequence's state after ``train.seq_len`` tokens. ``to``: an arm, under the same settings, or a number.
    ``width``: the key that is solved for, an integer; null: ``model.ffn_hidden``, or ``model.dim`` for state bytes and
    for models without MLP. ``multiple``: of what the width is one; null: of the heads for ``model.dim``, of 8 for
    ``model.ffn_hidden``, else of 1. ``within``: the share of ``to`` that may be missed.
    """

    by: Measure
    to: str | float
    width: str | None = None
    multiple: Count | None = None
    within: Positive = 0.02


@dataclass(frozen=True)
class Matched:
    """The match of an arm: ``width`` at ``value`` reaches ``reached`` of ``target``, counted ``by``."""

    by: Measure
    width: str
    value: int
    target: float
    reached: float

    @property
    def off(self) -> float:
        """By how much the target is missed, in percent of it."""
        return 100 * (self.reached / self.target - 1)

    def plain(self) -> dict[str, Any]:
        """For a JSON record."""
        return asdict(self) | {"percent_off": round(self.off, 4)}

    def __str__(self) -> str:
        found, wanted = f"{self.reached:,.0f}", f"{self.target:,.0f}"
        return f"{self.width} = {self.value}: {found} {UNITS[self.by]} for {wanted} ({self.off:+.2f} %)"


def size(config: Mapping[str, Any], by: Measure) -> float:
    """Parameters, FLOPs per token or state bytes of a run's config."""
    told, seq_len = read({"model": config["model"], "train": config.get("train")})
    return _size(told.model_dump_json(), seq_len, by)


@lru_cache(maxsize=1024)
def _size(config: str, seq_len: int, by: Measure) -> float:
    model = outline(ModelConfig.model_validate_json(config))
    if by == "parameters":
        return count(model)
    if by == "state_bytes":
        return state_of(model, seq_len).bytes
    return model.flops_per_token(seq_len) - 6 * model.config.dim * model.config.vocab_size


def width_of(config: ModelConfig, ask: Match) -> tuple[str, int]:
    """The key that ``ask`` solves for, and of what its value is a multiple."""
    key = ask.width or ("model.dim" if ask.by == "state_bytes" or not config.hidden else "model.ffn_hidden")
    if ask.multiple is not None:
        return key, ask.multiple
    if key != "model.dim":
        return key, 8 if key == "model.ffn_hidden" else 1
    steps = [1]
    for mixer in config.mixer:
        heads = getattr(mixer, "heads", 1)
        inner = getattr(getattr(mixer, "memory", None), "heads", 1)
        steps += [inner, 2 * heads if getattr(mixer, "rope", False) else heads]
    return key, math.lcm(*steps)


def solve(config: Mapping[str, Any], ask: Match, target: float) -> tuple[dict[str, Any], Matched]:
    """``config`` with the width that comes nearest ``target``, and the match it is.

    Raises:
        ConfigError: when the nearest misses by more than ``ask.within``, or the width changes nothing.
    """
    told, _ = read({"model": config["model"], "train": config.get("train")})
    key, multiple = width_of(told, ask)

    def reached(steps: int) -> float:
        return size(apply_overrides(config, {key: steps * multiple}), ask.by)

    value = nearest(reached, target, WIDEST // multiple, f"{key}, in steps of {multiple},") * multiple
    solved = apply_overrides(config, {key: value})
    found = Matched(ask.by, key, value, target, size(solved, ask.by))
    if abs(found.off) > 100 * ask.within:
        raise ConfigError(
            f"{key} = {value} gave {found.reached:,.0f} {UNITS[ask.by]}, the nearest in steps of {multiple}; they must "
            f"be within {100 * ask.within:g} % of {target:,.0f}: solve for another width, or allow more"
        )
    return solved, found


def nearest(size_of: Callable[[int], float], target: float, most: int, name: str) -> int:
    """The n in [1, most] whose size, which grows with n, is nearest ``target``; of two equally near the smaller.

    Between bounds that the target lies in, a straight line through both says where to look; every third look halves.

    Raises:
        ConfigError: when sizes do not grow.
    """
    low, high = 1, 2
    at_low, at_high = size_of(low), size_of(high)
    while at_high < target and high < most:
        if at_high == at_low:
            raise ConfigError(f"{name} changed nothing: {at_low:,.0f} at {low} and at {high} of them")
        low, at_low = high, at_high
        high = min(2 * high, most)
        at_high = size_of(high)
    looks = 0
    while high - low > 1 and at_low < target < at_high:
        looks += 1
        share = (target - at_low) / (at_high - at_low) if looks % 3 else 0.5
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        at_middle = size_of(middle)
        if at_middle < target:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    return low if abs(at_low - target) <= abs(at_high - target) else high


def parameters(config: Mapping[str, Any]) -> int:
    """The trainable parameters of a run's config, counted without memory for them; a shared one counts once."""
    return int(size(config, "parameters"))


def match(config: Mapping[str, Any], target: int, multiple: int = 8, within: float = 0.01) -> dict[str, Any]:
    """``config`` with the ``model.ffn_hidden``, a multiple of ``multiple``, that comes nearest ``target`` parameters.

    Raises:
        ConfigError: when the nearest count is further than ``within`` of ``target``, as a share of it.
    """
    ask = Match(by="parameters", to=target, width="model.ffn_hidden", multiple=multiple, within=within)
    return solve(config, ask, target)[0]
