"""The budgets of the kernels: every way of being worse is seen, and the repository's own kernels are within theirs.

What the last tests compile is kept where the profiler keeps it, so that a second run of the suite is short.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from palimpsest.kernels.profile.budgets import FILE, Budget, Budgets, complaints, first_of_each, problems
from palimpsest.kernels.profile.offline import ARCHES, Facts, Job
from palimpsest.kernels.profile.plans import Entry, discover

HERE = Path(__file__).parent
GOOD = Facts(
    registers=168, shared=65536, programs=3, limit="registers", matrix={"HGMMA": 12}, loads={"128": 24, "32": 2}
)


OPERATIONS = sorted({name.partition("/")[0] for name in discover()})
LARGE = ("cross_entropy", "delta_rule", "neural_memory", "window_attention")  # each is a test
PARTS = {name: (name,) for name in LARGE} | {"others": tuple(name for name in OPERATIONS if name not in LARGE)}


def command(*words: str | Path, cache: Path | None = None) -> subprocess.CompletedProcess:
    """Run ``budgets`` in a process whose kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["PYTHONPATH"] = path
    if cache is not None:
        environment |= {"PALIMPSEST_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    call = [sys.executable, "-m", "palimpsest.kernels.profile", "budgets", *map(str, words)]
    return subprocess.run(call, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "change, told",
    [
        ({}, None),
        ({"registers": 180}, None),
        ({"registers": 200}, "registers: 200, at most 168"),
        ({"spill_loads": 1, "stack": 0}, "spills: 1, at most 0"),
        ({"stack": 8}, "stack: 8, at most 0"),
        ({"shared": 65537}, "shared: 65537, at most 65536"),
        ({"matrix": {"HMMA": 48}}, "matrix instructions: 0 HGMMA"),
        ({"matrix": {"HGMMA": 8, "HMMA": 16}}, "matrix instructions: 8 HGMMA"),
        ({"loads": {"128": 16, "16": 64}}, "narrow loads: 38.4 bits"),
        ({"programs": 2, "limit": "tensor memory"}, "programs on a multiprocessor: 2, at least 3 (tensor memory)"),
        ({"error": "PTXASError: too many\nlines"}, "does not compile: PTXASError: too many"),
    ],
)
def test_what_is_worse_is_told(change: dict, told: str | None) -> None:
    found = problems(replace(GOOD, **change), Budget.of(GOOD))
    assert (told is None) == (found == []) and all(told in line for line in found if told), found


def test_a_compilation_that_fails_is_a_problem_with_or_without_a_budget() -> None:
    assert problems(GOOD, None) == ["no budget; --update writes it"]
    assert problems(replace(GOOD, error="RuntimeError: no"), None) == ["does not compile: RuntimeError: no"]


def compiled(*spills: int, programs: int = 3) -> tuple[list[Entry], dict[Job, Facts], Budgets]:
    """A kernel's configurations with so many spills on sm_90, and budgets that they just meet."""
    jobs = [Job("k", "", "", 90, f"BLOCK={8 << i} warps=4 stages=2", 4, 2, (), (), ()) for i in range(len(spills))]
    entries = [Entry("a/b", "k", i == 0, job) for i, job in enumerate(jobs)]
    facts = {job: replace(GOOD, spill_loads=n, programs=programs) for job, n in zip(jobs, spills, strict=True)}
    return entries, facts, Budgets("3.7.1", {entry.key: Budget.of(facts[entry.job]) for entry in entries})


def told(entries: list[Entry], facts: dict[Job, Facts], known: Budgets) -> list[str]:
    return complaints(entries, facts, known, lambda plan, arch: plan.startswith("a/") and arch == "sm_90")


def test_budgets_and_compilations_are_the_same_ones() -> None:
    entries, facts, known = compiled(0, 0)
    assert told(entries, facts, known) == []
    (line,) = told(entries[:1], facts, known)
    assert line.startswith("GONE a/b k BLOCK=16 warps=4 stages=2 sm_90")
    missing = known.budgets.pop(entries[0].key)
    (line,) = told(entries, facts, known)
    assert line == "WORSE a/b k BLOCK=8 warps=4 stages=2 sm_90: no budget; --update writes it"
    elsewhere = {("a/b", "k", "x", "sm_80"): missing, ("c/b", "k", "x", "sm_90"): missing}
    assert told(entries, facts, replace(known, budgets=known.budgets | elsewhere)) == [line]


def test_every_kernel_has_a_configuration_that_does_not_spill() -> None:
    assert told(*compiled(0, 7)) == told(*compiled(7, 0)) == []
    place = "a/b k sm_90"
    assert told(*compiled(7, 9)) == [f"SPILLS {place}: 7 with every configuration"]
    assert told(*compiled(0, 0, programs=0))[-1].startswith(f"SPILLS {place}"), "none that fits a multiprocessor"


def test_what_is_not_compiled_stands_in_the_budgets() -> None:
    entries, facts, known = compiled(7, 0)
    facts.pop(entries[1].job)
    assert told(entries, facts, known) == [], "the second one does not spill"
    budget = known.budgets.pop(entries[1].key)
    line = "WORSE a/b k BLOCK=16 warps=4 stages=2 sm_90: no budget; --update writes it"
    assert told(entries, facts, known) == [line, "SPILLS a/b k sm_90: 7 with every configuration"]
    known.budgets[entries[1].key] = replace(budget, spills=3)
    assert told(entries, facts, known) == ["SPILLS a/b k sm_90: 3 with every configuration"]


def test_once_is_each_kernel_and_configuration_of_an_operation() -> None:
    jobs = [replace(job, arch=arch) for job in compiled(0, 0)[1] for arch in (80, 90)]
    names = [("a/b", "k"), ("a/c", "k"), ("a/c", "k#2"), ("d/b", "k")]
    entries = [Entry(plan, kernel, True, job) for plan, kernel in names for job in jobs]
    chosen = first_of_each(entries)
    assert [entry for entry in entries if entry.plan != "a/c" or entry.kernel != "k"] == chosen


def test_a_file_keeps_its_budgets(tmp_path: Path) -> None:
    known = Budgets("3.7.1", {("a/b", "k", "warps=4 stages=2", f"sm_{arch}"): Budget.of(GOOD) for arch in (90, 80)})
    known.write(tmp_path / "budgets.json")
    assert Budgets.read(tmp_path / "budgets.json") == known
    assert Budgets.read(tmp_path / "none.json") == Budgets(None, {})


def test_the_command_accepts_and_refuses(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    words = ("--modules", "sample", "--arch", "90", "--jobs", "1", "--file", path)
    first = command(*words, cache=tmp_path)
    assert first.returncode == 1 and "WORSE sample/crowded sample_crowded" in first.stdout, first.stdout + first.stderr
    assert first.stdout.count("no budget; --update writes it") == 7
    assert first.stdout.count("SPILLS") == 1 and "SPILLS sample/crowded sample_crowded sm_90: " in first.stdout
    updated = command(*words, "--update", cache=tmp_path)
    assert updated.returncode == 1 and "7 compilations of 4 plans" in updated.stdout, updated.stdout
    assert updated.stdout.count("SPILLS") == 1 and "WORSE" not in updated.stdout
    words = (*words, "--only", "product")
    accepted = command(*words, cache=tmp_path)
    assert accepted.returncode == 0 and "6 compilations of 3 plans" in accepted.stdout, accepted.stdout
    once = command(*words, "--once", cache=tmp_path)
    assert once.returncode == 0 and "2 compilations of 3 plans" in once.stdout, once.stdout
    known = Budgets.read(path)
    key = ("sample/product_strided", "sample_product", "BLOCK=64 warps=4 stages=3", "sm_90")
    assert known.triton and known.budgets[key].matrix == {"HGMMA": 4}
    known.budgets[key] = replace(known.budgets[key], load_bits=128.0, shared=1024)
    known.write(path)
    worse = command(*words, cache=tmp_path)
    assert worse.returncode == 1 and worse.stdout.count("WORSE") == 2, worse.stdout
    assert "narrow loads" in worse.stdout and "shared: 32768, at most 1024" in worse.stdout


def test_a_plan_that_is_refused_is_a_problem(tmp_path: Path) -> None:
    done = command("--modules", "refused", "--file", tmp_path / "budgets.json", cache=tmp_path)
    assert done.returncode == 1 and "REFUSED refused/odd: x.shape was (3,); it must be even" in done.stdout


def test_budgets_are_of_operations_that_exist() -> None:
    known = Budgets.read(FILE)
    assert {plan.partition("/")[0] for plan, *_ in known.budgets} == set(OPERATIONS)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("part", PARTS)
def test_kernels_are_within_their_budgets(part: str, arch: int) -> None:
    """Every kernel of every operation with every configuration is compiled, in one plan; all plans have budgets."""
    names = [f"{name}/" for name in PARTS[part]]
    done = command("--once", "--only", *names, "--arch", arch, "--jobs", 1)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if line.startswith(("WORSE", "GONE", "SPILLS", "REFUSED"))]
    assert done.returncode == 0, "\n".join([*wrong, *lines[-1:], done.stderr])
    table = [tuple(re.split(r"\s{2,}", line)[:4]) for line in lines[1:-1]]
    made = {(plan.partition("/")[0], *rest) for plan, *rest in table}
    budgets = [key for key in Budgets.read(FILE).budgets if key[0].startswith(tuple(names)) and key[3] == f"sm_{arch}"]
    assert made == {(plan.partition("/")[0], *rest) for plan, *rest in budgets} and len(made) == len(table)
