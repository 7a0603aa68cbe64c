"""What every mixer must do. One suite over the registry; float64 throughout.

The bound 1e-10 on RMS-relative differences is far above the rounding of a few hundred operations in float64 (about
1e-13 here) and far below what any wrong term would make.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from palimpsest.models.state import State, load_state

from .mixers import DIM, REGISTRY, small_mixer, tokens

BOUND = 1e-10
LENGTH = 23
every_mixer = pytest.mark.parametrize("name", REGISTRY)


def gap(a: Tensor, b: Tensor) -> float:
    """RMS of the difference over RMS of b."""
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def leaves(tree: dict[str, Any]) -> list[Tensor]:
    return [leaf for x in tree.values() for leaf in (leaves(x) if isinstance(x, dict) else [x])]


def pairs(whole: dict[str, Any], part: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Every leaf of ``part`` beside that of ``whole``, which may hold more: of several rows, what only one needs."""
    found = []
    for name, x in part.items():
        found += pairs(whole[name], x) if isinstance(x, dict) else [(whole[name], x)]
    return found


@every_mixer
@pytest.mark.parametrize("cut", [1, 4, 5, 6, 7, 13, 22])
def test_split_anywhere_is_whole(name: str, cut: int) -> None:
    mixer, x = small_mixer(name), tokens(2, LENGTH)
    whole, end = mixer(x)
    first, state = mixer(x[:, :cut])
    rest, after = mixer(x[:, cut:], state)
    assert gap(torch.cat([first, rest], 1), whole) <= BOUND
    for a, b in zip(leaves(after), leaves(end), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=0, atol=BOUND)


@every_mixer
def test_decoding_is_prefill(name: str) -> None:
    mixer, x = small_mixer(name), tokens(2, LENGTH)
    state, outputs = mixer.init_state(2, x.device, x.dtype), []
    for t in range(LENGTH):
        y, state = mixer(x[:, t : t + 1], state)
        outputs.append(y)
    assert gap(torch.cat(outputs, 1), mixer(x)[0]) <= BOUND


@every_mixer
def test_the_future_changes_nothing(name: str) -> None:
    mixer, x = small_mixer(name), tokens(2, LENGTH)
    before = mixer(x)[0]
    for t in (1, 5, 6, 9, 14, 22):
        moved = x.clone()
        moved[:, t:] += tokens(2, LENGTH - t, seed=2)
        after = mixer(moved)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@every_mixer
def test_no_gradient_from_the_past_to_the_future(name: str) -> None:
    mixer, x = small_mixer(name), tokens(1, LENGTH).requires_grad_()
    y = mixer(x)[0]
    for t in (3, 7, 12):
        (grad,) = torch.autograd.grad(y[:, :t].square().sum(), x, retain_graph=True)
        assert grad[:, t:].abs().max() == 0
        assert grad[:, :t].abs().amin(-1).min() > 0


@every_mixer
def test_rows_are_independent(name: str) -> None:
    mixer, x = small_mixer(name), tokens(3, LENGTH)
    before = mixer(x)[0]
    moved = x.clone()
    moved[1] += 1
    after = mixer(moved)[0]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


@every_mixer
def test_packed_documents_are_separate(name: str) -> None:
    mixer, x = small_mixer(name), tokens(1, LENGTH)
    borders = [0, 4, 4, 5, 16, LENGTH]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    packed, state = mixer(x, None, cu_seqlens)
    again = tokens(1, LENGTH, seed=3)
    more, last = mixer(again, state, cu_seqlens)
    for row, (a, b) in enumerate(pairwise(borders)):
        if a == b:
            continue
        alone, own = mixer(x[:, a:b])
        assert gap(packed[:, a:b], alone) <= BOUND
        longer, end = mixer(again[:, a:b], own)
        assert gap(more[:, a:b], longer) <= BOUND
        for whole, part in pairs(last, end):
            if whole.shape[1:] == part.shape[1:]:
                assert torch.allclose(whole[row], part[0], rtol=0, atol=BOUND)


@every_mixer
def test_rows_at_different_places(name: str) -> None:
    """A row that was reset goes on beside rows that were not."""
    mixer, x = small_mixer(name), tokens(3, LENGTH)
    state = State([mixer(x[:, :9])[1]], torch.full((3,), 9))
    fresh = State([mixer.init_state(1, x.device, x.dtype)], torch.zeros(1, dtype=torch.int64))
    y, _ = mixer(x[:, 9:], state.reset([1], fresh).layers[0])
    assert gap(y[[0, 2]], mixer(x)[0][[0, 2], 9:]) <= BOUND
    assert gap(y[1:2], mixer(x[1:2, 9:])[0]) <= BOUND


