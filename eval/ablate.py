"""Ablations: arms × settings × seeds, each a training run of its own: ``python -m palimpsest.eval.ablate FILE``.

A file (``configs/ablations/``) says what is compared::

    name: mom_mqar
    base: tiny/mom_gated_delta     # a config; or leave it out and give everything in `set`
    set: {train.steps: 2000}       # for all runs, by dotted key
    arms:                          # what is compared: further keys for each
      mixture: {model.mixer.memories: 4}
      one memory: {model.mixer.memories: 1, model.mixer.top_k: 1}
      attention: {base: tiny/transformer}       # an arm may have a base of its own
    vary: {}                       # lists by key: each arm once with every combination, like "mixture, heads 2"
    match: {by: parameters, to: mixture}        # widths are solved for, so that sizes agree: see palimpsest.eval.match
    grid: {train.lr: [1.0e-3, 3.0e-3]}
    seeds: [0, 1, 2]
    select: validation_accuracy    # the grid's best setting of an arm has the best mean of this, over the seeds
    baseline: one memory           # with which the others are compared, paired by seed
    stream: null                   # a number: the test is read so many tokens at a time, with a carried state
    axes: null                     # what the numbers in the names of test groups are, like [dancers, pause]

Every run has a folder named by its config's hash, under ``runs/ablations/<name>``: the same command again goes on where
it was stopped, and skips what is done. ``--done results.json`` counts runs of another machine or day as done. A run
that fails is started once more, and then named. Settings are chosen on validation; what is reported is the test.
Results: ``results.json``, ``runs.csv``, ``table.md``, figures, and ``report.html``, which holds it all.
"""

import argparse
import hashlib
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ..configs import find_config
from ..models.config import ConfigError, Strict, apply_overrides, load_config, load_yaml, parse_override, validate
from ..models.strict import Count
from ..train.config import RunConfig, read_config
from . import record
from .match import Match, Matched, size, solve
from .sweep import Job, end_with_parent, sweep

LARGEST = ("validation_accuracy",)  # all other measures are the better the smaller
OWN = ("base", "match")  # keys of an arm that are none of a run's configuration


class Ablation(Strict):
    """An ablation's file; see the module."""

    name: str
    about: str = ""
    base: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    vary: dict[str, list[Any]] = Field(default_factory=dict)
    match: Match | None = None
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2])
    select: str = "validation_loss"
    baseline: str | None = None
    stream: Count | None = None
    axes: tuple[str, str] | None = None

    def match_of(self, arm: str) -> Match | None:
        """What is made equal of an arm: its own keys over those for all arms; None: nothing, as for the arm that the
        others are matched to."""
        own = self.arms[arm].get("match", {})
        shared = {} if self.match is None else self.match.model_dump(exclude_unset=True)
        if own is None or not {**shared, **own}:
            return None
        found = validate(Match, {**shared, **own}, "match")
        return None if found.to == arm else found


@dataclass(frozen=True)
class Planned:
    """One run of an ablation."""

    arm: str
    settings: dict[str, Any]
    seed: int
    config: RunConfig
    match: Matched | None = None

    @property
    def folder(self) -> Path:
        """Where it trains, named by what it trains."""
        return self.config.folder

    @property
    def label(self) -> str:
        """Its name for a person."""
        return ", ".join([self.arm, *(f"{key} {value}" for key, value in self.settings.items()), f"seed {self.seed}"])


def read_ablation(source: str | Path, overrides: dict[str, Any] | None = None) -> Ablation:
    """The ablation in a YAML file, with some of its keys changed.

    Raises:
        ConfigError: for a faulty key, a baseline that is no arm, or an arm that is matched to none.
    """
    content = apply_overrides(load_yaml(find_config(source)), overrides or {})
    content.setdefault("name", Path(source).stem)
    found = varied(validate(Ablation, content))
    if found.baseline is not None and found.baseline not in found.arms:
        raise ConfigError(f"baseline was {found.baseline!r}; it must be one of the arms {list(found.arms)}")
    for key in ("arms", "seeds"):
        if not getattr(found, key):
            raise ConfigError(f"{key} was empty; an ablation needs at least one")
    for arm, given in found.arms.items():
        if not isinstance(given.get("match", {}), Mapping | None):
            raise ConfigError(f"arm {arm!r}: match was {given['match']!r}; it must be a section, or null")
        ask = found.match_of(arm)
        if ask is not None and isinstance(ask.to, str):
            if ask.to not in found.arms:
                raise ConfigError(f"arm {arm!r}: match.to was {ask.to!r}; it must be a number or one of the arms")
            if found.match_of(ask.to) is not None:
                raise ConfigError(f"arm {arm!r}: match.to was {ask.to!r}, which is matched itself; it must not be")
    return found


