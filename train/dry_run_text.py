"""The command of :mod:`.dry_run`, and what it prints."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import ConfigError, RunConfig
from .dry_run import RESERVE, fits, plan
from .recompute import named

OPTIONS = ("processes", "gpu", "mfu", "measure", "json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--dry-run`` and what belongs to it; what is not given stays None."""
    group = parser.add_argument_group("dry run")
    group.add_argument("--dry-run", action="store_true", help="print what the run amounts to; train and write nothing")
    group.add_argument("--processes", type=int, metavar="N", help="of the run, one GPU each (1)")
    group.add_argument("--gpu", metavar="NAME", help="whose peak and memory to count with (H200)")
    group.add_argument("--mfu", type=float, help="the share of the peak that is assumed (0.4)")
    group.add_argument("--measure", action="store_true", default=None, help="time a few updates on this processor")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def run(config: RunConfig, options: argparse.Namespace) -> None:
    """Print the plan, and write ``--json``.

    Raises:
        ConfigError: naming an option or key that does not fit; before anything is counted.
    """
    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    file = given.pop("json", None)
    if file is not None and not file.parent.is_dir():
        raise ConfigError(f"--json was {str(file)!r}; its folder must exist")
    logging.getLogger("palimpsest").setLevel(logging.WARNING)  # what is outlined runs nowhere
    found = plan(config, **given)
    print(text(found))
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def refuse_without(options: argparse.Namespace) -> None:
    """Refuse the options of a dry run where there is none.

    Raises:
        ConfigError: naming the option.
    """
    for name in OPTIONS:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} was {getattr(options, name)}; it must be left out without --dry-run")


def text(found: Mapping[str, Any]) -> str:
    """The plan for a terminal."""
    parts = (_parameters, _batch, _memory, _fits, _compute, _kernels, _rates, _law)
    return "\n\n".join("\n".join(part(found)) for part in parts)


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), indent: str = "  ") -> list[str]:
    """Rows of equal length as aligned lines; columns not in ``left`` are set to the right."""
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        indent
        + "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, wide, strict=True))
        ).rstrip()
        for row in rows
    ]


def size(count: float) -> str:
    """Bytes as GiB, MiB or KiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:,.2f} {unit}"
    return f"{count:,.0f} B"


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:,.2f} {unit}"
    return f"{seconds:,.1f} seconds"


def _parameters(found: Mapping[str, Any]) -> list[str]:
    told = found["parameters"]
    rows = [("parameters", f"{told['total']:,}"), ("met by a token", f"{told['met_by_a_token']:,}")]
    rows += [(f"  {part}", f"{count:,}") for part, count in told["parts"].items()]
    return [f"dry run of {found['name']}: nothing is trained", "", *table(rows)]


def _batch(found: Mapping[str, Any]) -> list[str]:
    batch, corpus = found["batch"], found["corpus"]
    groups, parts = batch["processes"] // batch["sequence_parallel"], batch["sequence_parallel"]
    shared = f" of {parts} processes, a part of each sequence in each," if parts > 1 else ""
    what = "group" + "s" * (groups > 1) if parts > 1 else "process" + "es" * (groups > 1)
    layout = (
        f"{groups} {what}{shared} ({batch['parallel']}) x "
        f"{batch['micro_batches']} micro batch{'es' * (batch['micro_batches'] > 1)} x "
        f"{batch['sequences_per_micro_batch']} sequences of {batch['seq_len']:,} tokens"
    )
    epochs = corpus.get("reason") or f"{corpus['epochs']:,.2f} epochs of {corpus['tokens']:,} tokens"
    rows = [
        ("batch", f"{batch['sequences_per_update']} sequences = {layout}"),
        ("tokens per update", f"{batch['tokens_per_update']:,}"),
        ("tokens in all", f"{batch['tokens']:,} in {batch['steps']:,} updates"),
        ("corpus", epochs),
    ]
    return table(rows, left=(0, 1))


def _memory(found: Mapping[str, Any]) -> list[str]:
    told = found["memory"]
    rows = [(line["what"], size(line["bytes"]), size(line["checkpointed"]), line["formula"]) for line in told["lines"]]
    heads = ["kept", "recomputed"]
    heads[told["checkpointing"]] += " *"
    total = ("in all", size(told["total"]), size(told["total_checkpointed"]), "sum")
    again = told["recomputed_blocks"]
    which = f"all {told['blocks']} blocks" if len(again) == told["blocks"] else f"blocks {named(again)}"
    about = f"* as train.activation_checkpointing says; recomputed: {which} run again in the backward pass"
    return [
        "memory of one GPU, estimated: activations are counted on shapes, as the kernels would keep them",
        *table([("", *heads, ""), *rows, total], left=(0, 3)),
        f"  {about}",
        *(f"  {note}" for note in told["notes"]),
    ]


def _fits(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (name, f"{capacity / 1e9:,.0f} GB", "fits" if plain else "too large", "fits" if again else "too large")
        for name, capacity, plain, again in fits(found)
    ]
    head = ("GPU", "memory", "kept", "recomputed")
    return [f"fits when the sum is at most {1 - RESERVE:.0%} of a GPU's memory", *table([head, *rows])]


def _compute(found: Mapping[str, Any]) -> list[str]:
    flops, time = found["flops"], found["time"]
    gpus = f"{found['batch']['processes']} x {time['gpu']} ({time['peak_flops'] / 1e12:,.1f} TFLOP/s)"
    speed = f"{time['tokens_per_second']:,.0f} tokens/s: an assumed MFU of {time['mfu']:g} on {gpus}"
    rows = [
        ("FLOPs per token", f"{flops['per_token']:,.0f}, of these in the output head {flops['head_per_token']:,.0f}"),
        ("FLOPs per update", f"{flops['per_update']:.3e}"),
        ("FLOPs in all", f"{flops['total']:.3e}"),
        ("time, ESTIMATED", f"{duration(time['seconds'])} at {speed}"),
    ]
    if "measured" in time:
        told = time["measured"]
        seconds = told["tokens"] / told["tokens_per_second"]
        speed = f"{told['tokens_per_second']:,.0f} tokens/s, one process, {told['threads']} threads, float32"
        rows.append(("time on this processor, measured", f"{duration(seconds)} at {speed}"))
    return ["compute", *table(rows, left=(0, 1))]


def _kernels(found: Mapping[str, Any]) -> list[str]:
    return ["a forward on a GPU runs", *(f"  {line}" for line in found["kernels"])]


def _rates(found: Mapping[str, Any]) -> list[str]:
    rows = [("step", "rate"), *((f"{step:,}", f"{rate:.3e}") for step, rate in found["learning_rate"].items())]
    return ["learning rate", *table(rows, left=())]


def _law(found: Mapping[str, Any]) -> list[str]:
    return ["what the step law suggests (python -m palimpsest.train.step_law)", *(f"  {x}" for x in found["step_law"])]
