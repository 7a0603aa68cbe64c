"""Ablations: arms × settings × seeds, each a training run of its own: ``python -m palimpsest.eval.ablate FILE``.

A file (``configs/ablations/``) says what is compared::

    name: mom_mqar
    base: tiny/mom_gated_delta     # a config; or leave it out and give everything in `set`
    set: {train.steps: 2000}       # for all runs, by dotted key
    arms:                          # what is compared: further keys for each
      mixture: {model.mixer.memories: 4}
      one memory: {model.mixer.memories: 1, model.mixer.top_k: 1}
    grid: {train.lr: [1.0e-3, 3.0e-3]}
    seeds: [0, 1, 2]
    select: validation_accuracy    # the grid's best setting of an arm has the best mean of this, over the seeds
    baseline: one memory           # with which the others are compared, paired by seed

Every run has a folder named by its config's hash, under ``runs/ablations/<name>``: the same command again goes on where
it was stopped, and skips what is done. A run that fails is started once more, and then named. Settings are chosen on
validation; what is reported is the test. Results: ``results.json``, ``runs.csv``, ``table.md`` and ``figure.png``.
"""

import argparse
import hashlib
import itertools
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ..configs import find_config
from ..models import load
from ..models.config import ConfigError, Strict, apply_overrides, load_yaml, parse_override, validate
from ..train import RunConfig, read_config, read_metrics, train
from ..train.examples import accuracy, open_task
from . import ablation_report, record
from .harness import pick_device, reported
from .sweep import Job, sweep

logger = logging.getLogger("palimpsest.eval")

LARGEST = ("validation_accuracy",)  # all other measures are the better the smaller


class Ablation(Strict):
    """An ablation's file; see the module."""

    name: str
    about: str = ""
    base: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    arms: dict[str, dict[str, Any]]
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2])
    select: str = "validation_loss"
    baseline: str | None = None