def varied(ablation: Ablation) -> Ablation:
    """Each arm once with every combination of ``vary``, and named by it; without arms, the combinations alone."""
    if not ablation.vary:
        return ablation
    arms = {}
    for arm, changes in (ablation.arms or {"": {}}).items():
        for values in itertools.product(*ablation.vary.values()):
            chosen = dict(zip(ablation.vary, values, strict=True))
            told = [f"{key.split('.')[-1]} {value}" for key, value in chosen.items()]
            arms[", ".join([*([arm] if arm else []), *told])] = {**changes, **chosen}
    return ablation.model_copy(update={"arms": arms})


def _content(ablation: Ablation, arm: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run's config of an arm under some settings, without a seed, before its width is solved for."""
    changes = ablation.arms[arm]
    base = changes.get("base", ablation.base)
    own = {key: value for key, value in changes.items() if key not in OWN}
    content = {} if base is None else load_config(base)
    return {**apply_overrides(content, {**ablation.set, **own, **settings}), "name": ablation.name}


def _matched(ablation: Ablation, arm: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Matched | None]:
    """The config of an arm, its width solved for when it is to be."""
    content, ask = _content(ablation, arm, settings), ablation.match_of(arm)
    if ask is None:
        return content, None
    for part in (arm, ask.to) if isinstance(ask.to, str) else (arm,):
        read_config({**_content(ablation, part, settings), "seed": 0})  # a fault is named before anything is counted
    target = size(_content(ablation, ask.to, settings), ask.by) if isinstance(ask.to, str) else ask.to
    return solve(content, ask, target)


def plan(ablation: Ablation, out: Path) -> list[Planned]:
    """All runs, in the order of arms, settings, seeds.

    Raises:
        ConfigError: for a config that is not valid, or a size that cannot be matched; names the arm.
    """
    runs = []
    for arm in ablation.arms:
        for values in itertools.product(*ablation.grid.values()):
            settings = dict(zip(ablation.grid, values, strict=True))
            try:
                content, found = _matched(ablation, arm, settings)
                for seed in ablation.seeds:
                    config = read_config({**content, "seed": seed})
                    mark = hashlib.sha256(json.dumps(config.plain(), sort_keys=True).encode()).hexdigest()[:12]
                    config = read_config(apply_overrides(config.plain(), {"train.out": str(out / mark)}))
                    runs.append(Planned(arm, settings, seed, config, found))
            except ConfigError as error:
                raise ConfigError(f"arm {arm!r}: {error}") from None
    return runs


def matches(runs: Sequence[Planned]) -> list[str]:
    """The match that was reached, a line for every arm and width."""
    lines = [f"match: {run.arm}: {run.match}" for run in runs if run.match is not None]
    return list(dict.fromkeys(lines))


def _key(arm: str, settings: Mapping[str, Any], seed: int) -> str:
    return json.dumps([arm, dict(settings), seed], sort_keys=True)


class Rows(dict[str, dict[str, Any]]):
    """Results of runs that were done elsewhere."""

    def of(self, run: Planned) -> dict[str, Any] | None:
        """The row of a run."""
        return self.get(_key(run.arm, run.settings, run.seed))


def made_as(ablation: Ablation, arm: str) -> tuple[Any, ...]:
    """What decides what a run of an arm trains and how it is tested, but for its settings and seed."""
    ask = ablation.match_of(arm)
    target = None if ask is None or not isinstance(ask.to, str) else made_as(ablation, ask.to)
    own = {key: value for key, value in ablation.arms[arm].items() if key not in OWN}
    base = ablation.arms[arm].get("base", ablation.base)
    return base, ablation.set, own, None if ask is None else ask.model_dump(exclude={"to"}), target, ablation.stream


def done_elsewhere(paths: Sequence[Path], ablation: Ablation, runs: Sequence[Planned]) -> Rows:
    """Rows of other results.json for runs planned here, by (arm, settings, seed); of two for one run the first.

    A row counts when its arm was made as here (base, set, its keys, match, stream), whatever else its ablation held.

    Raises:
        ConfigError: for a file that is no ablation's results, or one without any run that is planned here.
    """
    wanted, found = {_key(run.arm, run.settings, run.seed) for run in runs}, Rows()
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            other, rows = validate(Ablation, content["ablation"]), content["runs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--done was {path}; it must be an ablation's results.json: {error}") from None
        alike = {arm for arm in ablation.arms if arm in other.arms and made_as(other, arm) == made_as(ablation, arm)}
        given = {_key(row["arm"], row["settings"], row["seed"]): row for row in rows if row["arm"] in alike}
        some = {key: row for key, row in given.items() if key in wanted}
        if not some:
            raise ConfigError(f"--done was {path}; none of its {len(rows)} runs is one of the {len(runs)} planned here")
        print(f"{path}: {len(some)} of the {len(runs)} runs are done")
        found = Rows({**some, **found})
    return found


def results(runs: Sequence[Planned], stream: int | None = None, done: Rows | None = None) -> Iterator[dict[str, Any]]:
    """A row for every run that is done, here or elsewhere."""
    for run in runs:
        path = record.result_of(run.folder, stream)
        other = None if done is None else done.of(run)
        if other is not None:
            yield other
        elif path.exists():
            own = json.loads(path.read_text(encoding="utf-8"))
            matched = {} if run.match is None else {"match": run.match.plain()}
            about = {"arm": run.arm, "settings": run.settings, "seed": run.seed, "folder": run.folder.name}
            yield {**about, **matched, **own}


def job(run: Planned, stream: int | None) -> Job:
    """What :func:`~.sweep.sweep` starts for a run."""
    path = run.folder.with_suffix(".yaml")
    record.write_text(path, run.config.to_yaml())
    command = [sys.executable, "-m", "palimpsest.eval.ablate", "--one", str(path), "--with-parent"]
    command += [] if stream is None else ["--stream", str(stream)]
    log, metrics = run.folder.with_suffix(".log"), run.folder / "metrics.jsonl"
    return Job(run.label, command, record.result_of(run.folder, stream), log, metrics, run.config.train.steps)


def gpus(runs: Sequence[Planned]) -> list[str]:
    """The GPUs that runs can be spread over, as CUDA_VISIBLE_DEVICES names them; none when every run asks for the
    CPU."""
    if all(run.config.train.device == "cpu" for run in runs):
        return []
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    number = torch.cuda.device_count()
    return visible[:number] or [str(i) for i in range(number)]


def report(
    ablation: Ablation, runs: Sequence[Planned], out: Path, command: Sequence[str], done: Rows | None = None
) -> str | None:
    """Write what is done so far; its table, None when nothing is."""
    from . import ablation_report  # with what only figures need: a run's process would load it in vain

    rows = list(results(runs, ablation.stream, done))
    if not rows:
        return None
    summary = ablation_report.summarise(rows, ablation.select, ablation.select in LARGEST, ablation.baseline)
    content = {"ablation": ablation.model_dump(mode="json"), "summary": summary, "runs": rows}
    content["command"] = shlex.join(["python", "-m", "palimpsest.eval.ablate", *command])
    return ablation_report.write(out, content, {run.folder.name: run.config for run in runs})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("palimpsest-ablate", description="Compare arms × settings × seeds.")
    made.add_argument("file", nargs="?", help="a YAML file, or a name inside configs, like ablations/mom_mqar")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="like seeds=[0] set.train.steps=100")
    made.add_argument("--out", type=Path, help="default: runs/ablations/<name>")
    made.add_argument("--jobs", type=int, help="runs at a time (default: the GPUs, or without any the cores)")
    made.add_argument("--done", type=Path, action="append", default=[], help="a results.json whose runs count as done")
    made.add_argument("--report", action="store_true", help="train nothing: report what is done")
    made.add_argument("--plan", action="store_true", help="train nothing: say what there is to do, and every match")
    made.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--stream", type=int, help=argparse.SUPPRESS)
    made.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)
    return made


