"""A run's whole configuration: one YAML file with the sections model, data, train and eval."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator
from typing_extensions import Self

from ..models.config import (
    ConfigError,
    Count,
    ModelConfig,
    Positive,
    Strict,
    apply_overrides,
    load_config,
    parse_override,
    validate,
)
from .data_config import DataConfig
from .optim_config import OptimizerKeys
from .optim_config import check as check_optimizer
from .spikes import FaultConfig

Share = Annotated[float, Field(ge=0, le=1)]
Natural = Annotated[int, Field(ge=0)]


class TrainConfig(OptimizerKeys):
    """The ``train`` section. Steps are optimizer updates, counted from 1."""

    out: str | None = None
    """The run folder; null: ``runs/<name>``."""
    steps: Count = 1000
    batch_size: Count = 16
    """Sequences per update, over all processes and micro batches."""
    micro_batch_size: Count | None = None
    """Sequences per forward pass in one process; null: the process's whole share of the batch."""
    seq_len: Count = 512
    """Tokens per sequence."""
    lr: Positive = 1e-3
    min_lr_ratio: Share = 0.1
    """Where cosine, wsd and infinite end, as a share of ``lr``."""
    warmup_steps: Natural = 100
    schedule: Literal["cosine", "wsd", "constant", "infinite"] = "cosine"
    decay_fraction: Share = 0.2
    """The share of the steps over which wsd decays, and infinite anneals."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    grad_clip: Positive | None = 1.0
    """The largest global gradient norm; null: no clipping."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """bf16: matrix products under autocast; parameters, gradients and optimizer state stay float32. fp8: besides, those
    of linear layers in float8, on GPUs that can and with torchao."""
    compile: bool = False
    """Compile each block with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    recompute_every: Count = 1
    """With activation_checkpointing: of every so many-th block only."""
    activation_budget: Positive | None = None
    """With activation_checkpointing: GiB that a micro batch's forward and backward may hold in one process beside
    parameters and gradients; the fewest blocks are recomputed that it takes. null: all of them, or as recompute_every
    says."""
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    fsdp_shard: Count | None = None
    """Processes that share one copy of the parameters; null: all. Fewer make a hybrid mesh of replicas."""
    sequence_parallel: Count = 1
    """Processes that share each sequence, every one a part of its tokens; see :mod:`.sequence`."""
    sequence_timeout: Positive = 600.0
    """Seconds that one of them waits for another's message before the run ends."""
    meta_init: bool = False
    """With fsdp: no device ever holds more of the fresh model than its shards. The weights are the same."""
    log_every: Count = 10
    diagnostics_every: Natural = 100
    """Steps between diagnostics of the memory layers; 0: none."""
    validate_every: Natural = 200
    """Steps between validations; 0: none."""
    validation_batches: Count = 8
    checkpoint_every: Natural = 200
    """Steps between checkpoints, apart from the one at the end; 0: only that one."""
    keep_last: Count = 2
    """How many checkpoints stay."""
    async_checkpoint: bool = False
    """Write a checkpoint in a thread, from a copy in main memory, while training goes on."""
    resume: str = "auto"
    """auto: from the run folder's newest sound checkpoint; never: only a new folder; else a checkpoint's path."""
    init: str | None = None
    """A finished run's folder, whose weights this one starts from where names and shapes agree; null: fresh ones."""
    freeze_backbone: bool = False
    """Train the memory over segments (``model.hmt``) alone."""
    max_bad_steps: Count = 5
    """Consecutive bad steps (see ``faults``) after which training stops."""
    faults: FaultConfig = FaultConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None
    """CPU threads of this process; null: torch's choice."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"train.warmup_steps was {self.warmup_steps}; it must be at most train.steps = {self.steps}"
            )
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            size = self.micro_batch_size
            raise ValueError(f"train.micro_batch_size was {size}; it must divide train.batch_size = {self.batch_size}")
        if max(self.betas) >= 1:
            raise ValueError(f"train.betas was {list(self.betas)}; both must be less than 1")
        if self.fsdp_shard is not None and self.parallel != "fsdp":
            raise ValueError(f"train.fsdp_shard was {self.fsdp_shard}; it must be null unless train.parallel is fsdp")
        if self.sequence_parallel > 1:
            if self.compile:
                raise ValueError("train.compile was true; it must be false with train.sequence_parallel")
            if self.recompute_every > 1:
                was = f"train.recompute_every was {self.recompute_every}"
                raise ValueError(f"{was}; it must be 1 with train.sequence_parallel, where all blocks are recomputed")
            if self.activation_budget is not None:
                was = f"train.activation_budget was {self.activation_budget}"
                raise ValueError(f"{was}; it must be null with train.sequence_parallel, where all are recomputed")
            if self.seq_len < self.sequence_parallel:
                size = self.sequence_parallel
                raise ValueError(
                    f"train.sequence_parallel was {size}; it must be at most train.seq_len = {self.seq_len}"
                )
        if self.meta_init and self.parallel != "fsdp":
            raise ValueError("train.meta_init was true; it must be false unless train.parallel is fsdp")
        if self.meta_init and self.sltrain is not None:
            raise ValueError("train.meta_init was true; it must be false with train.sltrain, which takes weights apart")
        if self.recompute_every > 1 and not self.activation_checkpointing:
            was = f"train.recompute_every was {self.recompute_every}"
            raise ValueError(f"{was}; it must be 1 unless train.activation_checkpointing is true")
        if self.activation_budget is not None:
            was = f"train.activation_budget was {self.activation_budget}"
            if not self.activation_checkpointing:
                raise ValueError(f"{was}; it must be null unless train.activation_checkpointing is true")
            if self.recompute_every > 1:
                raise ValueError(f"{was}; it must be null with train.recompute_every, which chooses blocks as well")
        check_optimizer(self)
        return self

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """(micro batches, sequences in each) of one process per update; those that share sequences count as one.

        Raises:
            ConfigError: when the batch or the processes do not divide evenly; names the keys.
        """
        size = self.sequence_parallel
        if processes % size:
            raise ConfigError(
                f"train.sequence_parallel was {size}; it must divide the number of processes, {processes}"
            )
        processes //= size
        if self.batch_size % processes:
            shared = f" that each hold {size} parts of a sequence" if size > 1 else ""
            raise ConfigError(
                f"train.batch_size was {self.batch_size}; it must be a multiple of the {processes} processes{shared}"
            )
        share = self.batch_size // processes
        size = self.micro_batch_size or share
        if share % size:
            raise ConfigError(
                f"train.micro_batch_size was {size}; it must divide train.batch_size / processes = "
                f"{self.batch_size} / {processes} = {share}"
            )
        return share // size, size


class EvalConfig(Strict):
    """The ``eval`` section: what ``palimpsest.eval`` measures on a finished run."""

    max_length_factor: Count = 8
    """Held-out loss by position, up to this many times the training length."""
    tokens: Count = 131_072
    """Held-out tokens read, about."""
    prompt: str = "def "
    """Where the run's sample text starts."""


