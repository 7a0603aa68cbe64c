"""The budgets of the kernels: every way of being worse is seen, and the repository's own kernels are within theirs.

What the last tests compile is kept where the profiler keeps it, so that a second run of the suite is short.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sample

import palimpsest.kernels.profile.plans as plans
from palimpsest.kernels.launch import Config, Launch, architecture
from palimpsest.kernels.op import NotCovered
from palimpsest.kernels.profile import variants
from palimpsest.kernels.profile.__main__ import main
from palimpsest.kernels.profile.budgets import CHIEF, FILE, Budget, Budgets, complaints, first_of_each, problems
from palimpsest.kernels.profile.offline import ARCHES, Facts, Job
from palimpsest.kernels.profile.plans import Entry, discover
from palimpsest.kernels.profile.variants import faults

HERE = Path(__file__).parent
GOOD = Facts(
    registers=168, shared=65536, programs=3, limit="registers", matrix={"HGMMA": 12}, loads={"128": 24, "32": 2}
)


OPERATIONS = sorted({name.partition("/")[0] for name in discover()})
LARGE = ("cross_entropy", "delta_rule", "neural_memory", "window_attention")  # each is a test
PARTS = {name: (name,) for name in LARGE} | {"others": tuple(name for name in OPERATIONS if name not in LARGE)}


SCRIPT = """
import contextlib, io, json, sys
from palimpsest.kernels.profile.__main__ import main

for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as told:
        status = main(words if words[0] == "variants" else ["budgets", *words])
    print(json.dumps([status, told.getvalue()]))
