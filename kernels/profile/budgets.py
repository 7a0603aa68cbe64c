"""What every kernel may use: registers, spills, shared memory, and what it must keep, matrix instructions, wide loads.

``budgets.json`` beside this file holds what each kernel compiled to when its figures were last accepted, by plan,
kernel, configuration and architecture, for one version of Triton. A compilation that is worse is a problem: it names
what it was and what it may be. A new configuration may use what the known ones of its kernel use; a new kernel must
compile, fit a multiprocessor and not spill; ``--update`` writes it down.

    python -m palimpsest.kernels.profile budgets [--quick 180] [--update] [--arch 80 90 100] [--only TEXT] [--jobs 2]
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .offline import ARCHES, Facts
from .plans import Entry, Key, collect, compile_all, discover, quick

FILE = Path(__file__).with_name("budgets.json")
REGISTERS_MORE = 16  # a small change of a kernel moves its registers by a few
SHARE_KEPT = 0.75  # of the matrix instructions, and of the mean width of a load


@dataclass(frozen=True)
class Budget:
    """The accepted figures of one compilation; see :class:`Facts` for their units. ``seconds`` are not compared."""

    registers: int
    stack: int
    spills: int
    shared: int
    programs: int
    load_bits: float
    matrix: Mapping[str, int]
    seconds: float = 0.0

    @staticmethod
    def of(facts: Facts) -> "Budget":
        """The budget that a compilation just meets."""
        return Budget(
            facts.registers,
            facts.stack,
            facts.spills,
            facts.shared,
            facts.programs,
            round(facts.load_bits, 1),
            dict(sorted(facts.matrix.items())),
            round(facts.seconds, 1),
        )


def budget_of(entry: Entry, budgets: Mapping[Key, Budget]) -> Budget | None:
    """The budget of a compilation; of a new configuration what the others of its plan, kernel and architecture may use.

    A changed list of configurations must not hide a kernel that got worse, nor refuse one that got better.
    """
    if entry.key in budgets:
        return budgets[entry.key]
    plan, kernel, _, arch = entry.key
    others = [budget for key, budget in budgets.items() if (key[0], key[1], key[3]) == (plan, kernel, arch)]
    if not others:
        return None
    most = {name: max(getattr(b, name) for b in others) for name in ("registers", "stack", "spills", "shared")}
    return Budget(
        **most,
        programs=min(b.programs for b in others),
        load_bits=min(b.load_bits for b in others),
        matrix={},
    )


def problems(facts: Facts, budget: Budget | None) -> list[str]:
    """In what a compilation is worse than its budget, or than any kernel may be where it has none."""
    if facts.error:
        return [f"does not compile: {facts.error.splitlines()[0]}"]
    found = []
    if budget is None:
        if facts.spills:
            found.append(f"spills: {facts.spills} instructions, and nothing is accepted in {FILE.name}")
        if not facts.programs:
            found.append(f"does not fit a multiprocessor: {facts.limit}")
        return found
    for name, may in (("stack", budget.stack), ("spills", budget.spills), ("shared", budget.shared)):
        if getattr(facts, name) > may:
            found.append(f"{name}: {getattr(facts, name)}, at most {may}")
    if facts.registers > budget.registers + REGISTERS_MORE:
        found.append(f"registers: {facts.registers}, at most {budget.registers} + {REGISTERS_MORE}")
    if facts.programs < budget.programs and facts.limit != "registers":
        found.append(f"programs on a multiprocessor: {facts.programs}, at least {budget.programs} ({facts.limit})")
    for kind, count in budget.matrix.items():
        if facts.matrix.get(kind, 0) < SHARE_KEPT * count:
            found.append(f"matrix instructions: {facts.matrix.get(kind, 0)} {kind}, at least {SHARE_KEPT} of {count}")
    if facts.load_bits < SHARE_KEPT * budget.load_bits:
        found.append(
            f"narrow loads: {facts.load_bits:.1f} bits in the mean, at least {SHARE_KEPT} of {budget.load_bits}"
        )
    return found


def read(path: Path) -> tuple[str | None, dict[Key, Budget]]:
    """The Triton version and the budgets of a file; nothing when it does not exist."""
    if not path.exists():
        return None, {}
    whole = json.loads(path.read_text(encoding="utf-8"))
    return whole["triton"], {tuple(line["of"]): Budget(**line["budget"]) for line in whole["budgets"]}


def write(path: Path, version: str, budgets: Mapping[Key, Budget]) -> None:
    """Write a file, a line per budget, sorted."""
    lines = [json.dumps({"of": list(key), "budget": vars(budgets[key])}) for key in sorted(budgets)]
    text = ",\n  ".join(lines)
    path.write_text(f'{{"triton": {json.dumps(version)},\n "budgets": [\n  {text}\n ]}}\n', encoding="utf-8")


def table(entries: Sequence[Entry], facts: Mapping[Any, Facts]) -> str:
    """One line per compilation."""
    head = ("plan", "kernel", "configuration", "arch", "registers", "spills", "stack", "shared", "per SM", "limit")
    rows = [(*head, "matrix", "loads", "seconds")]
    for entry in entries:
        f = facts[entry.job]
        counts = [" ".join(f"{n}x{kind}" for kind, n in sorted(each.items())) or "-" for each in (f.matrix, f.loads)]
        figures = (f.registers, f.spills, f.stack, f.shared, f.programs, f.limit, *counts, f"{f.seconds:.1f}")
        rows.append((*entry.key, *(("error", *"-" * 8) if f.error else map(str, figures))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def spilling(entries: Sequence[Entry], facts: Mapping[Any, Facts]) -> list[str]:
    """The kernels of plans that have no configuration without spills, by architecture; of configurations compiled."""
    least: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        key = (entry.plan, entry.kernel, f"sm_{entry.job.arch}")
        found = facts[entry.job]
        count = found.spills if not found.error and found.programs else 1 << 30
        least[key] = min(count, least.get(key, 1 << 30))
    return [" ".join(key) for key, count in least.items() if count]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--update", action="store_true", help="accept what is compiled now")
    parser.add_argument("--quick", type=float, metavar="SECONDS", help="a part that takes about so long to compile")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHES))
    parser.add_argument("--only", default="", help="plans whose name holds this text")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--modules", nargs="+", default=[], help="modules with PLANS, instead of the operations' own")


def main(args: argparse.Namespace) -> int:
    """Compile, print the table and what is wrong; 1 when something is."""
    import triton

    plans = {name: plan for name, plan in discover(args.modules).items() if args.only in name}
    entries, refused = collect(plans, args.arch)
    version, budgets = read(args.file)
    if args.quick:
        entries = quick(entries, {key: budget.seconds for key, budget in budgets.items()}, args.quick)
    facts = compile_all([entry.job for entry in entries], args.jobs)
    print(table(entries, facts))
    for line in spilling(entries, facts):
        print(f"no configuration without spills among these: {line}")
    if args.update:
        whole = not (args.only or args.quick or args.arch != list(ARCHES))
        made = {e.key: Budget.of(facts[e.job]) for e in entries if not facts[e.job].error}
        write(args.file, triton.__version__, {**({} if whole else budgets), **made})
        version, budgets = read(args.file)
        print(f"{len(made)} budgets written to {args.file}")
    if version not in (None, triton.__version__):
        print(f"the budgets are for Triton {version}; this is {triton.__version__}, which may compile otherwise")
    wrong = [(e.key, what) for e in entries for what in problems(facts[e.job], budget_of(e, budgets))]
    for key, what in wrong:
        print(f"WORSE {' '.join(key)}: {what}")
    for line in refused:
        print(f"REFUSED {line}")
    unknown = sum(entry.key not in budgets for entry in entries)
    print(f"{len(entries)} compilations of {len(plans)} plans, {len(wrong)} problems; {unknown} without a budget")
    return 1 if wrong or refused or not entries else 0
