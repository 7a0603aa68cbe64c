"""The budgets of the kernels: every way of being worse is seen, and the repository's own kernels are within theirs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from palimpsest.kernels.profile.budgets import Budget, budget_of, problems, read, write
from palimpsest.kernels.profile.offline import Facts, Job
from palimpsest.kernels.profile.plans import Entry

HERE = Path(__file__).parent
GOOD = Facts(
    registers=168, shared=65536, programs=3, limit="registers", matrix={"HGMMA": 12}, loads={"128": 24, "32": 2}
)


def command(*words: str | Path, cache: Path) -> subprocess.CompletedProcess:
    """Run ``budgets`` in a process whose kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": path, "PALIMPSEST_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
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


def test_what_no_budget_knows_must_compile_fit_and_not_spill() -> None:
    assert problems(GOOD, None) == []
    assert "spills: 3" in problems(replace(GOOD, spill_stores=3), None)[0]
    assert "does not fit" in problems(replace(GOOD, programs=0), None)[0]
    assert "does not compile" in problems(replace(GOOD, error="RuntimeError: no"), None)[0]


def test_a_new_configuration_may_use_what_the_known_ones_do() -> None:
    job = Job("k", "", "", 90, "BLOCK=8 warps=4 stages=2", 4, 2, (), (), ())
    entry = Entry("a/b", "k", True, job)
    known = {
        ("a/b", "k", "BLOCK=16 warps=4 stages=2", "sm_90"): Budget(100, 8, 2, 1024, 4, 64.0, {"HGMMA": 4}),
        ("a/b", "k", "BLOCK=32 warps=4 stages=2", "sm_90"): Budget(200, 0, 0, 4096, 2, 128.0, {"HGMMA": 8}),
        ("a/b", "k", "BLOCK=32 warps=4 stages=2", "sm_80"): Budget(255, 99, 99, 9999, 1, 16.0, {}),
        ("a/c", "k", "BLOCK=8 warps=4 stages=2", "sm_90"): Budget(255, 99, 99, 9999, 1, 16.0, {}),
    }
    assert budget_of(entry, known) == Budget(200, 8, 2, 4096, 2, 64.0, {})
    exact = Budget(1, 0, 0, 0, 9, 128.0, {})
    assert budget_of(entry, {**known, entry.key: exact}) == exact
    assert budget_of(replace(entry, plan="a/d"), known) is None


def test_a_file_keeps_its_budgets(tmp_path: Path) -> None:
    budgets = {("a/b", "k", "warps=4 stages=2", f"sm_{arch}"): Budget.of(GOOD) for arch in (90, 80)}
    write(tmp_path / "budgets.json", "3.7.1", budgets)
    assert read(tmp_path / "budgets.json") == ("3.7.1", budgets)
    assert read(tmp_path / "none.json") == (None, {})


def test_the_command_accepts_and_refuses(tmp_path: Path) -> None:
    words = ("--modules", "sample", "--arch", "90", "--jobs", "1", "--file", tmp_path / "budgets.json")
    first = command(*words, cache=tmp_path)
    assert first.returncode == 1 and "WORSE sample/crowded sample_crowded" in first.stdout, first.stdout + first.stderr
    assert first.stdout.count("WORSE") == 1 and "no configuration without spills" in first.stdout
    accepted = command(*words, "--update", cache=tmp_path)
    assert accepted.returncode == 0 and "0 problems; 0 without a budget" in accepted.stdout, accepted.stdout
    version, budgets = read(tmp_path / "budgets.json")
    key = ("sample/product_strided", "sample_product", "BLOCK=64 warps=4 stages=3", "sm_90")
    assert version and budgets[key].matrix == {"HGMMA": 4}
    budgets[key] = replace(budgets[key], load_bits=128.0, shared=1024)
    write(tmp_path / "budgets.json", version, budgets)
    worse = command(*words, cache=tmp_path)
    assert worse.returncode == 1 and worse.stdout.count("WORSE") == 2, worse.stdout
    assert "narrow loads" in worse.stdout and "shared: 32768, at most 1024" in worse.stdout


def test_a_plan_that_is_refused_is_a_problem(tmp_path: Path) -> None:
    done = command("--modules", "refused", "--file", tmp_path / "budgets.json", cache=tmp_path)
    assert done.returncode == 1 and "REFUSED refused/odd: x.shape was (3,); it must be even" in done.stdout


def test_kernels_are_within_their_budgets(tmp_path: Path) -> None:
    """Every kernel for every architecture, and more of Hopper; the command without --quick compiles all."""
    done = command("--quick", "60", "--jobs", "2", cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
