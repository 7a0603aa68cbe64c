"""What every kernel may use: registers, spills, shared memory, and what it must keep, matrix instructions, wide loads.

``budgets.json`` beside this file holds what each kernel compiled to when its figures were last accepted, by plan,
kernel, configuration and architecture, for one version of Triton. A compilation that is worse is a problem: it names
what it was and what it may be. So is one without a budget, a budget that nothing is compiled for, and a kernel of a
plan that spills on some architecture with every configuration. ``--update`` writes down what is compiled; ``--once``
compiles each kernel of an operation in one plan alone, with each configuration for one architecture and with the first
for the others, and lets budgets speak for the rest.

    python -m palimpsest.kernels.profile budgets [--update | --once] [--arch 80 90 100] [--only TEXT …] [--jobs 2]
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .offline import ARCHES, Facts
from .plans import Entry, Key, collect, compile_all, discover

FILE = Path(__file__).with_name("budgets.json")
CHIEF = 90  # the architecture for which ``--once`` compiles every configuration
REGISTERS_MORE = 16  # a small change of a kernel moves its registers by a few
SHARE_KEPT = 0.75  # of the matrix instructions, and of the mean width of a load
UNUSABLE = 1 << 30  # spills of what does not run at all
MISSING = "no budget; --update writes it"
Place = tuple[str, str, str]  # plan, kernel, architecture


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


def problems(facts: Facts, budget: Budget | None) -> list[str]:
    """In what a compilation is worse than its budget; without one that is the problem."""
    if facts.error:
        return [f"does not compile: {facts.error.splitlines()[0]}"]
    if budget is None:
        return [MISSING]
    found = []
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


@dataclass
class Budgets:
    """What ``budgets.json`` holds: the Triton they are for, and all budgets. An empty one when there is no file."""

    triton: str | None
    budgets: dict[Key, Budget]

    @staticmethod
    def read(path: Path) -> "Budgets":
        """Read a file."""
        if not path.exists():
            return Budgets(None, {})
        whole = json.loads(path.read_text(encoding="utf-8"))
        return Budgets(whole["triton"], {tuple(line["of"]): Budget(**line["budget"]) for line in whole["budgets"]})

    def write(self, path: Path) -> None:
        """Write a file, a line per budget, sorted."""
        lines = (json.dumps({"of": list(key), "budget": vars(self.budgets[key])}) for key in sorted(self.budgets))
        known = ",".join(f"\n  {line}" for line in lines)
        path.write_text(f'{{"triton": {json.dumps(self.triton)},\n "budgets": [{known}]}}\n', encoding="utf-8")


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


def first_of_each(entries: Sequence[Entry]) -> list[Entry]:
    """Each kernel of an operation, in the first plan that has it: with each configuration for :data:`CHIEF`, with the
    first one for other architectures."""
    found: dict[Key, Entry] = {}
    for entry in entries:
        plan, kernel, configuration, arch = entry.key
        told = configuration if entry.job.arch == CHIEF else ""
        found.setdefault((plan.partition("/")[0], kernel, told, arch), entry)
    return list(found.values())


def least_spills(entries: Sequence[Entry], facts: Mapping[Any, Facts], known: Mapping[Key, Budget]) -> dict[Place, int]:
    """The fewest spills that any configuration of a plan's kernel has on an architecture, where none has none; of what
    was not compiled, by its budget. A configuration that does not compile or fit is none."""
    least: dict[Place, int] = {}
    for entry in entries:
        place = entry.plan, entry.kernel, f"sm_{entry.job.arch}"
        found: Facts | Budget | None = facts.get(entry.job, known.get(entry.key))
        count = found.spills if found is not None and found.programs else UNUSABLE
        least[place] = min(count, least.get(place, UNUSABLE))
    return {place: count for place, count in least.items() if count}


def complaints(
    entries: Sequence[Entry], facts: Mapping[Any, Facts], known: Budgets, within: Callable[[str, str], bool]
) -> list[str]:
    """All that is wrong, a line each; ``within(plan, architecture)`` says what the entries are all of, compiled or
    not."""
    lines = []
    for entry in entries:
        budget = known.budgets.get(entry.key)
        worse = problems(facts[entry.job], budget) if entry.job in facts else [] if budget else [MISSING]
        lines += [f"WORSE {' '.join(entry.key)}: {what}" for what in worse]
    here = {entry.key for entry in entries}
    gone = [key for key in known.budgets if key not in here and within(key[0], key[3])]
    lines += [f"GONE {' '.join(key)}: a budget for what is not compiled; --update removes it" for key in gone]
    for place, count in sorted(least_spills(entries, facts, known.budgets).items()):
        lines.append(f"SPILLS {' '.join(place)}: {count} with every configuration")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--update", action="store_true", help="accept what is compiled now")
    either.add_argument(
        "--once", action="store_true", help=f"each kernel in one plan alone, with all configurations for sm_{CHIEF}"
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHES))
    parser.add_argument("--only", nargs="+", default=[""], help="plans whose name holds one of these texts")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--modules", nargs="+", default=[], help="modules with PLANS, for a FILE of theirs")


def main(args: argparse.Namespace) -> int:
    """Compile, print the table and what is wrong; 1 when something is."""
    import triton

    plans = {name: plan for name, plan in discover(args.modules).items() if any(text in name for text in args.only)}
    collected = collect(plans, args.arch)
    entries = collected.entries
    refused = [*collected.refused, *(f"{plan} sm_{arch}: {why}" for (plan, arch), why in collected.elsewhere.items())]
    chosen = first_of_each(entries) if args.once else entries
    facts = compile_all([entry.job for entry in chosen], args.jobs)
    print(table(chosen, facts))
    known = Budgets.read(args.file)
    arches = [f"sm_{arch}" for arch in args.arch]

    def within(plan: str, arch: str) -> bool:
        return any(text in plan for text in args.only) and arch in arches

    if args.update:
        made = {entry.key: Budget.of(facts[entry.job]) for entry in entries if not facts[entry.job].error}
        kept = {key: budget for key, budget in known.budgets.items() if not within(key[0], key[3])}
        known = Budgets(triton.__version__, {**kept, **made})
        known.write(args.file)
        print(f"{len(made)} budgets written to {args.file}")
    if known.triton not in (None, triton.__version__):
        print(f"the budgets are for Triton {known.triton}; this is {triton.__version__}, which may compile otherwise")
    wrong = [*complaints(entries, facts, known, within), *(f"REFUSED {line}" for line in refused)]
    for line in wrong:
        print(line)
    seconds = sum(found.seconds for found in facts.values())
    print(f"{len(chosen)} compilations of {len(plans)} plans in {seconds:.0f} s, {len(wrong)} problems")
    return 1 if wrong or not entries else 0