@every_mixer
def test_state_goes_through_a_file(name: str, tmp_path: Any) -> None:
    mixer, x = small_mixer(name), tokens(2, LENGTH)
    state = State([mixer(x[:, :9])[1]], torch.full((2,), 9), "print")
    state.save(tmp_path / "state.safetensors")
    again = load_state(tmp_path / "state.safetensors")
    assert (again.fingerprint, again.rows, again.bytes) == ("print", 2, state.bytes)
    held = dict(state.tensors())
    assert {key: x.dtype for key, x in again.tensors()} == {key: x.dtype for key, x in held.items()}
    assert torch.equal(mixer(x[:, 9:], again.layers[0])[0], mixer(x[:, 9:], state.layers[0])[0])


@every_mixer
def test_a_state_is_never_changed(name: str) -> None:
    mixer, x = small_mixer(name), tokens(2, LENGTH)
    _, state = mixer(x[:, :9])
    kept = [leaf.clone() for leaf in leaves(state)]
    mixer(x[:, 9:], state)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), kept, strict=True))


@every_mixer
def test_repeating_is_bitwise_equal(name: str) -> None:
    mixer, x = small_mixer(name), tokens(2, LENGTH)
    results = []
    for _ in range(2):
        mixer.zero_grad()
        y, _ = mixer(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in mixer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_mixer
def test_every_parameter_is_reached(name: str) -> None:
    mixer, x = small_mixer(name), tokens(2, LENGTH)
    mixer(x, None, None, False)[0].square().sum().backward()
    for parameter, tensor in mixer.named_parameters():
        assert tensor.grad is not None and tensor.grad.abs().max() > 0, parameter


@every_mixer
def test_gradients_against_finite_differences(name: str) -> None:
    mixer, x = small_mixer(name), tokens(1, 9).requires_grad_()
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    values = [p.detach().clone().requires_grad_() for p in parameters]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        return functional_call(mixer, weights, (x,), {"return_state": False})[0]

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@every_mixer
def test_gradients_go_through_the_state(name: str) -> None:
    mixer, x = small_mixer(name), tokens(2, LENGTH)
    grads = []
    for cut in (0, 9):
        mixer.zero_grad()
        first, state = mixer(x[:, :cut]) if cut else (x[:, :0], None)
        y = torch.cat([first, mixer(x[:, cut:], state)[0]], 1)
        y.sin().sum().backward()
        grads.append([p.grad for p in mixer.parameters()])
    for a, b in zip(*grads, strict=True):
        assert gap(a, b) <= BOUND


@every_mixer
@pytest.mark.parametrize("length", [1, 4, 5, 6, 13])
def test_fast_paths_agree_with_the_references(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = small_mixer(name), tokens(2, length)
    results = []
    for backend in ("torch", "reference"):
        monkeypatch.setenv("PALIMPSEST_BACKEND", backend)
        mixer.zero_grad()
        y, _ = mixer(x)
        y.sin().sum().backward()
        # At length 1 a read before the write knows nothing of the gates: they have no gradient, or one of zeros.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in mixer.parameters()]
        results.append([y, *grads])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= BOUND * max(1.0, b.abs().max().item())


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    """Values stay near float64's. Units in the last place times the depth of the layer: 2^-24 and 2^-8, times 64."""
    exact, mixer, x = small_mixer(name), small_mixer(name).to(dtype), tokens(2, 13)
    exact.load_state_dict({key: value.double() for key, value in mixer.state_dict().items()})
    y, state = mixer(x.to(dtype))
    assert y.dtype == dtype
    assert gap(y.double(), exact(x.to(dtype).double())[0]) <= 64 * (2**-24 if dtype == torch.float32 else 2**-8)
    for key in ("memory", "segment"):
        for leaf in leaves({key: state.get(key, {}).get("memory", {})}):
            assert leaf.dtype in (torch.float32, torch.int32)


def test_the_width_is_kept() -> None:
    for name in REGISTRY:
        assert small_mixer(name)(tokens(1, 3))[0].shape == (1, 3, DIM)