"""


def commands(*calls: Sequence[str | int | Path], cache: Path | None = None) -> list[subprocess.CompletedProcess]:
    """Run ``budgets``, or ``variants``, with each of these words, in one process, whose kernels are not interpreted: to
    start it takes seconds."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["PYTHONPATH"] = path
    if cache is not None:
        environment |= {"PALIMPSEST_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    given = json.dumps([[str(word) for word in words] for words in calls])
    done = subprocess.run([sys.executable, "-c", SCRIPT, given], env=environment, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(calls), done.stderr
    return [subprocess.CompletedProcess(list(words), *each) for words, each in zip(calls, found, strict=True)]


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


def test_once_is_each_kernel_of_an_operation_and_on_one_architecture_each_configuration() -> None:
    first, second = compiled(0, 0)[1]
    jobs = [replace(job, arch=arch) for job in (first, second) for arch in (80, 90)]
    names = [("a/b", "k"), ("a/c", "k"), ("a/c", "k#2"), ("d/b", "k")]
    entries = [Entry(plan, kernel, True, job) for plan, kernel in names for job in jobs]
    own = [entry for entry in entries if entry.plan != "a/c" or entry.kernel != "k"]
    assert first_of_each(entries) == [entry for entry in own if entry.job != replace(second, arch=80)]


def test_a_launch_is_specialised_once_however_often_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences are thousands of launches."""
    asked = []

    def specialise(launch: Launch, arch: int, config: Config | None = None) -> Job:
        asked.append(arch)
        text = str(config or launch.config)
        return Job(launch.kernel.name, "", "", arch, text, 4, 2, (), ((0, launch.constants["N"]),), ())

    monkeypatch.setattr(plans, "specialise_launch", specialise)
    launches = [Launch(sample.PRODUCT, sample.CONFIGS[0], (1,), {}, {"N": i % 2}) for i in range(100)]
    entries = list(plans.entries_of("a/b", launches, ARCHES))
    names = ("sample_product", "sample_product#2")
    wanted = [(name, str(config), f"sm_{arch}") for arch in ARCHES for name in names for config in sample.CONFIGS]
    assert [entry.key[1:] for entry in entries] == wanted and len(asked) == 100 + len(wanted)
    assert [entry.preferred for entry in entries] == [True, False] * 6


def call_elsewhere() -> None:
    """What an operation without kernels for one architecture does."""
    if architecture() == 80:
        raise NotCovered("GPU was sm_80")
    sample.call_product()


def specialised(launch: Launch, arch: int, config: Config | None = None) -> Job:
    return Job(launch.kernel.name, "", "", arch, str(config or launch.config), 4, 2, (), (), ())


def test_a_plan_may_have_kernels_on_some_architectures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "specialise_launch", specialised)
    found = plans.collect({"a/b": call_elsewhere})
    assert {entry.job.arch for entry in found.entries} == {90, 100}
    assert found.elsewhere == {("a/b", 80): "GPU was sm_80"} and found.refused == []
    alone = plans.collect({"a/b": call_elsewhere}, (80,))
    assert alone == plans.Collected([], ["a/b: GPU was sm_80"], {}), "nowhere else either"


def test_variants_name_what_runs_plain_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(plans, "specialise_launch", specialised)
    monkeypatch.setattr(variants, "discover", lambda *_: {"a/b": call_elsewhere, "a/c": sample.call_crowded})
    monkeypatch.setattr(variants, "compile_all", lambda jobs, _: dict.fromkeys(jobs, GOOD))
    assert main(["variants", "--kernels", "product", "--json", str(tmp_path / "found.json")]) == 0
    file = json.loads((tmp_path / "found.json").read_text())
    assert file["plain_torch"] == [{"plan": "a/b", "arch": "sm_80", "why": "GPU was sm_80"}]
    assert file["not_compiled"] == []
    assert {(row["plan"], row["kernel"], row["arch"]) for row in file["rows"]} == {
        ("a/b", "sample_product", "sm_90"),
        ("a/b", "sample_product", "sm_100"),
    }
    assert "TORCH a/b sm_80: GPU was sm_80\n" in capsys.readouterr().out
    monkeypatch.setattr(variants, "compile_all", lambda jobs, _: dict.fromkeys(jobs, replace(GOOD, spill_loads=1)))
    assert main(["variants"]) == 1
    capsys.readouterr()
    assert main(["variants", "--show", str(tmp_path / "found.json")]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| b | torch 168 168 |"]


def test_a_table_has_the_most_of_each_kernel() -> None:
    row = {"plan": "a/b_bf16", "kernel": "a_one", "arch": "sm_80", "registers": 8, "spills": 0}
    rows = [row, row | {"kernel": "a_one#2", "registers": 9, "spills": 4}, row | {"plan": "a/c", "kernel": "a_two"}]
    assert variants.table({"rows": rows, "plain_torch": []}).splitlines() == [
        "| registers on sm_80 | one | two |",
        "|---|---|---|",
        "| b | 9 (4 spills) | – |",
        "| c | – | 8 |",
    ]


def test_the_document_has_the_table_of_its_file() -> None:
    document = (HERE.parents[2] / "docs" / "neural_memory.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"variants --show\s+(docs/results/[\w-]+\.json)", document)
    whole = json.loads((HERE.parents[2] / name).read_text(encoding="utf-8"))
    assert f"\n{variants.table(whole)}\n" in document
    assert whole["not_compiled"] == [] and not any(row["spills"] or row["stack"] for row in whole["rows"])


def test_a_file_keeps_its_budgets(tmp_path: Path) -> None:
    known = Budgets("3.7.1", {("a/b", "k", "warps=4 stages=2", f"sm_{arch}"): Budget.of(GOOD) for arch in (90, 80)})
    known.write(tmp_path / "budgets.json")
    assert Budgets.read(tmp_path / "budgets.json") == known
    assert Budgets.read(tmp_path / "none.json") == Budgets(None, {})


def test_the_command_accepts_and_refuses(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    words = ("--modules", "sample", "--arch", "90", "--jobs", "1", "--file", path)
    products = (*words, "--only", "product")
    first, updated, accepted, once, refused, variants = commands(
        words,
        (*words, "--update"),
        products,
        (*products, "--once"),
        ("--modules", "refused", "--file", tmp_path / "other.json"),
        ("variants", "--modules", "sample", "--arch", "90", "--jobs", "1", "--json", tmp_path / "variants.json"),
        cache=tmp_path,
    )
    assert first.returncode == 1 and "WORSE sample/crowded sample_crowded" in first.stdout, first.stdout
    assert first.stdout.count("no budget; --update writes it") == 7
    assert first.stdout.count("SPILLS") == 1 and "SPILLS sample/crowded sample_crowded sm_90: " in first.stdout
    assert updated.returncode == 1 and "7 compilations of 4 plans" in updated.stdout, updated.stdout
    assert updated.stdout.count("SPILLS") == 1 and "WORSE" not in updated.stdout
    assert accepted.returncode == 0 and "6 compilations of 3 plans" in accepted.stdout, accepted.stdout
    assert once.returncode == 0 and "2 compilations of 3 plans" in once.stdout, once.stdout
    spills = "SPILLS sample/crowded sample_crowded warps=1 stages=2 sm_90: "
    assert variants.returncode == 1 and variants.stdout.count("SPILLS") == 1, variants.stdout
    assert spills in variants.stdout and "3 compilations of 2 variants, 1 problems" in variants.stdout
    assert "sample/product_fp16: 2 compilations, at most 0 spills; registers sm_90 " in variants.stdout
    file = json.loads((tmp_path / "variants.json").read_text())
    rows = [(row["plan"], row["spills"] > 0, row["stack"] > 0) for row in file["rows"]]
    assert rows == [("sample/product_fp16", False, False)] * 2 + [("sample/crowded", True, True)]
    assert file["not_compiled"] == [] and file["versions"]["triton"] == Budgets.read(path).triton and file["date"]
    assert refused.returncode == 1 and "REFUSED refused/odd: x.shape was (3,); it must be even" in refused.stdout
    known = Budgets.read(path)
    key = ("sample/product_strided", "sample_product", "BLOCK=64 warps=4 stages=3", "sm_90")
    assert known.triton and known.budgets[key].matrix == {"HGMMA": 4}
    known.budgets[key] = replace(known.budgets[key], load_bits=128.0, shared=1024)
    known.write(path)
    (worse,) = commands(products, cache=tmp_path)
    assert worse.returncode == 1 and worse.stdout.count("WORSE") == 2, worse.stdout
    assert "narrow loads" in worse.stdout and "shared: 32768, at most 1024" in worse.stdout


@pytest.mark.parametrize(
    "change, told",
    [
        ({}, []),
        ({"spill_loads": 2}, ["SPILLS a/b k BLOCK=8 warps=4 stages=2 sm_90: 2, 0 bytes of stack"]),
        ({"stack": 8}, ["SPILLS a/b k BLOCK=8 warps=4 stages=2 sm_90: 0, 8 bytes of stack"]),
        ({"programs": 0}, ["FITS NOT a/b k BLOCK=8 warps=4 stages=2 sm_90: registers"]),
        (
            {"error": "PTXASError: too many\nlines"},
            ["FAILS a/b k BLOCK=8 warps=4 stages=2 sm_90: PTXASError: too many"],
        ),
    ],
)
def test_every_configuration_of_a_variant_must_do(change: dict, told: list[str]) -> None:
    """A second one that does not spill is no excuse: tuning may choose either."""
    entries, facts, _ = compiled(0, 0)
    facts[entries[0].job] = replace(facts[entries[0].job], **change)
    assert faults(entries, facts) == told


def test_budgets_are_of_operations_that_exist() -> None:
    known = Budgets.read(FILE)
    assert {plan.partition("/")[0] for plan, *_ in known.budgets} == set(OPERATIONS)


@pytest.mark.parametrize("part", PARTS)
def test_kernels_are_within_their_budgets(part: str) -> None:
    """Every kernel of every operation is compiled, in one plan, for every architecture, and for one of them with every
    configuration; all plans have budgets."""
    names = [f"{name}/" for name in PARTS[part]]
    (done,) = commands(("--once", "--only", *names, "--jobs", 1))
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if line.startswith(("WORSE", "GONE", "SPILLS", "REFUSED"))]
    assert done.returncode == 0, "\n".join([*wrong, *lines[-1:]])
    table = [tuple(re.split(r"\s{2,}", line)[:4]) for line in lines[1:-1]]
    made = {(plan.partition("/")[0], *rest) for plan, *rest in table}
    budgets = [key for key in Budgets.read(FILE).budgets if key[0].startswith(tuple(names))]
    assert {arch for *_, arch in budgets} == {f"sm_{arch}" for arch in ARCHES}
    wanted = {(plan.partition("/")[0], *rest) for plan, *rest in budgets}
    chief = f"sm_{CHIEF}"
    assert {key for key in made if key[3] == chief} == {key for key in wanted if key[3] == chief}
    assert made <= wanted and len(made) == len(table)
    assert {(name, kernel, arch) for name, kernel, _, arch in made} == {
        (o, kernel, arch) for o, kernel, _, arch in wanted
    }
