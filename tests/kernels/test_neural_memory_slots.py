"""Where the tokens of a memory with a window lie, and what its gates are: ``slots.py`` against what a loop says."""

from typing import Any

import pytest
import torch
from cases_neural_memory import make
from harness import Draw, error
from host_reads import no_reads
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_checks import CLOSE, launches

from palimpsest.kernels import MemorySpec, neural_memory, neural_memory_state
from palimpsest.kernels.launch import planning
from palimpsest.kernels.neural_memory.operator import neural_memory_op
from palimpsest.kernels.neural_memory.slots import Layout, inner_of, slots_of, tile_of

#: Window, chunk and width of heads; slots of a step, and how many of them are its own.
TILES = [
    (2, 16, 64, 32, 16),
    (16, 64, 64, 64, 32),
    (33, 64, 64, 64, 32),
    (34, 64, 64, 64, 16),
    (57, 128, 16, 64, 8),
    (40, 16, 16, 64, 16),
    (17, 64, 128, 32, 16),
    (25, 32, 128, 32, 8),
]


@pytest.mark.parametrize("window, chunk, width, slots, new", TILES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_slots_hold_every_step_and_its_halo(
    window: int, chunk: int, width: int, slots: int, new: int, packed: bool, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers in place of tokens, and of gradients, computed without a read on the host."""
    spec = MemorySpec(window=window, chunk_size=chunk)
    assert tile_of(spec, width) == (slots, new)
    borders = [0, 0, 3, 4, 4 + chunk, 75 + chunk] if packed else [0, 43, 86]
    tokens, rows, older = borders[-1], len(borders) - 1, window - 1
    position = torch.arange(rows, dtype=torch.int32) * 7 % chunk if warm else None
    cu_seqlens = torch.tensor(borders, dtype=torch.int32) if packed else None
    k = torch.empty((1, tokens, 1, width) if packed else (2, 43, 1, width))
    x = torch.arange(1.0, tokens + 1).view(k.shape[:2])
    held = -torch.arange(1.0, rows * older + 1).view(rows, older) if warm else None
    with no_reads(monkeypatch):
        layout = Layout(k, spec, position, cu_seqlens)
        keys, after = layout.as_keys(x, held)
        own = layout.as_own(x)
        assert own is not None
        back, of_held = layout.from_keys(keys, after)
        there = layout.from_own(own)
    every = slots_of(*k.shape[:2], rows, warm, packed, spec, width)
    assert keys.shape == own.shape == (1, every) and torch.equal(there, x)
    first, counts = 0, torch.zeros(tokens + 1 + rows * older)
    for n in range(rows):
        place = int(position[n]) if position is not None else 0
        line = [
            *(held[n].tolist() if held is not None else [0.0] * older),
            *x.flatten()[borders[n] : borders[n + 1]].tolist(),
        ]
        assert after[n].tolist() == line[len(line) - older :]
        for number in line[len(line) - older :]:
            counts[int(number)] += 1
        done = 0
        while done < len(line) - older:
            more = min(new - (place + done) % new, len(line) - older - done)
            step = [*[0.0] * (slots - new - older), *line[done : done + older + more]]
            assert keys[0, first : first + len(step)].tolist() == step
            assert own[0, first : first + len(step)].tolist() == [0.0] * (slots - new) + step[slots - new :]
            for number in step:
                counts[int(number)] += 1
            first, done = first + len(step), done + more
        if layout.position is not None:
            assert layout.position[n] == place // new * slots + place % new
        assert layout.after[n] == (place + len(line) - older) % chunk
        assert layout.cu_seqlens[n + 1] == first
    assert not keys[0, first:].any() and not own[0, first:].any()
    # The gradient of a token is the sum over the slots, and the halo after the call, that hold it.
    assert torch.equal(back.flatten(), x.flatten() * counts[1 : tokens + 1])
    if held is not None:
        assert of_held is not None
        assert torch.equal(of_held.flatten(), held.flatten() * counts[tokens + 1 :].flip(0))
    inner = inner_of(spec, width)
    assert inner.window == 1 and inner.chunk_size == chunk // new * slots


@pytest.mark.parametrize(
    "choices", [{}, {"rule": "gd", "retention": "none", "read_after_write": False}, {"rule": "muon"}]
)
def test_the_gates_of_a_window_are_right(choices: dict[str, Any]) -> None:
    """By the canaries that guard them on a GPU."""
    spec = MemorySpec("linear", chunk_size=16, window=3, **choices)
    given = make(Draw(0, torch.float32), 1, 3, spec=spec, heads=1, width=16)
    given["v"].requires_grad_()
    seen = []
    for launch in launches(lambda: neural_memory(**given, backend="triton")[0].sum().backward()):
        if "gates" in launch.kernel.name or "window" in launch.kernel.name:
            seen.append(launch.kernel.name)
            for i, (found, wanted) in enumerate(launch.kernel.canary(launch.constants)):
                distance = error(found, wanted)
                assert wanted.square().mean() > 0 and distance <= CLOSE, (launch.kernel.name, i, distance)
    assert sorted(seen) == ["neural_memory_gates", "neural_memory_gates_backward", "neural_memory_window_backward"]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_what_a_call_returns_has_the_shapes_it_says(packed: bool, warm: bool) -> None:
    """Also what is kept for the backward, of slots and not of tokens."""
    spec = MemorySpec("linear", chunk_size=16, window=3)
    given = make(Draw(0, torch.float32), 1 if packed else 3, 100, spec=spec, heads=1, width=16)
    borders = torch.tensor([0, 40, 41, 100], dtype=torch.int32) if packed else None
    state = list(neural_memory_state(given["weights"], 3, spec).values()) if warm else [None]
    tokens = [given[name] for name in ("q", "k", "v", "step", "log_retain", "log_momentum", "gamma", "delta")]
    arguments = *tokens, given["weights"], None, state[:-1], state[-1], borders, spec.encode(), True, True
    with planning():
        found = neural_memory_op(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        said = neural_memory_op(*arguments)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in said]


def test_kept_states_that_no_sequence_reaches_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's results must repeat."""
    spec = MemorySpec("linear", chunk_size=16, window=3, rule="gd")
    given = make(Draw(0, torch.float32), 1, 3, spec=spec, heads=1, width=16)
    tokens = [given[name] for name in ("q", "k", "v", "step", "log_retain", "log_momentum", "gamma", "delta")]
    borders = torch.tensor([0, 0, 0, 3], dtype=torch.int32)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        found = neural_memory_op(*tokens, given["weights"], None, [], None, borders, spec.encode(), True, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(found[-1]) > 3 and not torch.cat([x.flatten() for x in found]).isnan().any()
