"""The report: costs and floors by hand, bytes of launches, and its three forms."""

import json
import os
import re
import subprocess
import sys

import pytest
import sample
import torch
from harness import error

from palimpsest.kernels.op import OPERATIONS
from palimpsest.kernels.profile import html, report
from palimpsest.kernels.profile.draw import Draw
from palimpsest.kernels.profile.gpus import GPUS, find_gpu
from palimpsest.kernels.profile.plans import launches_of
from palimpsest.kernels.profile.sizes import parse_sizes, parse_sweep
from palimpsest.kernels.profile.workloads import WORKLOADS, floats, moved, selected


def test_every_operation_has_a_workload() -> None:
    assert {workload.operation for workload in WORKLOADS.values()} == set(OPERATIONS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_run_and_their_chunked_path_is_the_reference(name: str) -> None:
    workload = WORKLOADS[name]
    sizes = {**workload.check, "T": min(40, workload.check["T"])}
    arguments = workload.arguments(Draw(torch.float32), sizes)
    found = workload.run(arguments, "torch")
    wanted = workload.run(moved(arguments, torch.float64, "cpu"), "reference")
    assert found.dtype == torch.float32 and wanted.dtype == torch.float64
    assert error(found, wanted) <= workload.exact
    empty = floats(workload.arguments(Draw(torch.bfloat16, empty=True), sizes))
    assert [x.shape for x in empty] == [x.shape for x in floats(arguments)]


@pytest.mark.parametrize("name", WORKLOADS)
def test_costs_of_a_workload_grow_with_its_tokens(name: str) -> None:
    workload = WORKLOADS[name]
    double = {**workload.sizes, "T": 2 * workload.sizes["T"]}
    for one, two in zip(workload.cost(workload.sizes, 2), workload.cost(double, 2), strict=True):
        assert 1.9 < two.flops / one.flops <= 4 and 1 < two.bytes / one.bytes <= 2


def test_bytes_of_launches_count_every_tensor_once() -> None:
    launches = launches_of(sample.PLANS["product_bf16"])
    x, y, o = 16 * 1000 * 64 * 2, 16 * 64 * 64 * 2, 1000 * 64 * 4
    assert report.launched_bytes(launches) == x + y + o
    assert report.launched_bytes([*launches, *launches]) == 2 * (x + y + o)


def test_sizes_and_sweeps() -> None:
    assert parse_sizes(["T=16k", "B=2"]) == {"T": 16384, "B": 2}
    assert parse_sweep("T=1k..4k") == [{"T": 1024}, {"T": 2048}, {"T": 4096}]
    assert parse_sweep("T=1k..3k") == [{"T": 1024}, {"T": 2048}]
    assert parse_sweep("T=1k,3k") == [{"T": 1024}, {"T": 3072}]
    for wrong in ("length=3", "T", "T=many"):
        with pytest.raises(ValueError, match=f"size was '{wrong}'"):
            parse_sizes([wrong])
    with pytest.raises(ValueError, match="it must go up"):
        parse_sweep("T=4k..1k")
    with pytest.raises(ValueError, match="workloads were"):
        selected(["nothing"])


def test_numbers_are_scaled() -> None:
    assert report.scaled(1.5e12, "FLOP") == "1.5 TFLOP"
    assert report.scaled(267e-6, "s") == "267 µs" and report.scaled(12.0, "s") == "12 s"
    assert report.scaled(None, "B") == "-" and report.scaled(0, "B") == "0 B"


def test_what_has_no_triton_path_is_said() -> None:
    """float64 has none anywhere."""
    workload = WORKLOADS["short_conv/k4_silu"]
    forward, backward, reason = report.plan_passes(workload, dict(workload.check), torch.float64, find_gpu("H200"))
    assert forward == backward == [] and "float64" in reason


def test_a_plan_is_for_its_gpu() -> None:
    """Kernels that spill on one have none there; with fewer warps on another they have those."""
    workload = WORKLOADS["neural_memory/mlp_muon_window4_c64"]
    plans = {name: report.plan_passes(workload, workload.sizes, torch.bfloat16, find_gpu(name)) for name in GPUS}
    for name in ("A100", "RTX4090"):
        assert plans[name] == ([], [], plans[name][2]) and plans[name][2].startswith("GPU was sm_80; it must be sm_90")
    launched = {name: {launch.kernel.name: str(launch.config) for launch in plans[name][1]} for name in GPUS}
    assert launched["H100"] == launched["H200"] != launched["B200"]
    assert launched["B200"]["neural_memory_carry"] == "BF=16 ROWS=64 warps=4 stages=1"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, str]:
    """The report of one operation that has kernels: text, JSON, page."""
    folder = tmp_path_factory.mktemp("report")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PALIMPSEST_CACHE": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    call = [sys.executable, "-m", "palimpsest.kernels.profile", "report", "--only", "short_conv", "--gpu", "A100"]
    call += ["--jobs", "1", "--set", "T=1k", "--json", str(folder / "r.json"), "--html", str(folder / "r.html")]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "r.json").read_text()), (folder / "r.html").read_text()


def test_the_report_says_what_it_must(written: tuple[str, dict, str]) -> None:
    told, whole, _ = written
    assert "Nothing here is measured" in told and "without a Triton path: none" in told
    (row,) = whole["rows"]
    assert row["path"] == "triton" and row["sizes"]["T"] == 1024 and whole["gpu"]["arch"] == 80
    forward, x = row["forward"], 8 * 1024 * 1024 * 2
    assert forward["ideal_bytes"] == 2 * x + 4096 * 2 and forward["bound"] == "memory"
    assert forward["floor_seconds"] == pytest.approx(forward["ideal_bytes"] / GPUS["A100"].memory)
    assert forward["actual_bytes"] >= forward["ideal_bytes"]
    for kernel in [*forward["kernels"], *row["backward"]["kernels"]]:
        assert kernel["registers"] > 0 and kernel["seconds"] > 0 and kernel["loads"] and kernel["mix"], kernel
        at_once = kernel["programs_per_multiprocessor"] * 108
        assert kernel["waves"] == pytest.approx(kernel["programs"] / at_once)
        assert kernel["kernel"] in told


def test_the_page_needs_nothing_else(written: tuple[str, dict, str]) -> None:
    _, whole, page = written
    assert page.count("<svg") == 1 and page.count("<circle") == 4, "ideal and actual, forward and backward"
    assert not re.search(r"<script|<link|<img|https?://|@import|url\(", page)
    assert "short_conv_forward" in page and page == html.page(whole)