class RunConfig(Strict):
    """The record of a run: everything needed to do it again."""

    name: Annotated[str, Field(min_length=1)]
    seed: Natural = 0
    """Fixes the initial weights and every batch."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _memory_is_used(self) -> Self:
        if self.model.hmt is not None and self.train.seq_len <= self.model.hmt.segment:
            was, segment = self.train.seq_len, self.model.hmt.segment
            raise ValueError(f"train.seq_len was {was}; it must be more than a segment, model.hmt.segment = {segment}")
        return self

    @model_validator(mode="after")
    def _sequences_are_divisible(self) -> Self:
        if self.train.sequence_parallel > 1:
            reason = "with train.sequence_parallel"
            if self.model.huggingface is not None:
                raise ValueError(
                    f"model.huggingface was a section; it must be null {reason}: its cache is that library's"
                )
            if self.model.hmt is not None and self.train.parallel == "fsdp":
                must = f"be ddp {reason} and model.hmt: parts pass through the backbone another number of times"
                raise ValueError(f"train.parallel was 'fsdp'; it must {must}")
            if self.model.hmt is not None and any(mixer.kind == "mixture" for mixer in self.model.mixer):
                raise ValueError(
                    f"model.hmt was a section; it must be null {reason} and a mixture: its router's losses"
                )
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.train.out or f"runs/{self.name}")

    def plain(self) -> dict[str, Any]:
        """Every key with its value, as JSON and YAML can hold them."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The text of a config file with every key resolved."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)


FREE = frozenset(
    {
        f"train.{key}"
        for key in ("out", "resume", "device", "threads", "compile", "activation_checkpointing", "parallel")
    }
    | {
        f"train.{key}"
        for key in (
            "fsdp_shard",
            "sequence_parallel",
            "micro_batch_size",
            "log_every",
            "diagnostics_every",
            "tensorboard",
        )
    }
    | {f"train.{key}" for key in ("validate_every", "validation_batches", "checkpoint_every", "keep_last")}
    | {f"train.{key}" for key in ("max_bad_steps", "async_checkpoint", "meta_init")}
    | {f"train.{key}" for key in ("recompute_every", "activation_budget")}
    | {"data.folder", "name"}
)
"""Keys that may change between starts of a run, with all of ``eval`` and ``train.faults``: they say how and where, and
what is done when something goes wrong, not what is learnt."""


def read_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The validated configuration in a YAML file (or a mapping), with ``{"train.lr": 1e-3}`` on top.

    A path that does not exist is looked for among the configs that come with the package.

    Raises:
        ConfigError: naming each faulty key, its place, what it was and what it must be.
        FileNotFoundError: when there is no such file.
    """
    content = source if isinstance(source, Mapping) else load_config(source)
    content = apply_overrides(content, overrides or {})
    if not isinstance(source, Mapping):
        content.setdefault("name", Path(source).stem)
    return validate(RunConfig, content)


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """``["train.lr=1e-3"]`` to ``{"train.lr": 0.001}``; of a key given twice the last stands."""
    return dict(parse_override(item) for item in items)
