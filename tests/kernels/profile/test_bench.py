"""Timing: nothing wrong is timed, peers are called with what they expect, figures and comparisons are right."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from palimpsest.kernels import delta_rule, linear_attention, window_attention
from palimpsest.kernels.op import Cost
from palimpsest.kernels.profile import __main__ as command
from palimpsest.kernels.profile import bench, growth
from palimpsest.kernels.profile.draw import Draw
from palimpsest.kernels.profile.gpus import GPUS
from palimpsest.kernels.profile.measure import interleave
from palimpsest.kernels.profile.peers import peers
from palimpsest.kernels.profile.workloads import WORKLOADS

CPU = bench.Setting("cpu", torch.float32, 2, None)
NORM = WORKLOADS["l2_norm/d64"]
FLA, LIGER, FUSED = "flash-linear-attention", "liger_kernel.transformers", "LigerFusedLinearCrossEntropy"


@pytest.mark.parametrize(
    "name", [name for name, w in WORKLOADS.items() if w.operation in peers()["torch.nn"].calls], ids=str
)
def test_torch_as_a_peer_is_right(name: str) -> None:
    workload = WORKLOADS[name]
    verdict = bench.check(workload, peers()["torch.nn"].calls[workload.operation], CPU, workload.small)
    assert verdict["right"], verdict


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.kernels.profile.peers.importlib.util.find_spec", lambda name: None)
    calls, missing = bench.implementations(
        WORKLOADS["delta_rule/gated_d64_c64"], bench.Setting("cuda", torch.bfloat16, 2, None)
    )
    assert missing == ["flash-linear-attention is not installed; get it with: pip install flash-linear-attention"]
    assert "flash-linear-attention" not in calls


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """Install a module of this name, and the packages that it lies in."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        here = ".".join(parts[:i])
        made = sys.modules.get(here) if here != name else None
        monkeypatch.setitem(sys.modules, here, made or ModuleType(here))
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


