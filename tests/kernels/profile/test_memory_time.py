"""The predicted time of the neural memory: bytes by hand, and the figures of its document."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from palimpsest.kernels import MemorySpec
from palimpsest.kernels.neural_memory.plans import call
from palimpsest.kernels.profile.memory_time import kernels
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