@dataclass(frozen=True)
class Planned:
    """One run of an ablation."""

    arm: str
    settings: dict[str, Any]
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Where it trains, named by what it trains."""
        return self.config.folder


def read_ablation(source: str | Path, overrides: dict[str, Any] | None = None) -> Ablation:
    """The ablation in a YAML file, with some of its keys changed.

    Raises:
        ConfigError: for a faulty key, or a baseline that is no arm.
    """
    content = apply_overrides(load_yaml(find_config(source)), overrides or {})
    content.setdefault("name", Path(source).stem)
    found = validate(Ablation, content)
    if found.baseline is not None and found.baseline not in found.arms:
        raise ConfigError(f"baseline was {found.baseline!r}; it must be one of the arms {list(found.arms)}")
    for key in ("arms", "seeds"):
        if not getattr(found, key):
            raise ConfigError(f"{key} was empty; an ablation needs at least one")
    return found


def plan(ablation: Ablation, out: Path) -> list[Planned]:
    """All runs, in the order of arms, settings, seeds.

    Raises:
        ConfigError: for a config that is not valid; names the arm.
    """
    base = {} if ablation.base is None else load_yaml(find_config(ablation.base))
    runs = []
    for arm, changes in ablation.arms.items():
        for values in itertools.product(*ablation.grid.values()):
            settings = dict(zip(ablation.grid, values, strict=True))
            for seed in ablation.seeds:
                try:
                    content = apply_overrides(base, {**ablation.set, **changes, **settings, "seed": seed})
                    content["name"] = ablation.name
                    config = read_config(content)
                except ConfigError as error:
                    raise ConfigError(f"arm {arm!r}: {error}") from None
                mark = hashlib.sha256(json.dumps(config.plain(), sort_keys=True).encode()).hexdigest()[:12]
                config = read_config(apply_overrides(config.plain(), {"train.out": str(out / mark)}))
                runs.append(Planned(arm, settings, seed, config))
    return runs


def measure(config: RunConfig) -> dict[str, Any]:
    """Train a run, or go on with it, and measure it: the content of its ``result.json``."""
    began = time.perf_counter()
    summary = train(config)
    if summary.status != "complete":
        raise KeyboardInterrupt
    model = load(config.folder, pick_device(config.train.device)).eval().requires_grad_(False)
    last: dict[str, Any] = {}
    for line in read_metrics(config.folder):
        last |= {key: value for key, value in line.items() if key.startswith("validation")}
    tests: dict[str, float] = {}
    if config.data.task is not None:
        task = open_task(config.data.task, config.data.options)
        tests = {group.name: accuracy(model, group) for group in task.test}
    device = next(model.parameters()).device
    tokens = torch.zeros(1, config.train.seq_len, dtype=torch.int64, device=device)
    head = 6 * config.model.dim * config.model.vocab_size
    about = record.provenance(device, time.perf_counter() - began)
    del about["command"]  # of one process of the pool
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": model.flops_per_token(config.train.seq_len) - head,
        "state_bytes": model(tokens).state.bytes,
        "loss": summary.loss,
        **last,
        "test": tests,
        **about,
    }


def one(path: Path) -> None:
    """A run of a sweep, in a process of its own: from ``<folder>.yaml`` to ``<folder>/result.json``."""
    config = read_config(path)
    record.write_json(config.folder / "result.json", measure(config))


def results(runs: Sequence[Planned]) -> Iterator[dict[str, Any]]:
    """A row for every run that is done."""
    for run in runs:
        path = run.folder / "result.json"
        if path.exists():
            done = json.loads(path.read_text(encoding="utf-8"))
            yield {"arm": run.arm, "settings": run.settings, "seed": run.seed, "folder": run.folder.name, **done}


def job(run: Planned) -> Job:
    """What :func:`~.sweep.sweep` starts for a run."""
    path = run.folder.with_suffix(".yaml")
    record.write_text(path, run.config.to_yaml())
    label = ", ".join([run.arm, *(f"{key} {value}" for key, value in run.settings.items()), f"seed {run.seed}"])
    command = [sys.executable, "-m", "palimpsest.eval.ablate", "--one", str(path)]
    return Job(label, command, run.folder / "result.json", run.folder.with_suffix(".log"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet, then write and print the results; 0 when all is done, 1 when a run failed."""
    parser = argparse.ArgumentParser("palimpsest-ablate", description="Compare arms × settings × seeds.")
    parser.add_argument("file", nargs="?", help="a YAML file, or a name inside configs, like ablations/mom_mqar")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="like seeds=[0] set.train.steps=100")
    parser.add_argument("--out", type=Path, help="default: runs/ablations/<name>")
    parser.add_argument("--jobs", type=int, default=record.cores(), help="runs at a time (default: the cores)")
    parser.add_argument("--report", action="store_true", help="train nothing: report what is done")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    with reported() as outcome:
        if args.one is not None:
            one(args.one)
            return outcome.code
        if args.file is None or args.jobs < 1:
            raise ValueError(f"file was {args.file} and --jobs {args.jobs}; a file and at least one job are needed")
        ablation = read_ablation(args.file, dict(parse_override(text) for text in args.overrides))
        out = args.out or Path("runs", "ablations", ablation.name)
        runs = plan(ablation, out)
        try:
            failed = [] if args.report else sweep([job(run) for run in runs], args.jobs)
        except KeyboardInterrupt:
            return 130
        rows = list(results(runs))
        if rows:
            summary = ablation_report.summarise(rows, ablation.select, ablation.select in LARGEST, ablation.baseline)
            content = {"ablation": ablation.model_dump(mode="json"), "summary": summary, "runs": rows}
            content["command"] = shlex.join(["python", "-m", "palimpsest.eval.ablate", *(argv or sys.argv[1:])])
            print(ablation_report.write(out, content))
        for label in failed:
            print(f"failed: {label}", file=sys.stderr)
        outcome.code = 1 if failed else 0
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())
