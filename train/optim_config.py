"""The keys of the ``train`` section about the optimizer: which one, its options, groups, the schedule's shape."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ..models.strict import Count, Positive, Strict

if TYPE_CHECKING:
    from .config import TrainConfig

Natural = Annotated[int, Field(ge=0)]
Part = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class MuonConfig(Strict):
    """Options of Muon; the learning rate, weight decay and everything of AdamW's share are ``train``'s own."""

    momentum: BelowOne = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, le=99)] = 5
    """Newton-Schulz iterations of each orthogonalisation."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """match_rms_adamw: update times 0.2 √max(m, n), which goes with a learning rate tuned for AdamW; original: times
    √max(1, m/n)."""


class GaLoreConfig(Strict):
    """Options of GaLore."""

    rank: Count = 128
    """Dimensions of the subspace; a matrix with no more rows or no more columns than these goes to AdamW."""
    refresh_every: Count = 200
    """Updates between two choices of the subspace."""
    scale: Positive = 0.25
    """What the projected update is multiplied by (α)."""


class FiraConfig(GaLoreConfig):
    """Options of Fira: those of GaLore, and how much the norm of the part outside of the subspace may grow."""

    growth: Annotated[float, Field(ge=1)] = 1.01
    """The most that this norm may be of the one of the update before (γ)."""


class FrugalConfig(Strict):
    """Options of FRUGAL."""

    density: Part = 0.25
    """The share of columns, or of dimensions of the shorter side, that Adam updates (ρ)."""
    refresh_every: Count = 200
    """Updates between two choices of the subspace; Adam begins anew with each."""
    subspace: Literal["columns", "random", "svd"] = "columns"
    """columns: random columns; random: a random subspace; svd: the gradient's first singular vectors, as GaLore."""
    free_lr_scale: Annotated[float, Field(ge=0)] = 1.0
    """The learning rate of sign descent on the rest, as a share of Adam's."""


class SpamConfig(Strict):
    """Options of SPAM."""

    threshold: Positive = 5000.0
    """A gradient whose square is more than so many times its running mean square is a spike (θ)."""
    reset_every: Count = 500
    """Updates between two resets of the moments (ΔT)."""
    warmup_steps: Natural = 150
    """Updates after a reset over which the learning rate rises again (N)."""
    clip_after: Count = 20
    """Gradients that the mean square must have seen, since the start or a reset, before spikes are looked for."""

    @model_validator(mode="after")
    def _warm_before_the_next(self) -> Self:
        if self.warmup_steps > self.reset_every:
            was = self.warmup_steps
            raise ValueError(f"warmup_steps was {was}; it must be at most reset_every = {self.reset_every}")
        return self


class SLTrainConfig(Strict):
    """Weights as α/r · B A + S instead of dense matrices."""

    rank: Count = 128
    """Columns of B and rows of A (r)."""
    density: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """The share of S's entries that are trained, at places drawn from the seed (δ)."""
    alpha: Positive = 16.0
    """B A is multiplied by alpha / rank."""


class GroupRule(Strict):
    """What the parameters of a name have of their own."""

    match: Annotated[str, Field(min_length=1)]
    """A pattern of parameter names with ``*`` and ``?``, like ``*.gates.*``."""
    lr_scale: Positive = 1.0
    """Their learning rate, as a multiple of everyone's."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Their weight decay; null: as without the rule."""


OPTIONS = ("muon", "galore", "fira", "frugal", "spam")
WHOLE = ("galore", "fira", "frugal")
"""Methods that look at a matrix as a whole, and so cannot work on a shard of it."""
DENSE = ("muon", *WHOLE)
"""Methods for dense matrices, of which SLTrain leaves none."""


