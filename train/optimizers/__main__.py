"""What each optimizer keeps and learns: ``python -m palimpsest.train.optimizers CONFIG [key=value …]``.

Trains the config's model for a few updates with every optimizer, and with AdamW under SLTrain, from the same weights
on the same batches, and prints a table: the bytes of the optimizer's state, summed over its tensors, these by parameter
of the dense model, and the loss in the end, held-out where the config has a held-out split. With several ``--lr`` it is
the best of them. A few updates of a small model do not say which optimizer is better for a large one.

With ``--peak`` each arm is trained in a process of its own, and the most memory is told that it held, beyond what it
had before its model was made: parameters, gradients, state, activations, and all that an update takes for a moment.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...kernels.profile.measure import write
from .. import launch, parallel
from ..config import ConfigError, RunConfig, parse_overrides, read_config
from ..data import DataError
from ..optim_config import OPTIONS
from .measure import apart, measure, measure_alone

SLTRAIN = "sltrain"
NAMES = ("adamw", *OPTIONS, SLTRAIN)


def arms(source: str, updates: int, given: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, RunConfig]]:
    """A config for each name. Of what is given, options of an optimizer (``train.galore.rank``) go to its config alone.

    Raises:
        ConfigError: for a key or value that is not valid.
    """
    fixed = {"train.steps": updates, "train.warmup_steps": max(1, updates // 10), "train.checkpoint_every": 0}
    fixed |= {"train.validate_every": updates, "train.diagnostics_every": 0, "train.tensorboard": False}
    for name in names:
        foreign = tuple(f"train.{other}" for other in NAMES if other != name)
        own = {
            key: value for key, value in given.items() if not (key + ".").startswith(tuple(f"{f}." for f in foreign))
        }
        own["train.optimizer"] = "adamw" if name == SLTRAIN else name
        if name == SLTRAIN and not any(key.startswith("train.sltrain") for key in own):
            own["train.sltrain"] = {}
        yield name, read_config(source, fixed | own)


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the lowest loss, held-out where there is one."""
    return min(rows, key=lambda row: row["loss"] if row["validation_loss"] is None else row["validation_loss"])


def table(rows: Sequence[dict[str, Any]], updates: int) -> str:
    """The rows as Markdown."""
    peak = " | peak, bytes" if "peak_bytes" in rows[0] else ""
    lines = [
        f"| optimizer | trained parameters | state, bytes | bytes per parameter{peak} "
        f"| lr | loss after {updates} updates | held out |",
        "|---" * (8 if peak else 7) + "|",
    ]
    for row in rows:
        held = "" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}"
        numbers = f"{row['trained_parameters']:,} | {row['state_bytes']:,} | {row['bytes_per_parameter']:.2f}"
        numbers += f" | {row['peak_bytes']:,}" if peak else ""
        lines.append(f"| {row['name']} | {numbers} | {row['lr']:g} | {row['loss']:.3f} | {held} |")
    return "\n".join(lines)


def compare(source: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every arm at every learning rate; returns the record that ``--json`` writes."""
    given = parse_overrides(options.overrides)
    configs = list(arms(source, options.updates, given, options.only))  # faults are told before anything is trained
    if configs[0][1].train.threads is not None:
        torch.set_num_threads(configs[0][1].train.threads)
    world = parallel.start(configs[0][1].train.device)
    corpus = launch.corpus(configs[0][1], world)
    rows, dense = [], 0
    for name, config in configs:
        tried = []
        for lr in options.lr or [config.train.lr]:
            there = config.train.model_copy(update={"lr": lr})
            run = config.model_copy(update={"train": there})
            tried.append(apart(measure_alone, run) if options.peak else measure(run, world, corpus))
        if name != SLTRAIN:
            dense = tried[0]["trained_parameters"]
        row = {"name": "adamw + sltrain" if name == SLTRAIN else name, **best(tried)}
        row["bytes_per_parameter"] = row["state_bytes"] / (dense or row["trained_parameters"])
        row["tried"] = [{key: one[key] for key in ("lr", "loss", "validation_loss")} for one in tried]
        rows.append(row)
        print(table([row], options.updates).splitlines()[-1], file=sys.stderr, flush=True)
    shape = {key: getattr(configs[0][1].train, key) for key in ("batch_size", "seq_len", "warmup_steps", "schedule")}
    about = {"config": source, "overrides": options.overrides, "updates": options.updates, **shape}
    return {**about, "model": configs[0][1].plain()["model"], "rows": rows}


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, or a name inside the package's configs, like tiny/titans_mag")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="like model.dim=64 train.galore.rank=16")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates, of which the best one counts")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--peak", action="store_true", help="tell the most memory that each held")
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args(words)
    logging.getLogger("palimpsest").setLevel(logging.WARNING)
    try:
        record = compare(options.config, options)
    except (ConfigError, DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(record["rows"], options.updates))
    if options.json:
        write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
