"""The state object: files, rows, and refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.models import MemoryLM, State, build, load_state

from .mixers import REGISTRY, small_model


@pytest.fixture(scope="module")
def model() -> MemoryLM:
    torch.manual_seed(0)
    return build({"model": small_model([REGISTRY["mac"], REGISTRY["mag"], REGISTRY["attention"]], layers=3)}).double()


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(0, 11, (3, 20), generator=torch.Generator().manual_seed(0))


def test_saved_and_loaded(model: MemoryLM, text: torch.Tensor, tmp_path: Path) -> None:
    state = model(text[:, :9]).state
    state.save(tmp_path / "s")
    again = load_state(tmp_path / "s")
    assert torch.equal(model(text[:, 9:], again).logits, model(text[:, 9:], state).logits)
    assert again.position.tolist() == [9, 9, 9]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_what_is_not_a_state_is_refused(model: MemoryLM, text: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_such"):
        load_state(tmp_path / "no_such")
    path = tmp_path / "s"
    model(text[:, :9]).state.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_state(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        load_state(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="schema None; it must be"):
        load_state(path)


def test_a_state_of_another_model_is_refused(model: MemoryLM, text: torch.Tensor) -> None:
    other = build({"model": small_model(REGISTRY["mag"])}).double()
    with pytest.raises(ValueError, match=f"made by a model of configuration {other.fingerprint}"):
        model(text, other.init_state(3))
    with pytest.raises(ValueError, match="state was of 2 sequences; it must have 3"):
        model(text, model.init_state(2))
    with pytest.raises(ValueError, match="fresh was a state with 2 rows"):
        model.init_state(3).reset([1], model.init_state(2))
    with pytest.raises(ValueError, match="fresh was a state with 1 rows of model"):
        model.init_state(3).reset([1], other.init_state(1))


def test_what_the_fingerprint_covers(model: MemoryLM) -> None:
    same = build(model.config, **{"model.init_std": 0.1, "model.z_loss": 1e-4})
    assert same.fingerprint == model.fingerprint
    assert build(model.config, **{"model.rope_base": 500.0}).fingerprint != model.fingerprint


def test_reset_rows(model: MemoryLM, text: torch.Tensor) -> None:
    state = model(text[:, :9]).state.reset([0, -1], model.init_state(1))
    assert state.position.tolist() == [0, 9, 0]
    logits = model(text[:, 9:], state).logits
    assert torch.allclose(logits[[0, 2]], model(text[[0, 2], 9:]).logits, rtol=0, atol=1e-10)
    assert torch.allclose(logits[1], model(text).logits[1, 9:], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="boolean mask"):
        state.reset(torch.tensor([True, False, True]), model.init_state(1))


def test_select_rows(model: MemoryLM, text: torch.Tensor) -> None:
    state = model(text[:, :9]).state.select([2, 0, 0])
    picked = model(text[[2, 0, 0], 9:], state).logits
    assert torch.allclose(picked, model(text).logits[[2, 0, 0], 9:], rtol=0, atol=1e-10)


def test_moving_and_detaching(model: MemoryLM, text: torch.Tensor) -> None:
    state = model(text[:, :9]).state
    assert any(x.requires_grad for _, x in state.tensors())
    assert not any(x.requires_grad for _, x in state.detach().tensors())
    assert all(x.device.type == "meta" for _, x in state.to("meta").tensors())
    assert state.bytes == sum(x.numel() * x.element_size() for _, x in state.tensors())


def test_it_is_a_pytree(model: MemoryLM) -> None:
    doubled = torch.utils._pytree.tree_map(lambda x: x * 2, model(torch.zeros(1, 3, dtype=torch.int64)).state)
    assert isinstance(doubled, State)
    assert doubled.position.tolist() == [6] and doubled.fingerprint == model.fingerprint
