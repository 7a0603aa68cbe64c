"""Does any variant of an operation spill? Compiles more than the tests have time for; no GPU.

    python -m palimpsest.kernels.profile variants [--only neural_memory] [--arch 80 90 100] [--jobs 2] [--json FILE]

An operation's ``plans.py`` may have ``VARIANTS`` beside its ``PLANS``: calls that with those cover its choices. Every
kernel of theirs is compiled with every configuration that a GPU may be offered. Exit status 1 when one spills, does not
compile, or fits no multiprocessor. What was compiled is kept (``PALIMPSEST_CACHE``), so that a command that was stopped
goes on where it was; the file is written anew after every variant, and names those it holds nothing of.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .budgets import Budget
from .offline import ARCHES, Facts, Job
from .plans import Entry, collect, compile_all, discover


def faults(entries: Sequence[Entry], facts: Mapping[Job, Facts]) -> list[str]:
    """What is wrong, a line each."""
    lines = []
    for entry in entries:
        found = facts[entry.job]
        where = " ".join(entry.key)
        if found.error:
            lines.append(f"FAILS {where}: {found.error.splitlines()[0]}")
        elif found.spills or found.stack:
            lines.append(f"SPILLS {where}: {found.spills}, {found.stack} bytes of stack")
        elif not found.programs:
            lines.append(f"FITS NOT {where}: {found.limit}")
    return lines


def summary(name: str, entries: Sequence[Entry], facts: Mapping[Job, Facts], arches: Sequence[int]) -> str:
    """One line of a variant: compilations, the most spills and the most registers on each architecture."""
    of_each = [[facts[entry.job] for entry in entries if entry.job.arch == arch] for arch in arches]
    figures = [f"sm_{a} {max(f.registers for f in found)}" for a, found in zip(arches, of_each, strict=True)]
    most = max(f.spills for found in of_each for f in found)
    return f"{name}: {len(entries)} compilations, at most {most} spills; registers {', '.join(figures)}"


def written(entries: Sequence[Entry], facts: Mapping[Job, Facts]) -> list[dict[str, Any]]:
    """The rows of the file."""
    keys = ("plan", "kernel", "configuration", "arch")
    return [
        {**dict(zip(keys, entry.key, strict=True)), **asdict(Budget.of(facts[entry.job])), "error": error}
        for entry in entries
        for error in [facts[entry.job].error]
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHES))
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose name holds one of these texts")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--modules", nargs="+", default=[], help="modules with VARIANTS, instead of the operations' own"
    )


def main(args: argparse.Namespace) -> int:
    """Compile one variant after the other; 1 when something is wrong."""
    import triton

    variants = {name: call for name, call in discover(args.modules, "VARIANTS").items() if wanted(name, args.only)}
    whole: dict[str, Any] = {
        "command": f"python -m palimpsest.kernels.profile variants --only {' '.join(args.only)}",
        "date": "",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "not_compiled": list(variants),
        "rows": [],
    }
    wrong = []
    for name, call in variants.items():
        entries, refused = collect({name: call}, args.arch)
        facts = compile_all([entry.job for entry in entries], args.jobs)
        found = [*faults(entries, facts), *(f"REFUSED {line}" for line in refused)]
        print(*([summary(name, entries, facts, args.arch)] if entries else []), *found, sep="\n", flush=True)
        wrong += found
        whole["not_compiled"].remove(name)
        whole["rows"] += written(entries, facts)
        whole["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if args.json:
            args.json.write_text(lines_of(whole), encoding="utf-8")
    print(f"{len(whole['rows'])} compilations of {len(variants)} variants, {len(wrong)} problems")
    return 1 if wrong or not whole["rows"] else 0


def wanted(name: str, only: Sequence[str]) -> bool:
    """Whether a name holds one of the texts."""
    return any(text in name for text in only)


def lines_of(whole: Mapping[str, Any]) -> str:
    """JSON with a line for each row."""
    head = json.dumps({name: value for name, value in whole.items() if name != "rows"}, indent=1).removesuffix("\n}")
    rows = ",".join(f"\n  {json.dumps(row)}" for row in whole["rows"])
    return f'{head},\n "rows": [{rows}]\n}}\n'