def fake_delta(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    """flash-linear-attention 0.6."""
    return delta_rule(q, k, v, beta, g, scale=scale, backend="torch")[0], None


def fake_linear(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
    """flash-linear-attention 0.6."""
    return linear_attention(q, k, v, g, scale=scale, backend="torch")[0], None


def fake_attention(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """flash-attn 2: the window counts the tokens before."""
    assert causal and window_size[1] in (0, -1)
    window = None if window_size[0] < 0 else window_size[0] + 1
    return window_attention(q, k, v, window=window, backend="torch")[0]


def fake_cut(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False):
    """cut-cross-entropy 25."""
    return F.cross_entropy((e @ c.T).flatten(0, -2), targets.flatten(), reduction=reduction)


class FakeLoss:
    """liger-kernel 0.8: weight first, tokens in one row."""

    def __call__(self, lin_weight, _input, target, bias=None):
        assert _input.dim() == 2 and target.dim() == 1
        return F.cross_entropy(_input @ lin_weight.T, target)


class FakeNorm:
    """liger-kernel 0.8."""

    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert not in_place and offset == 0.0 and casting_mode == "llama"
        return F.rms_norm(X, X.shape[-1:], W, eps)


FAKES = [
    (FLA, "delta_rule/gated_d64_c64", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", fake_delta),
    (FLA, "linear_attention/gated_d64_c64", "fla.ops.simple_gla", "chunk_simple_gla", fake_linear),
    ("flash-attn", "window_attention/causal", "flash_attn", "flash_attn_func", fake_attention),
    ("cut-cross-entropy", "linear_cross_entropy/v128k", "cut_cross_entropy", "linear_cross_entropy", fake_cut),
    ("liger-kernel", "linear_cross_entropy/v128k", f"{LIGER}.fused_linear_cross_entropy", f"{FUSED}Loss", FakeLoss),
    ("liger-kernel", "rms_norm/d1024", "liger_kernel.ops.rms_norm", "LigerRMSNormFunction", FakeNorm),
]  # fmt: skip


@pytest.mark.parametrize("peer, name, place, member, fake", FAKES)
def test_peers_are_called_with_what_they_expect(
    peer: str, name: str, place: str, member: str, fake: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins of the packages' own signatures, the result is that of the reference."""
    module(monkeypatch, place, **{member: fake})
    workload = WORKLOADS[name]
    verdict = bench.check(workload, peers()[peer].calls[workload.operation], CPU, workload.small)
    assert verdict["right"], verdict


def test_flash_attention_counts_a_windows_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours counts the token itself, the package's does not."""
    module(monkeypatch, "flash_attn", flash_attn_func=fake_attention)
    workload = WORKLOADS["window_attention/w512_p16"]
    workload = replace(workload, check={**workload.check, "P": 0})
    verdict = bench.check(workload, peers()["flash-attn"].calls["window_attention"], CPU, workload.small)
    assert verdict["right"], verdict


@pytest.mark.parametrize("name", ["flash-attn", "liger-kernel"])
def test_what_a_peer_lacks_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "flash_attn", flash_attn_func=fake_attention)
    module(monkeypatch, "liger_kernel.ops.rms_norm", LigerRMSNormFunction=FakeNorm)
    workload = WORKLOADS["window_attention/w512_p16" if name == "flash-attn" else "rms_norm/gated_d64"]
    verdict = bench.check(workload, peers()[name].calls[workload.operation], CPU, workload.small)
    assert not verdict["right"] and "NotImplementedError" in verdict["error"]


def wrong_value(arguments):
    return 1.01 * NORM.run(arguments, "torch")


def wrong_gradient(arguments):
    y = NORM.run(arguments, "torch")
    return y.detach() + 1.01 * (y - y.detach())


def not_a_number(arguments):
    return NORM.run(arguments, "torch") * float("nan")


@pytest.mark.parametrize("call", [wrong_value, wrong_gradient, not_a_number])
def test_what_is_wrong_is_not_timed(call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    calls = {"torch": partial(NORM.run, backend="torch"), "triton": call}
    monkeypatch.setattr(bench, "implementations", lambda workload, setting: (dict(calls, reference=calls["torch"]), []))
    rows = bench.measure(NORM, {**NORM.small, "T": 32}, CPU)
    by_name = {(row["implementation"], row["pass"]): row for row in rows}
    assert "seconds" in by_name["torch", "forward"] and "seconds" not in by_name["triton", "forward+backward"]
    assert "NOT TIMED" in bench.text(rows, on_gpu=False)
    assert command.main(["bench", "--only", "l2_norm", "--set", "T=32", "--rounds", "2", "--device", "cpu"]) == 1
    assert "WRONG l2_norm/d64 triton" in capsys.readouterr().out


def test_figures_by_hand() -> None:
    found = bench.figures([2.0, 1.0, 3.0], Cost(4 * 10**12, 8 * 10**9), 16, GPUS["A100"])
    assert found["median"] == 2.0 and found["least"] == 1.0 and found["spread"] == 1.0 and found["rounds"] == 3
    assert found["flops_per_second"] == 2e12 and found["bytes_per_second"] == 4e9
    assert found["share_of_floor"] == pytest.approx(4 / 312 / 2)
    assert "share_of_floor" not in bench.figures([1.0], Cost(1, 1), 32, None)


def test_growth_finds_the_power() -> None:
    rows = [{**row(3e-3 * (t / 1000) ** 1.5), "sizes": {"T": t, "D": 8}} for t in (1000, 2000, 8000, 16000)] + [
        {**row(name="peer"), "sizes": {"T": t}} for t in (1000, 2000)
    ]
    (found,) = growth.growth(rows, "T")
    assert found["power"] == pytest.approx(1.5) and found["r2"] == pytest.approx(1.0) and found["to"] == 16000
    assert "w torch, forward: time ∝ T^1.50 (r² 1.000) from 1000 to 16000" in growth.text([found])
    # By hand: y = 0, 0, 1 over x = 0, 1, 2 has slope 1/2, and residuals 1/6, -1/3, 1/6 of a whole of 2/3.
    power, r2 = growth.fit([1, 10, 100], [1.0, 1.0, 10.0])
    assert power == pytest.approx(1 / 2) and r2 == pytest.approx(1 - (1 / 6) / (2 / 3))
    with pytest.raises(ValueError, match="three different ones"):
        growth.fit([1, 1, 2], [1.0, 2.0, 3.0])


def test_functions_take_turns() -> None:
    order = []
    seconds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4 and [len(each) for each in seconds.values()] == [3, 3], "once each to warm up"


def test_the_command_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "peak_bytes", lambda call, device: 7_000_000)  # the true one slows the process
    words = ["bench", "--only", "l2_norm", "--device", "cpu", "--rounds", "2", "--sweep", "T=16..64", "--memory"]
    files = {name: tmp_path / f"b.{name}" for name in ("json", "plot", "trace")}
    files["plot"] = tmp_path / "b.png"
    assert command.main(words + [word for name, path in files.items() for word in (f"--{name}", str(path))]) == 0
    told = capsys.readouterr().out
    assert "× torch" in told and "floor" not in told.split("\n", 1)[1], "no floor, no absolute claim on a CPU"
    written = json.loads(files["json"].read_text())
    rows, grown = written["rows"], written["growth"]
    assert {row["sizes"]["T"] for row in rows} == {16, 32, 64}
    assert [(row["from"], row["to"]) for row in grown] == [(16, 64)] * 6 and "time ∝ T^" in told
    assert {row["implementation"] for row in rows} == {"torch", "reference", "torch.nn"}
    assert all(
        row["check"]["right"] and row["seconds"]["median"] > 0 and row["peak_bytes"] == 7_000_000 for row in rows
    )
    assert "peak memory: torch 7 MB" in told
    assert json.loads(files["trace"].read_text())["traceEvents"]
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_a_sweep(tmp_path: Path) -> None:
    from palimpsest.kernels.profile.plot import plot

    with pytest.raises(ValueError, match="plot needs a sweep"):
        plot(tmp_path / "b.png", [], {})


def row(median: float = 1.0, peak: int = 100, times: float = 1.0, right: bool = True, name: str = "torch") -> dict:
    """A row of a result file."""
    made = {"workload": "w", "sizes": {"T": 1}, "dtype": "float32", "pass": "forward", "implementation": name}
    made |= {"check": {"right": right}, "times_torch": times, "peak_bytes": peak}
    return {**made, "seconds": {"median": median}} if right else made


@pytest.mark.parametrize(
    "gpu, after, told, status",
    [
        ("H200", [row(1.04)], "same", 0),
        ("H200", [row(1.2)], "WORSE", 1),
        ("H200", [row(0.5)], "better", 0),
        ("H200", [row(1.0, peak=120)], "memory +20.0%", 1),
        ("H200", [row(right=False)], "WRONG", 1),
        ("H200", [], "MISSING", 1),
        ("H200", [row(), row(name="triton")], "new", 0),
        (None, [row(9.0)], "same", 0),
        (None, [row(1.0, times=0.5)], "time beside torch +100.0%", 1),
    ],
)
def test_compare(gpu: str | None, after: list, told: str, status: int, tmp_path: Path, capsys) -> None:
    for name, rows in (("a", [row()]), ("b", after)):
        (tmp_path / name).write_text(json.dumps({"machine": {"gpu": gpu}, "rows": rows}))
    assert command.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == status
    assert told in capsys.readouterr().out


def test_compare_refuses_other_files(tmp_path: Path) -> None:
    for name, gpu in (("a", "A100"), ("b", "H200")):
        (tmp_path / name).write_text(json.dumps({"machine": {"gpu": gpu}, "rows": [row()]}))
    (tmp_path / "c").write_text("[]")
    with pytest.raises(ValueError, match="measured on A100 and on H200"):
        command.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(ValueError, match="it must be what bench --json wrote"):
        command.main(["compare", str(tmp_path / "a"), str(tmp_path / "c")])


def test_arguments_are_the_same_numbers_in_every_dtype() -> None:
    wide = NORM.arguments(Draw(torch.float32), NORM.check)["x"]
    assert torch.equal(NORM.arguments(Draw(torch.bfloat16), NORM.check)["x"], wide.bfloat16())
