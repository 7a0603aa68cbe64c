"""From a config to what the loop works on: the run folder, the corpus, the model and its optimizer, the state."""

import ctypes
import fcntl
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import MemoryLM, ModelConfig, build
from ..models.config import load_yaml
from . import meta, optim, parallel, recompute, sltrain
from .checkpoint import Checkpointer, ConfigMismatch, differences
from .config import FREE, ConfigError, RunConfig, read_config
from .data import Corpus, prepare
from .examples import ExampleSplit, TaskCorpus
from .float8 import use_float8
from .parallel import World
from .spikes import heeds_found_inf
from .split import Split
from .start import freeze_backbone, start_from

logger = logging.getLogger("palimpsest.train")


def complete_model(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A ``model`` section with every key there is today; one that is no longer valid, as it is."""
    try:
        return ModelConfig.model_validate(section).model_dump(mode="json")
    except ValueError:
        return section  # what differs will be told


@contextmanager
def hold(folder: Path, world: World) -> Iterator[None]:
    """Keep a second run out of a run folder while this one writes there: a lock on the folder itself.

    Raises:
        ConfigError: in every process, when another run holds it, or when nothing can be written there.
    """
    handle, problem = -1, None
    if world.first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            probe = folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except BlockingIOError:
            problem = "where another run is at work; wait for it or choose another"
        except OSError as error:
            problem = f"where nothing can be written ({error.strerror}); it must be a folder that can be written to"
    try:
        if (problem := parallel.broadcast(problem)) is not None:
            raise ConfigError(f"train.out was {folder}, {problem}")
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def claim(folder: Path, config: RunConfig, world: World) -> None:
    """Write config.yaml into a new run folder, or make sure that the one there means the same run.

    Keys of ``FREE``, ``eval`` and ``train.faults`` may change between two starts; the file then follows.
    """
    path = folder / "config.yaml"
    exists = parallel.broadcast(path.exists())
    if exists:
        if config.train.resume == "never":
            raise ConfigError(f"train.resume was 'never', but {folder} holds a run; choose another train.out")
        lines = differences(read_config(load_yaml(path)).plain(), config.plain())
        fixed = [line for line in lines if not _is_free(line.split(":")[0])]
        if fixed:
            raise ConfigMismatch(
                f"{folder} holds a run of another config; choose another train.out or the same config. "
                f"Differing, there -> here: {'; '.join(fixed)}"
            )
        if lines:
            logger.info("%s goes on with other settings: %s", folder, "; ".join(lines))
    parallel.broadcast(None)  # all have compared before the first one writes
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / ".config.yaml"
        beside.write_text(config.to_yaml(), encoding="utf-8")
        beside.replace(path)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, on a CPU.

    By default it hands large blocks back to the system, which gives them again page by page, zeroed, at the
    price of a page fault each. Elsewhere (another C library, another system) nothing is done.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        logger.info("freed memory is kept for the next step (glibc mallopt)")


def _is_free(key: str) -> bool:
    return key in FREE or key.startswith(("eval.", "train.faults."))


def origin(config: RunConfig) -> Path | None:
    """The checkpoint that ``train.resume`` names, where a run folder that has none of its own starts from."""
    given = config.train.resume
    if given in ("auto", "never"):
        return None
    path = Path(given)
    if not path.is_dir():
        raise ConfigError(f"train.resume was {given!r}; it must be auto, never, or the folder of a checkpoint or run")
    if (path / "checkpoints").is_dir():
        newest = Checkpointer(path / "checkpoints").latest_valid()
        if newest is None:
            raise ConfigError(f"train.resume was {given!r}; that run has no sound checkpoint")
        return newest
    return path


def _open(config: RunConfig, world: World) -> Corpus | TaskCorpus:
    if config.data.task is not None:
        return TaskCorpus(config.data.task, config.data.options)
    corpus = prepare(config.data) if world.first else None
    parallel.broadcast(None)
    return corpus or prepare(config.data, verify=False)


def corpus(config: RunConfig, world: World) -> Corpus | TaskCorpus:
    """The tokenised corpus: the first process makes or verifies it, the others open what it left; or the task."""
    corpus = _open(config, world)
    vocabulary = corpus.tokenizer.vocab_size
    if config.model.vocab_size < vocabulary:
        raise ConfigError(
            f"model.vocab_size was {config.model.vocab_size}; it must be at least {vocabulary}, "
            f"the number of ids of data.{'task' if config.data.task else 'tokenizer'} "
            f"{config.data.task or config.data.tokenizer!r}"
        )
    corpus.split("train").windows(config.train.seq_len)  # refuses a corpus that is too short
    return corpus


def validation(corpus: Corpus | TaskCorpus, config: RunConfig) -> Split | ExampleSplit | None:
    """The held-out split when it is wanted, long enough for one window."""
    if not config.train.validate_every or (config.data.task is None and not config.data.validation_fraction):
        logger.info("no validation: train.validate_every or data.validation_fraction is 0")
        return None
    split = corpus.split("validation")
    split.windows(config.train.seq_len)
    return split


def model(config: RunConfig, world: World) -> tuple[MemoryLM, nn.Module, torch.optim.Optimizer]:
    """(the model, the model as the loop calls it, the optimizer); the seed's weights are the same in every process."""
    settings = config.train

    def begin(core: MemoryLM) -> None:
        if settings.init is not None:
            start_from(core, settings.init, quiet=not world.first)

    late = settings.meta_init and world.size > 1
    if late:
        core = meta.on_meta(config)
    else:
        torch.manual_seed(config.seed)
        core = build(config.plain()).to(world.device)
        begin(core)
    if settings.freeze_backbone:
        freeze_backbone(core)
    if settings.sltrain is not None:
        sltrain.apply(core, optim.hidden_matrices(core), settings.sltrain, config.seed)
    if settings.precision == "fp8":
        use_float8(core.blocks, world.device)
    if settings.activation_checkpointing and settings.sequence_parallel == 1:  # else: sequence/mixers.py
        rows, gpu = settings.micro_batches(world.size)[1], world.device.type == "cuda"
        parallel.checkpoint_blocks(core.blocks, recompute.chosen(config, len(core.blocks), rows, gpu=gpu))
    if settings.compile:
        for block in core.blocks:
            block.compile()
    model: nn.Module = core  # of ddp with divided sequences: copies alone, for they sum up gradients themselves
    if settings.sequence_parallel == 1 or settings.parallel != "ddp":
        model = parallel.distribute(core, core.blocks, settings.parallel, world, settings.fsdp_shard)
    if late:
        meta.fill(model, config, world, begin)
    optimizer = optim.make(model, settings, config.seed)
    if not heeds_found_inf(optimizer):
        name = type(optimizer).__name__
        logger.info("%s knows no found_inf: the host reads each step's verdict before the update", name)
    return core, model, optimizer


def restore(
    saver: Checkpointer,
    path: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus | TaskCorpus,
) -> dict[str, Any]:
    """Load a checkpoint, if there is one. Returns its ``extra``, with its ``step``; {"step": 0} for a fresh start."""
    if path is None:
        return {"step": 0}
    extra = saver.restore(path, model, optimizer)
    if extra.get("corpus") != corpus.checksum:
        logger.warning("the corpus is not the one of %s: the run goes on, but not as it would have", path)
    logger.info("going on after step %d, from %s", extra["step"], path)
    return extra