def _compare(args: argparse.Namespace, command: Sequence[str]) -> int:
    if args.file is None or (args.jobs is not None and args.jobs < 1):
        raise ValueError(f"file was {args.file} and --jobs {args.jobs}; a file and at least one job are needed")
    ablation = read_ablation(args.file, dict(parse_override(text) for text in args.overrides))
    out = args.out or Path("runs", "ablations", ablation.name)
    runs = plan(ablation, out)
    print("".join(f"{line}\n" for line in matches(runs)), end="", flush=True)
    done = done_elsewhere(args.done, ablation, runs)
    here = [run for run in runs if done.of(run) is None]
    if args.plan:
        missing = [run for run in here if not record.result_of(run.folder, ablation.stream).exists()]
        print("".join(f"{run.folder}: {run.label}\n" for run in missing) + f"{len(missing)} of {len(runs)} runs to do")
        return 0
    failed: list[str] = []
    if not args.report:
        devices = gpus(here)
        at_once = args.jobs or len(devices) or record.cores()
        try:
            failed = sweep([job(run, ablation.stream) for run in here], at_once, devices=devices)
        except KeyboardInterrupt:
            return 130
    table = report(ablation, runs, out, command, done)
    if table is not None:
        print(table)
    for label in failed:
        print(f"failed: {label}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet, then write and print the results; 0 when all is done, 1 when a run failed."""
    args = parser().parse_intermixed_args(argv)
    if args.one is not None:
        if args.with_parent:
            end_with_parent()
        from . import ablation_run, harness

        with harness.reported() as outcome:
            ablation_run.one(args.one, args.stream)
        return outcome.code
    try:
        return _compare(args, sys.argv[1:] if argv is None else argv)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 141  # what a shell reports for a process that a closed pipe ended


if __name__ == "__main__":
    raise SystemExit(main())