class OptimizerKeys(Strict):
    """The part of the ``train`` section that this module is about."""

    optimizer: Literal["adamw", "muon", "galore", "fira", "frugal", "spam"] = "adamw"
    """muon, galore, fira and frugal update the hidden matrices and leave the rest to AdamW."""
    muon: MuonConfig | None = None
    galore: GaLoreConfig | None = None
    fira: FiraConfig | None = None
    frugal: FrugalConfig | None = None
    spam: SpamConfig | None = None
    """Options, of the chosen optimizer only."""
    sltrain: SLTrainConfig | None = None
    """Train the hidden matrices as low rank plus sparse; null: as they are."""
    groups: list[GroupRule] = Field(default_factory=list)
    """Rules for parameters by name, of which the first that matches holds."""
    cooldown_steps: Count | None = None
    """Updates over which the schedule infinite falls from ``lr`` to its constant; that schedule only."""
    constant_lr_ratio: Part | None = None
    """The constant of the schedule infinite, as a share of ``lr``; that schedule only."""

    @model_validator(mode="before")
    @classmethod
    def _the_chosen_has_options(cls, data: Any) -> Any:
        """So that the record of a run has them all."""
        if isinstance(data, Mapping) and data.get("optimizer") in OPTIONS and data.get(data["optimizer"]) is None:
            return {**data, data["optimizer"]: {}}
        return data


def check(settings: "TrainConfig") -> None:
    """Whether the keys of :class:`OptimizerKeys` fit the rest of the section.

    Raises:
        ValueError: naming the key, what it was and what it must be.
    """
    chosen = settings.optimizer
    for name in OPTIONS:
        if name != chosen and getattr(settings, name) is not None:
            was = getattr(settings, name).model_dump()
            raise ValueError(f"train.{name} was {was}; it must be null unless train.optimizer is {name}")
    if chosen in WHOLE and settings.parallel == "fsdp":
        raise ValueError(
            f"train.optimizer was {chosen!r} with train.parallel 'fsdp'; it must be adamw, muon or spam there, or "
            "train.parallel none or ddp: its subspace is one of whole matrices, which fsdp cuts into shards"
        )
    if settings.sltrain is not None and chosen in DENSE:
        raise ValueError(f"train.optimizer was {chosen!r}; it must be adamw or spam with train.sltrain")
    if settings.sltrain is not None and settings.init is not None:
        raise ValueError(
            f"train.sltrain was given with train.init {settings.init!r}; one must be null: dense weights are no sum of "
            "a low rank and a sparse matrix"
        )
    _check_schedule(settings)


def _check_schedule(settings: "TrainConfig") -> None:
    used = {"constant": (), "cosine": ("min_lr_ratio",)}.get(settings.schedule, ("min_lr_ratio", "decay_fraction"))
    for key in ("min_lr_ratio", "decay_fraction"):
        value, default = getattr(settings, key), type(settings).model_fields[key].default
        if key not in used and value != default:
            must = f"it must be left at {default} with train.schedule {settings.schedule}, which does not use it"
            raise ValueError(f"train.{key} was {value}; {must}")
    infinite = settings.schedule == "infinite"
    for key in ("cooldown_steps", "constant_lr_ratio"):
        value = getattr(settings, key)
        if infinite != (value is not None):
            must = "be given with" if infinite else "be null without"
            raise ValueError(f"train.{key} was {value}; it must {must} train.schedule infinite")
    if settings.constant_lr_ratio is None or settings.cooldown_steps is None:
        return
    if not 0 < settings.min_lr_ratio <= settings.constant_lr_ratio:
        raise ValueError(
            f"train.min_lr_ratio was {settings.min_lr_ratio}; with train.schedule infinite it must be more than 0 and "
            f"at most train.constant_lr_ratio = {settings.constant_lr_ratio}"
        )
    anneal = round(settings.decay_fraction * settings.steps)
    if settings.warmup_steps + settings.cooldown_steps + anneal > settings.steps:
        raise ValueError(
            f"train.cooldown_steps was {settings.cooldown_steps}; with train.warmup_steps = {settings.warmup_steps} "
            f"and the {anneal} updates of train.decay_fraction it must be at most train.steps = {settings.steps} in all"
        )
