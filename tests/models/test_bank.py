"""The bank of chunks: what it keeps, what it gives up, what it costs, and that nobody notices before it is full."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palimpsest.models import build, load_state, stream
from palimpsest.models.bank import MemoryBank
from palimpsest.models.config import ConfigError, ModelConfig, validate
from palimpsest.models.mixer_config import Bank
from palimpsest.models.mixers import make_mixer
from palimpsest.models.state import State

from .mixers import HCAM, small_model, tokens
from .test_chunk_memory import hcam

BOUND = 1e-10
UNION = {"kind": "block_union", "heads": 2, "chunk_size": 3, "top_k": 2}


def layer(mixer: dict[str, Any], **bank: Any) -> Any:
    """A mixer with seed 0's weights; with a bank where its keys are given."""
    torch.manual_seed(0)
    config = validate(ModelConfig, small_model({**mixer, **({"bank": bank} if bank else {})}))
    return make_mixer(config, config.mixer_of(0)).double().requires_grad_(False)


def step_by_step(mixer: Any, x: Tensor, sizes: Iterable[int]) -> tuple[Tensor, Any]:
    """Outputs and the state of calls of these many tokens."""
    outputs, state, at = [], None, 0
    for size in sizes:
        y, state = mixer(x[:, at : at + size], state)
        outputs.append(y)
        at += size
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize(
    "mixer",
    [
        HCAM,
        {**UNION, "share": 3, "scorer": {"kind": "representative", "tokens": 1}},
        {**HCAM, "branching": 2, "chunk_size": 2},
    ],
)
@pytest.mark.parametrize("evict", ["fifo", "least_relevant"])
def test_a_bank_that_is_not_full_changes_nothing(mixer: dict[str, Any], evict: str) -> None:
    x = tokens(2, 26)
    expected = layer(mixer)(x)[0]
    found, state = step_by_step(layer(mixer, capacity=13, page=2, evict=evict), x, [7, 1, 1, 1, 10, 6])
    assert (found - expected).abs().max() <= BOUND
    held = (state if mixer["kind"] == "block_union" else state["memory"])["bank"]
    assert (held["written"] > 0).sum(1).tolist() == [26 // mixer["chunk_size"]] * 2


def test_first_in_first_out_is_a_window_of_chunks() -> None:
    x = tokens(1, 26)
    mixer = layer(HCAM, capacity=3, page=2)
    expected, _ = hcam(mixer, x[0], kept=3)
    found, state = step_by_step(mixer, x, [5, 4, 1, 1, 15])
    assert (found[0] - expected).abs().max() <= BOUND
    held = state["memory"]["bank"]
    assert sorted(held["written"][0].tolist()) == [18, 21, 24] and set(held["pages"]) == {"0", "1"}
    assert (found[0] - hcam(mixer, x[0])[0]).abs().max() > 1e-3  # it does make a difference


def filled(bank: MemoryBank, rows: int, chunks: int) -> dict[str, Any]:
    """A state after chunks of one token, of which chunk i holds i + 1."""
    state = bank.init_state(rows, (1, 2), torch.device("cpu"), torch.float64)
    for i in range(chunks):
        state = put(bank, state, list(range(rows)), i)
    return state


def put(bank: MemoryBank, state: dict[str, Any], rows: list[int], i: int, summary: Tensor | None = None) -> Any:
    count = state["written"].shape[0]
    k = torch.full((count, 1, 1, 2), i + 1.0, dtype=torch.float64)
    key = torch.tensor([[[float(i), 1.0]]], dtype=torch.float64).expand(count, 1, 2) if summary is None else summary
    return bank.write(state, rows, k, -k, key, torch.full((count,), i + 1))


def contents(bank: MemoryBank, state: dict[str, Any], row: int = 0) -> list[int]:
    """What the chunks of a row hold, slot by slot."""
    count = state["written"].shape[1]
    slots = torch.arange(count, dtype=torch.int32).view(1, 1, 1, count).repeat(len(state["written"]), 1, 1, 1)
    k, v, summary, have, chosen = bank.read(state, slots)
    assert torch.equal(k, -v) and have.tolist() == [count] * len(k) and torch.equal(chosen, slots)
    assert torch.equal(summary, state["summary"])
    return [int(value) for value in k[row, :, 0, 0]]


def test_what_is_given_up() -> None:
    """The first; the one not read for longest; the one read least per token. Of equals the oldest."""
    for evict, expected in (("fifo", [4, 2, 3]), ("lru", [1, 4, 3]), ("least_relevant", [1, 2, 4])):
        bank = MemoryBank(Bank(capacity=3, evict=evict, page=2), 1)
        state = filled(bank, 2, 3)
        slots = torch.tensor([[0, 1, 2], [0, -1, 2]], dtype=torch.int32).view(1, 2, 1, 3).expand(2, 2, 1, 3)
        weight = (
            torch.tensor([[0.4, 0.5, 0.1], [0.9, 0.0, 0.1]], dtype=torch.float64).view(1, 2, 1, 3).expand(2, -1, 1, 3)
        )
        state = bank.touched(state, slots, weight, torch.tensor([[3, 4], [3, 4]]))
        assert state["used"].tolist() == [[5, 4, 5]] * 2
        assert torch.allclose(state["weight"], torch.tensor([[1.3, 0.5, 0.2]] * 2, dtype=torch.float64))
        state = put(bank, state, [1], 3)
        assert contents(bank, state, 1) == expected and contents(bank, state, 0) == [1, 2, 3]
        assert state["used"][1].max() == 5 and state["weight"][1].min() == 0
    bank = MemoryBank(Bank(capacity=3, evict="lru"), 1)
    state = filled(bank, 1, 3)
    same = {**state, "used": torch.full_like(state["used"], 7), "written": torch.tensor([[3, 2, 1]])}
    assert contents(bank, put(bank, same, [0], 8)) == [1, 2, 9]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("learning", [False, True])
def test_only_what_is_new_is_written(learning: bool) -> None:
    bank = MemoryBank(Bank(capacity=4, write="surprise", threshold=0.1), 1)
    state = bank.init_state(1, (1, 2), torch.device("cpu"), torch.float64)
    for i, key in enumerate([(1.0, 0.0), (3.0, 0.1), (0.0, 1.0), (0.1, 5.0), (-1.0, 0.0)]):
        summary = torch.tensor([[key]], dtype=torch.float64, requires_grad=learning)
        state = put(bank, state, [0], i, summary)
    assert contents(bank, state)[:3] == [1, 3, 5] and (state["written"] > 0).sum() == 3


def test_a_write_copies_its_own_page_alone() -> None:
    bank = MemoryBank(Bank(capacity=7, page=3), 1)
    state = filled(bank, 2, 5)
    kept = {name: page["k"].clone() for name, page in state["pages"].items()}
    after = put(bank, state, [0, 1], 5)
    assert after["pages"]["0"] is state["pages"]["0"] and after["pages"]["1"] is not state["pages"]["1"]
    assert all(torch.equal(page["k"], kept[name]) for name, page in state["pages"].items())
    assert after["written"].shape[1] == 6 and put(bank, after, [0], 6)["written"].shape[1] == 7


@pytest.mark.parametrize("mixer", [HCAM, UNION])
def test_near_chunks_are_the_chunks(mixer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pages lie on another device copies are kept: never a stale one, and never more than allowed."""
    x, keys = tokens(2, 60), {"capacity": 4, "page": 2, "near": 5, "ahead": 1, "evict": "lru"}
    expected, _ = step_by_step(layer(mixer, **keys), x, [20] + [1] * 40)
    monkeypatch.setattr(MemoryBank, "_far", lambda bank, device: True)
    made = layer(mixer, **keys)
    with torch.no_grad():
        found, _ = step_by_step(made, x, [20] + [1] * 40)
        assert (found - expected).abs().max() <= BOUND
        near = made.store.bank._near
        assert len(near) == 5
        bank = MemoryBank(Bank(capacity=4, page=2), 1)
        state = filled(bank, 1, 4)
        assert contents(bank, state) == [1, 2, 3, 4] and len(bank._near) == 4
        held = {key: entry[1] for key, entry in bank._near.items()}
        state = put(bank, state, [0], 8)
        assert contents(bank, state) == [9, 2, 3, 4] and len(bank._near) == 6
        assert sum(bank._near[key][1] is value for key, value in held.items()) == 4


def test_a_long_stream_in_bounded_memory() -> None:
    """Once the bank is full nothing grows, and what lies outside of it was bounded from the start."""
    torch.manual_seed(0)
    mixer = {**HCAM, "chunk_size": 4, "bank": {"capacity": 4, "page": 4, "evict": "lru"}}
    model = build({"model": small_model(mixer, layers=1)})
    text = torch.randint(0, 11, (1, 181), generator=torch.Generator().manual_seed(0))
    sizes, outside = [], []
    for _, state in stream(model, text, 20):
        sizes.append(state.bytes)
        outside.append(sum(x.numel() * x.element_size() for name, x in state.tensors() if "pages" not in name))
    assert len(set(sizes[2:])) == 1 and len(set(outside[2:])) == 1
    assert max(sizes) == sizes[-1] and outside[-1] < sizes[-1] / 2


def test_a_state_without_pages_goes_through_a_file(tmp_path: Path) -> None:
    mixer, x = layer(HCAM, capacity=3), tokens(2, 12)
    State([mixer(x[:, :2])[1]], torch.full((2,), 2)).save(tmp_path / "s")
    again = load_state(tmp_path / "s").layers[0]
    assert "pages" not in again["memory"]["bank"]
    assert (mixer(x[:, 2:], again)[0] - mixer(x)[0][:, 2:]).abs().max() <= BOUND


def test_rows_with_banks_of_different_sizes() -> None:
    """Documents of different lengths, packed, and one row that begins anew."""
    mixer, x = layer(HCAM, capacity=6, page=1), tokens(1, 30)
    borders = [0, 4, 22, 30]
    _, state = mixer(x, None, torch.tensor(borders, dtype=torch.int32))
    y, _ = mixer(tokens(3, 8, seed=4), state)
    for n, (a, b) in enumerate(pairwise(borders)):
        _, own = mixer(x[:, a:b])
        assert (y[n : n + 1] - mixer(tokens(3, 8, seed=4)[n : n + 1], own)[0]).abs().max() <= BOUND
    fresh = State([mixer.init_state(1, x.device, x.dtype)], torch.zeros(1, dtype=torch.int64))
    again = State([state], torch.tensor([4, 18, 8])).reset([1], fresh)
    z, _ = mixer(tokens(3, 8, seed=4), again.layers[0])
    assert (z[[0, 2]] - y[[0, 2]]).abs().max() <= BOUND
    assert (z[1:2] - mixer(tokens(3, 8, seed=4)[1:2])[0]).abs().max() <= BOUND


def test_configurations_that_cannot_be() -> None:
    for keys, words in (
        ({"share": 2, "bank": {"capacity": 4}}, "share was 2; with a bank it must divide chunk_size = 3"),
        ({"bank": {}}, "mixer.bank.capacity is missing"),
        ({"bank": {"capacity": 4, "evict": "lfu"}}, "mixer.bank.evict was 'lfu'"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(ModelConfig, small_model({**HCAM, **keys}))
