"""Opens a trained run, runs tasks on it, and writes eval.json, eval.md and eval.png."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import load
from ..train import TrainingDiverged
from ..train.checkpoint import CheckpointError
from ..train.config import EvalConfig, RunConfig, read_config
from ..train.data import prepare
from ..train.tokenizer import Tokenizer, load_tokenizer
from . import choose, plots, record, report
from .tasks import TASKS, perplexity, retention

logger = logging.getLogger("palimpsest.eval")

SCHEMA = 1


@dataclass
class Run:
    """A run folder opened for evaluation: its whole configuration, its trained model in eval mode, and ``text``, the
    tokenizer, None where it was trained on a task, whose ids are no text."""

    folder: Path
    config: RunConfig
    model: Any
    text: Tokenizer | None
    device: torch.device

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into the model's tokens.

        Raises:
            ValueError: for a run that was trained on a task.
        """
        if self.text is None:
            raise ValueError(
                f"{self.folder} was trained on the task {self.config.data.task!r}, whose tokens are no text; where "
                "they are, name the tokenizer with --tokenizer"
            )
        return self.text


@dataclass
class Outcome:
    """The exit code of a command."""

    code: int = 0


@contextlib.contextmanager
def reported() -> Iterator[Outcome]:
    """For a command's ``main``: log lines to standard error, and bad input as one line there and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    outcome = Outcome()
    try:
        yield outcome
    except (ValueError, FileNotFoundError, TrainingDiverged, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        outcome.code = 2
    except BrokenPipeError:
        outcome.code = 141  # what a shell reports for a process that a closed pipe ended
        sys.stderr.close()


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU when there is one.

    Raises:
        ValueError: for cuda on a machine without.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device was 'cuda'; it must be 'cpu' or 'auto', this machine has no usable GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def open_run(folder: str | Path, device: torch.device, tokenizer: str | None = None) -> Run:
    """Open a run folder as the training command leaves it; ``tokenizer`` in the place of its own.

    Raises:
        FileNotFoundError: for a missing folder or one that lacks its config or weights, naming what is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        beside = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
        there = f"; {folder.parent} has {', '.join(beside)}" if beside else ""
        raise FileNotFoundError(f"run folder {str(folder)!r} not found{there}")
    for name, moment in (("config.yaml", "begins"), ("model.safetensors", "ends"), ("config.json", "ends")):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"run folder {str(folder)!r} has no {name}, which is written when training {moment}: "
                "python -m palimpsest.train CONFIG"
            )
    config = read_config(folder / "config.yaml")
    model = load(folder, device).eval().requires_grad_(False)
    chosen = tokenizer or (config.data.tokenizer if config.data.task is None else None)
    return Run(folder, config, model, None if chosen is None else load_tokenizer(chosen), device)


def held_out(run: Run, length: int, budget: int) -> tuple[Tensor, Any]:
    """Rows of held-out text, int64 [N, length + 1], and the split that they come from.

    As many rows as fit ``budget`` tokens, at least one, evenly spaced over the validation split and not overlapping.
    When the split is shorter than one row, there is one row of all there is, and a log line says so.

    Raises:
        ValueError: when the split does not reach beyond one training context.
    """
    split = prepare(run.config.data).split("validation")
    have, context = split.tokens, run.config.train.seq_len
    if have < context + 1:
        raise ValueError(
            f"held-out text was {have:,} tokens; it must be longer than the training context of {context:,} tokens "
            "(a longer corpus, or a greater data.validation_fraction)"
        )
    if have < length + 1:
        logger.info("held-out text has %s tokens: positions end there and not at %s", f"{have:,}", f"{length:,}")
        length = have - 1
    count = max(1, min(budget // length, have // (length + 1)))
    stride = have // count
    rows = [torch.from_numpy(split.read(i * stride, length + 1)) for i in range(count)]
    return torch.stack(rows), split


@dataclass(frozen=True)
class Plan:
    """What to evaluate. ``factor``: how many training contexts long; ``tokens``: of held-out text, about; ``options``:
    of tasks by name, what they take instead of what follows from the other fields."""

    tasks: tuple[str, ...] = TASKS
    factor: int = 8
    tokens: int = 131_072
    batch: int = 8
    examples: int = 8
    seed: int = 0
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, section: EvalConfig, **changed: Any) -> "Plan":
        """What a run's ``eval`` section asks for, with some fields changed (None: not)."""
        given = {name: value for name, value in changed.items() if value is not None}
        return cls(**({"factor": section.max_length_factor, "tokens": section.tokens} | given))

    def __post_init__(self) -> None:
        for name in ("factor", "tokens", "batch", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} was {getattr(self, name)}; it must be at least 1")


def settings_of(run: Run, plan: Plan, name: str) -> Any:
    """The ``Settings`` of a text task: what follows from the plan and the training context, and the plan's options."""
    context = run.config.train.seq_len
    told = {
        "context": context,
        "chunk": context,
        "lengths": tuple(context * 2**i for i in range(plan.factor.bit_length())),
        "gaps": retention.doubling(context, plan.factor),
        "passage": min(context, 64),
        **{key: getattr(plan, key) for key in ("factor", "batch", "examples", "seed")},
    }
    return choose.settings(name, told, plan.options.get(name, {}))


def text_task(run: Run, plan: Plan, name: str) -> dict[str, Any]:
    """The result of a task that asks about text.

    Raises:
        ValueError: for a run that has no tokenizer, or what the task refuses.
    """
    asked, have, need = settings_of(run, plan, name), run.model.config.vocab_size, run.tokenizer.vocab_size
    if have < need:
        raise ValueError(f"task {name!r} needs a vocabulary of {need}, that of the tokenizer; the model's has {have}")
    if name in ("perplexity", "retention"):
        rows, split = held_out(run, asked.length, plan.tokens)
        if name == "retention":
            return retention.run(run.model, rows[:, :-1], asked)
        return perplexity.run(run.model, rows, split.bytes_of, asked)
    return choose.TEXT[name].run(run.model, run.tokenizer, asked)


def evaluate(run: Run, plan: Plan) -> dict[str, Any]:
    """The record of all tasks of ``plan`` on a run: eval.json's content.

    Raises:
        ValueError: for a task that the run's model cannot be asked, or options that a task does not take.
    """
    began = time.perf_counter()
    results: dict[str, Any] = {}
    for name in plan.tasks:
        since = time.perf_counter()
        if name in choose.TEXT:
            results[name] = text_task(run, plan, name)
        else:
            data = run.config.data
            trained_on = data.options if data.task == name else {}
            results[name] = choose.examples(run.model, name, trained_on, plan.options.get(name, {}))
        logger.info("%s: %.1f s", name, time.perf_counter() - since)
    return {
        "schema": SCHEMA,
        "run": str(run.folder),
        "model": {
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "context": run.config.train.seq_len,
        },
        "tasks": results,
        **record.provenance(run.device, time.perf_counter() - began),
    }


def write(folder: Path, content: dict[str, Any]) -> list[Path]:
    """Write eval.json, eval.md and, with matplotlib, eval.png into ``folder``; the paths written."""
    record.write_json(folder / "eval.json", content)
    record.write_text(folder / "eval.md", report.evaluation(content))
    drawn = plots.evaluation(folder / "eval.png", folder.name, content["tasks"])
    return [folder / "eval.json", folder / "eval.md"] + ([folder / "eval.png"] if drawn else [])
