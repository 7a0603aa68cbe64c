"""The predicted time of the neural memory: bytes by hand, and the figures of its document."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from palimpsest.kernels import MemorySpec
from palimpsest.kernels.neural_memory.plans import call
from palimpsest.kernels.profile.memory_time import kernels, main, tokens_of, turn_bytes
from palimpsest.kernels.profile.plans import launches_of

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "neural_memory.md"


def test_bytes_of_a_step() -> None:
    """Two layers of [64, 256] with momentum, W and S, in segments of four steps; tiles of 64 tokens."""
    w, tile = 2 * 64 * 256 * 4, 64 * 256
    of_each = kernels(MemorySpec(), 64)
    assert of_each["states"].bytes == 6 * w and of_each["states"].far == 2 * w
    assert of_each["states, replayed"].bytes == (3 * 6 + 5) / 4 * w
    assert of_each["reads"].bytes == 3 * w + 4 * tile
    assert of_each["reads_backward"].bytes == 2 * w + 20 * tile + 28 * 64 * 64
    assert of_each["carry"].bytes == 13.5 * w + 52 * tile
    assert of_each["carry"].seconds(128, 64) == pytest.approx(64 * (13.5 * w + 52 * tile) / (5.5e12 / 128))
    assert of_each["carry"].seconds(133, 64) == pytest.approx(2 * 64 * (13.5 * w + 52 * tile) / (5.5e12 / 132)), "waves"
    assert of_each["states"].seconds(1, 64) == pytest.approx(64 * 6 * w / 110e9), "one multiprocessor has no more"


def test_newton_schulz_by_hand() -> None:
    """Of [64, 256] one block of rows and four of columns; of [128, 128] two of each, and one step."""
    m, q = 64 * 256 * 4, 64 * 64 * 4
    # To the workspace and back 5 m; a step: Y twice, A written and read three times, P written and read four times, Y
    # twice, and the next one written.
    assert turn_bytes(64, 256, 5, False) == 5 * m + 5 * (2 * m + 5 * q + 3 * m + 4 * q)
    again = 4 * m + 5 * (2 * m + 5 * q) + 4 * (3 * m + 4 * q)
    assert turn_bytes(64, 256, 5, True) == again + 5 * (2 * m + 2 * (3 * m + 4 * q) + 11 * q) + 6 * m
    m = 128 * 128 * 4
    assert turn_bytes(128, 128, 1, False) == 5 * m + 4 * m + 7 * m + 4 * m + 2 * m


def test_bytes_of_a_step_of_muon() -> None:
    """As that above; all chunks of a segment but the last are orthogonalised again, one after each step."""
    w, tile = 2 * 64 * 256 * 4, 64 * 256
    of_each = kernels(MemorySpec(rule="muon"), 64)
    forth, back = (2 * turn_bytes(64, 256, 5, backward) for backward in (False, True))
    assert of_each["states"].bytes == 6 * w + forth and of_each["reads"].bytes == w + 4 * tile
    steps = 6  # W, S and the anchor are kept, 3 w for 4 · 64 · 64 numbers of 4 bytes
    assert of_each["states, replayed"].bytes == pytest.approx(6 * w + forth * (steps - 1) / steps)
    assert of_each["reads, replayed"].bytes == 2 * w + 16 * tile
    assert of_each["carry"].bytes == (11.5 + 3) * w + 52 * tile + back
    half = kernels(MemorySpec(rule="muon", ns_every=32), 64)["states"]
    assert half.bytes == 6 * w + forth, "steps of 32, each of which ends in one"


def test_a_window_takes_more_steps() -> None:
    """Of 64 slots, of which 32 are tokens of their own; muon comes after every second one."""
    spec = MemorySpec(rule="muon", window=16)
    inner, own = tokens_of(spec, 64)
    assert (inner.window, inner.chunk_size, own) == (1, 128, 32) and tokens_of(MemorySpec(), 64) == (MemorySpec(), 64)
    w = 2 * 64 * 256 * 4
    assert kernels(spec, 64)["states"].bytes == 6 * w + turn_bytes(64, 256, 5, False)
    assert kernels(MemorySpec(window=16), 64)["reads"] == kernels(MemorySpec(), 64)["reads"]
    with pytest.raises(ValueError, match="window was 58; it must be at most 57 with heads of 64"):
        tokens_of(MemorySpec(window=58), 64)


@pytest.mark.parametrize("rule, window", [("muon", 1), ("momentum", 16), ("muon", 16)])
def test_the_document_has_muon_and_windows(rule: str, window: int, capsys: pytest.CaptureFixture[str]) -> None:
    row = re.search(rf"^\| {rule}, {window} \| (.*) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    main(["--expansion", "4", "--rule", rule, "--window", str(window)])
    printed = capsys.readouterr().out
    times = re.findall(r"^  [a-z_, ]+? +(\d+\.\d\d) ms$", printed, re.MULTILINE)
    sums = re.search(r"forward (\S+) ms, backward (\S+) ms", printed).groups()
    launches = re.search(r"(\d+) launches", printed).groups()
    assert row[1].split(" | ") == [*times, *sums, *launches]


@pytest.mark.parametrize("expansion", [4, 1])
def test_the_document_has_what_the_command_prints(expansion: int) -> None:
    row = re.search(rf"^\| {64 * expansion} \| (.*) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    *found, forward, backward, launches = (float(cell) for cell in row[1].split("|"))
    spec = MemorySpec(expansion=expansion)
    times = [kernel.seconds(128, 64) * 1e3 for kernel in kernels(spec, 64).values()]
    assert found == [round(time, 2) for time in times]
    assert forward == round(sum(times[:2]), 1) and backward == round(sum(times[2:]), 1)
    with torch.enable_grad():
        assert launches == len(launches_of(partial(call, spec)))
