"""What is neural memory's own: its spec, its schedule of ragged rows, its training memory, reads, and bad input."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_neural_memory import make
from harness import EXACT, Draw, error

from palimpsest.kernels import MemorySpec, neural_memory, neural_memory_read, neural_memory_state
from palimpsest.kernels.neural_memory.cost import matmul_flops, segment_chunks
from palimpsest.kernels.neural_memory.reference import network
from palimpsest.kernels.neural_memory.schedule import make_schedule

SPEC = MemorySpec(expansion=2, chunk_size=4)


def arguments(spec: MemorySpec = SPEC, batch: int = 2, length: int = 6) -> dict[str, Any]:
    """Float32 arguments of a call."""
    return make(Draw(0, torch.float32), batch, length, spec=spec)


def state(rows: int = 2, spec: MemorySpec = SPEC) -> dict[str, torch.Tensor]:
    """A fresh state that fits :func:`arguments`."""
    return neural_memory_state(arguments(spec)["weights"], rows, spec)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"q": torch.zeros(2, 6, 4)}, r"q\.shape was \(2, 6, 4\)"),
        ({"q": torch.zeros(2, 6, 2, 4, dtype=torch.int64)}, r"q\.dtype was int64"),
        ({"k": torch.zeros(2, 5, 2, 4)}, r"k\.shape was \(2, 5, 2, 4\)"),
        ({"k": torch.zeros(2, 6, 2, 4, dtype=torch.float16)}, r"k\.dtype was float16"),
        ({"v": torch.zeros(2, 6, 2, 5)}, r"v\.shape was \(2, 6, 2, 5\)"),
        ({"v": torch.zeros(2, 6, 2, 4, device="meta")}, r"v\.device was meta"),
        ({"step": torch.zeros(2, 6)}, r"step\.shape was \(2, 6\)"),
        ({"step": torch.zeros(2, 6, 2, dtype=torch.float64)}, r"step\.dtype was float64"),
        ({"step": None}, "step was NoneType; it must be a tensor"),
        ({"log_retain": None}, "log_retain was None; it must be given"),
        ({"log_momentum": torch.zeros(2, 6, 1)}, r"log_momentum\.shape was \(2, 6, 1\)"),
        ({"spec": MemorySpec(expansion=2, rule="gd")}, "log_momentum was a tensor .*must be None"),
        ({"spec": "titans"}, "spec was str; it must be a MemorySpec"),
        ({"gamma": torch.zeros(2, 6, 2)}, "gamma was a tensor .*must be None for window=1"),
        ({"spec": MemorySpec(expansion=2, window=2)}, "gamma was None; it must be given for window=2"),
        ({"spec": MemorySpec(expansion=2, bias="huber")}, "delta was None; it must be given for bias='huber'"),
        ({"weights": []}, "weights was 0 tensors; it must be 2"),
        ({"weights": [torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)]}, r"weights\[1\]\.shape was \(2, 4, 8\)"),
        ({"norm": None}, "norm was None; it must be given"),
        ({"norm": torch.ones(4)}, r"norm\.shape was \(4,\)"),
        ({"state": {}}, "state was keys"),
        ({"state": state(3)}, r"state\['weights\.0'\]\.shape was \(3, 2, 4, 8\)"),
        ({"state": state() | {"position": torch.zeros(2)}}, r"state\['position'\]\.dtype was float32"),
        ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, "batch size with cu_seqlens was 2"),
        ({"backend": "cuda"}, "backend of neural_memory was 'cuda'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        neural_memory(**(arguments() | change))


@pytest.mark.parametrize("borders", [[0, 3, 5], [1, 6], [0, 4, 3, 6]])
def test_borders_that_do_not_fit_are_named(borders: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens was"):
        neural_memory(**arguments(batch=1), cu_seqlens=torch.tensor(borders, dtype=torch.int32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"network": "rnn"}, {"bias": "l1"}, {"retention": "l1"}, {"rule": "adam"}, {"depth": 0}, {"expansion": 1.5},
        {"chunk_size": 0}, {"norm": 1}, {"network": "linear", "depth": 2}, {"network": "mlp", "depth": 1},
        {"network": "gated_mlp", "depth": 3}, {"window": 0}, {"ns_steps": 0}, {"lp_power": 0.5}, {"lp_sharpness": 0},
        {"lp_smoothing": float("nan")}, {"lq_power": 1.5}, {"ns_every": 8}, {"rule": "muon", "ns_every": 0},
        {"rule": "muon", "ns_every": 48}, {"retention": "kl", "rule": "muon"}, {"retention": "kl", "rule": "muon_gd"},
        {"rule": "muon_gd", "chunk_size": 1}, {"rule": "muon_gd", "ns_every": 1},
    ],
)  # fmt: skip
def test_a_spec_that_means_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        MemorySpec(**wrong)


def test_a_spec_survives_its_encoding() -> None:
    odd = MemorySpec("gated_mlp", bias="lp", rule="muon", window=3, ns_every=16, lp_smoothing=1e-9, lp_power=2.5)
    for spec in (MemorySpec(), MemorySpec("linear", norm=True), MemorySpec(rule="gd", chunk_size=1, norm=False), odd):
        assert MemorySpec.decode(spec.encode()) == spec


def test_work_is_in_proportion_to_tokens_however_unequal_the_rows() -> None:
    borders = torch.tensor([0, 40, 41, 41, 43], dtype=torch.int32)
    position = torch.tensor([1, 0, 2, 3], dtype=torch.int32)
    schedule = make_schedule(1, 43, 4, position, borders, torch.device("cpu"))
    slots = sum(step.index.numel() for step in schedule.steps if step.index is not None)
    tokens = torch.cat([step.index[step.valid] for step in schedule.steps if step.valid is not None])
    assert tokens.sort().values.equal(torch.arange(43)), "every token once"
    assert slots <= 43 + 4 * 4, "no more empty slots than a chunk for each sequence"
    assert schedule.position.tolist() == [(1 + 40) % 4, 1, 2, (3 + 2) % 4]


def test_a_document_of_nan_stays_alone() -> None:
    given = arguments(batch=1, length=9)
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    clean, _ = neural_memory(**given, cu_seqlens=borders)
    broken = given | {"k": given["k"].clone()}
    broken["k"][:, :4] = torch.nan
    found, _ = neural_memory(**broken, cu_seqlens=borders)
    assert found[:, :4].isnan().any() and found[:, 4:].equal(clean[:, 4:])


@pytest.mark.parametrize(
    "spec", [SPEC, MemorySpec("linear", retention="none", rule="gd"), MemorySpec("gated_mlp", expansion=2)]
)
def test_read_is_the_network(spec: MemorySpec) -> None:
    given = make(Draw(0, torch.float64), 2, 5, spec=spec)
    wanted = network(given["q"], given["weights"], given["norm"], spec)
    at = {"spec": spec, "norm": given["norm"]}
    for weights in (given["weights"], neural_memory_state(given["weights"], 2, spec)):
        assert error(neural_memory_read(given["q"], weights=weights, **at), wanted) <= EXACT


def test_reading_without_the_norm_it_needs_is_named() -> None:
    given = arguments()
    with pytest.raises(ValueError, match="norm was None; it must be given"):
        neural_memory_read(given["q"], weights=given["weights"], spec=SPEC)


def test_values_wider_than_keys() -> None:
    """A linear memory maps D to any D_v."""
    spec = MemorySpec("linear", chunk_size=4)
    draw = Draw(0, torch.float64)
    given = make(draw, 2, 9, spec=spec) | {"v": draw.normal(2, 9, 2, 7), "weights": [draw.normal(2, 4, 7)]}
    assert error(neural_memory(**given)[0], neural_memory(**given, backend="reference")[0]) <= EXACT


def test_no_tokens_leave_the_state_as_it_was() -> None:
    before = neural_memory(**arguments(), return_state=True)[1]
    assert before is not None
    o, after = neural_memory(**arguments(length=0), state=before, return_state=True)
    assert after is not None
    assert o.shape == (2, 0, 2, 4) and all(after[name].equal(x) for name, x in before.items())


def test_flops_are_those_of_the_products() -> None:
    """Counted by hand: D = 4, F = 8, C = 4, momentum; 5 and 6 products with a matrix, C + 1 half products."""
    assert matmul_flops(1, 1, [(4, 8), (8, 4)], SPEC) == 2 * 32 * 5 + 12 * 5 + 2 * 32 * 6 + 12 * 5


def test_training_memory_grows_as_predicted(tmp_path: Path) -> None:
    """In a process of its own, whose memory nobody else touches; 10 % is what pages and small blocks may add."""
    command = [sys.executable, "-m", "palimpsest.kernels.profile.memory", "--chunks", "32", "--heads", "2"]
    command += ["--lengths", "2048", "4096", "8192", "--json", str(tmp_path / "memory.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    row = json.loads((tmp_path / "memory.json").read_text())["rows"][0]
    assert row["slope"] == pytest.approx(row["predicted"], rel=0.1)
    spec = MemorySpec(chunk_size=32)
    assert segment_chunks(spec, [(64, 256), (256, 64)]) == 8  # 65,536 numbers of state over 256 a token over 32 tokens
