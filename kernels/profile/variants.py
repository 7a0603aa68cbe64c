"""Does any variant of an operation spill? Compiles more than the tests have time for; no GPU.

    python -m palimpsest.kernels.profile variants [--only neural_memory] [--arch 80 90 100] [--kernels reads carry]
        [--jobs 2] [--json FILE] [--show FILE]

An operation's ``plans.py`` may have ``VARIANTS`` beside its ``PLANS``: calls that with those cover its choices. Every
kernel of theirs is compiled with every configuration that a GPU may be offered. Exit status 1 when one spills, does not
compile, or fits no multiprocessor. TORCH: a call that runs plain torch on an architecture, where its kernels would
spill; others have kernels for it. What was compiled is kept (``PALIMPSEST_CACHE``), so that a command that was stopped
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
    of_each = {arch: [facts[entry.job] for entry in entries if entry.job.arch == arch] for arch in arches}
    figures = [f"sm_{arch} {max(f.registers for f in found)}" for arch, found in of_each.items() if found]
    most = max(f.spills for found in of_each.values() for f in found)
    return f"{name}: {len(entries)} compilations, at most {most} spills; registers {', '.join(figures)}"


def written(entries: Sequence[Entry], facts: Mapping[Job, Facts]) -> list[dict[str, Any]]:
    """The rows of the file."""
    keys = ("plan", "kernel", "configuration", "arch")
    return [
        {**dict(zip(keys, entry.key, strict=True)), **asdict(Budget.of(facts[entry.job])), "error": error}
        for entry in entries
        for error in [facts[entry.job].error]
    ]


def table(whole: Mapping[str, Any]) -> str:
    """What a file holds as Markdown: for each variant and kernel the most registers of a thread on each architecture,
    of all specialisations and configurations, and spills where there are any."""
    arches = sorted(
        {line["arch"] for name in ("rows", "plain_torch") for line in whole[name]}, key=lambda x: int(x[3:])
    )
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for row in whole["rows"]:
        key = row["plan"], row["kernel"].partition("#")[0], row["arch"]
        registers, spills = found.get(key, (0, 0))
        found[key] = max(registers, row["registers"]), max(spills, row["spills"])
    plans, kernels = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    torch_runs = {(line["plan"], line["arch"]) for line in whole["plain_torch"]}

    def cell(plan: str, kernel: str, arch: str) -> str:
        registers, spills = found.get((plan, kernel, arch), (0, 0))
        if (plan, arch) in torch_runs and any((plan, kernel, other) in found for other in arches):
            return "torch"
        return f"{registers} ({spills} spills)" if spills else str(registers or "–")

    names = [kernel.removeprefix(plans[0].partition("/")[0] + "_").replace("_", " ") for kernel in kernels]
    lines = [f"| {' | '.join(['registers on ' + ' '.join(arches), *names])} |", f"|{'---|' * (1 + len(names))}"]
    for plan in plans:
        cells = [[cell(plan, kernel, arch) for arch in arches] for kernel in kernels]
        shown = ["–" if set(each) == {"–"} else " ".join(each) for each in cells]
        lines.append(f"| {' | '.join([plan.partition('/')[2].removesuffix('_bf16'), *shown])} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHES))
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose name holds one of these texts")
    parser.add_argument("--kernels", nargs="+", default=[""], help="kernels whose name holds one of these texts")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path, help="print the table of such a file, and compile nothing")
    parser.add_argument(
        "--modules", nargs="+", default=[], help="modules with VARIANTS, instead of the operations' own"
    )


def main(args: argparse.Namespace) -> int:
    """Compile one variant after the other; 1 when something is wrong."""
    import triton

    if args.show:
        print(table(json.loads(args.show.read_text(encoding="utf-8"))))
        return 0
    variants = {name: call for name, call in discover(args.modules, "VARIANTS").items() if wanted(name, args.only)}
    whole: dict[str, Any] = {
        "command": f"python -m palimpsest.kernels.profile variants --only {' '.join(args.only)}",
        "date": "",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "not_compiled": list(variants),
        "plain_torch": [],
        "rows": [],
    }
    wrong = []
    for name, call in variants.items():
        collected = collect({name: call}, args.arch)
        entries = [entry for entry in collected.entries if wanted(entry.kernel, args.kernels)]
        facts = compile_all([entry.job for entry in entries], args.jobs)
        found = [*faults(entries, facts), *(f"REFUSED {line}" for line in collected.refused)]
        elsewhere = [{"plan": p, "arch": f"sm_{arch}", "why": why} for (p, arch), why in collected.elsewhere.items()]
        told = [summary(name, entries, facts, args.arch)] if entries else []
        told += [f"TORCH {line['plan']} {line['arch']}: {line['why']}" for line in elsewhere]
        print(*told, *found, sep="\n", flush=True)
        wrong += found
        whole["not_compiled"].remove(name)
        whole["plain_torch"] += elsewhere
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
