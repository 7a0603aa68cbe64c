"""Packed documents in divided sequences are those of one process, wherever their borders fall; and whole runs are."""

import random
from types import SimpleNamespace

import pytest
import torch
import training
import yaml
from training import MODEL, TRAIN, learnt

from palimpsest.train.sequence import Division
from palimpsest.train.sequence.check import CASES, packed
from palimpsest.train.sequence.documents import clipped, opened, pieces
from palimpsest.train.split import Batch

#: The largest relative difference in float64. Rounding makes up to 3e-15 in the losses, and in the gradients of the
#: memory with Omega and Muon 2e-12, as a change of its weights' last bits does in one process. A wrong or missing term
#: makes 1e-3 and more.
OUTPUTS, GRADIENTS = 1e-13, 1e-11

LENGTH = 23
PARTS = [0, 5, 11, 17, 23]  # of four processes
INSIDE = [0, 2, 8, 14, 20, 23]  # a border in every part

# The borders of ``packed``: a document of 21 tokens that lies in all four parts, two of which it fills; several borders
# in one part, one where two parts meet, and one inside of the last.
FEW = ["titans_mal", "tnt", "mixture of gated delta rules", "delta rule", "hcam and titans in turns"]
CUT = ["attention", "neural_memory", "titans_mag", "hcam", "block_union"]
WAYS = [("4 of 23", name) for name in CASES]
WAYS += [(way, name) for way in ("2 of 23", "4 of 6", "checkpointed", "states alone") for name in FEW]
WAYS += [(way, name) for way in ("border on border", "a border in each") for name in CUT]


@pytest.fixture(scope="module")
def checked(run, tmp_path_factory):
    few, cut = training.cases(FEW), training.cases(CUT)
    rows = f"length={LENGTH}, documents=check.packed({LENGTH})"
    ways = {
        "4 of 23": f"check.CASES, 4, {rows}",
        "2 of 23": f"{few}, 2, {rows}",
        "4 of 6": f"{few}, 4, length=6, documents=check.packed(6)",
        "checkpointed": f"{few}, 2, {rows}, again=True",
        "states alone": f"{few}, 2, {rows}, whole=True",
        "border on border": f"{cut}, 4, length={LENGTH}, documents=[{PARTS}]",
        "a border in each": f"{cut}, 4, length={LENGTH}, documents=[{INSIDE}]",
    }
    return training.checked(run, tmp_path_factory.mktemp("checked"), ways)


@pytest.mark.parametrize(("way", "name"), WAYS)
def test_every_mixer_is_that_of_one_process(checked, way, name):
    found = checked[way][name]
    assert found["outputs"] < OUTPUTS and found["gradients"] < GRADIENTS


@pytest.mark.parametrize("name", CUT)
def test_nothing_is_sent_where_documents_end_with_parts(checked, name):
    found = checked["border on border"][name]
    assert found["bytes"] == 0 and found["slots"] == found["worked"]


@pytest.mark.parametrize("name", CUT)
def test_nobody_waits_where_every_part_has_a_border(checked, name):
    """By the clocks of the messages: what the next part goes on with is run before what goes on with the last one's."""
    found = checked["a border in each"][name]
    assert found["bytes"] > 0 and found["slots"] == found["worked"]
    assert name == "attention" or found["worked"] == 2 * 2 * 2  # micro batches, layers, forward and backward


# -- where parts begin and end ----------------------------------------------------------------------------------------


def test_the_check_has_borders_everywhere():
    first, second = packed(LENGTH)
    assert [opened(first, x) for x in PARTS[1:-1]] == [2, 2, 2]  # one document in four parts
    assert len([x for x in second if 0 < x < 5]) == 2 and 11 in second and 19 in second


def test_a_part_has_the_borders_inside_of_it():
    borders = [0, 3, 3, 5, 9, 23]
    assert clipped(borders, 0, 5) == [0, 3, 5] and clipped(borders, 5, 11) == [0, 4, 6]
    assert clipped(borders, 11, 17) == [0, 6]
    assert [opened(borders, token) for token in (0, 2, 3, 5, 22)] == [0, 0, 3, 5, 9]


def cut(borders, begin, end):
    """Of each piece its tokens, documents, borders, whether it takes and whether it gives."""
    found = []
    for piece in pieces(borders, begin, end, torch.device("cpu")):
        own = None if piece.cu_seqlens is None else piece.cu_seqlens.tolist()
        found.append((piece.tokens, piece.rows, own, piece.takes, piece.gives))
    return found


def test_a_part_is_run_in_up_to_three_pieces():
    every = slice(None)
    assert cut([0, 23], 5, 11) == [(every, every, None, True, True)]
    assert cut([0, 5, 11, 23], 5, 11) == [(every, every, None, False, False)]
    assert cut([0, 5, 23], 5, 11) == [(every, every, None, False, True)]
    assert cut([0, 5, 8, 11, 23], 5, 11) == [(slice(0, 6), slice(0, 2), [0, 3, 6], False, False)]
    first, last = (slice(0, 2), slice(0, 1), None, True, False), (slice(5, 6), slice(3, 4), None, False, True)
    assert cut([0, 7, 8, 10, 23], 5, 11) == [last, (slice(2, 5), slice(1, 3), [0, 1, 3], False, False), first]
    assert cut([0, 10, 23], 5, 11)[0][:2] == (slice(5, 6), slice(1, 2))


# -- whole runs -------------------------------------------------------------------------------------------------------

MIXERS = (
    "model.mixer=[{kind: titans_mag, heads: 2, window: 8, persistent: 2, memory: {heads: 2, chunk_size: 8}},"
    " {kind: mixture, heads: 2, memories: 3, chunk_size: 8, balance_weight: 0.1, router_z_weight: 0.01}]"
)
SHORT = ["train.steps=3", "train.validate_every=3", "train.diagnostics_every=0", "train.checkpoint_every=0", MIXERS]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A config whose windows of 19 tokens hold several documents of 3 to 24, two windows a micro batch."""
    folder, draw = tmp_path_factory.mktemp("documents"), random.Random(0)
    for number in range(80):
        (folder / f"{number:02}.txt").write_text("".join(draw.choice("river bed") for _ in range(draw.randint(2, 23))))
    data = {"source": "text", "path": str(folder / "*.txt"), "folder": str(folder / "tokens")}
    train = TRAIN | {"seq_len": 19, "micro_batch_size": 2}
    content = {"name": "tiny", "seed": 3, "model": MODEL, "data": data | {"validation_fraction": 0.2}, "train": train}
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("documents", "processes", "arguments"),
    [
        (["data.documents=packed"], 3, ["train.parallel=ddp", "train.sequence_parallel=3"]),
        (
            ["data.documents=whole"],
            4,
            ["train.parallel=fsdp", "train.sequence_parallel=4", "train.activation_checkpointing=true"],
        ),
        (["data.documents=whole", "data.reset=false"], 2, ["train.parallel=ddp", "train.sequence_parallel=2"]),
    ],
)
def test_a_run_is_that_of_one_process(run, path, tmp_path, documents, processes, arguments):
    """Losses, norms and validation in float32, whose sums are in another order, over three updates."""
    options = [path, *documents, *SHORT]
    result = run(*options, f"train.out={tmp_path / 'alone'}")
    assert result.codes == [0], result.output
    result = run(*options, *arguments, f"train.out={tmp_path / 'divided'}", processes=processes)
    assert result.codes == [0] * processes, result.output
    found, alone = learnt(tmp_path / "divided"), learnt(tmp_path / "alone")
    assert len(found) == len(alone)
    for mine, theirs in zip(found, alone, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)


def test_a_part_that_is_another_is_named():
    borders = torch.tensor([0, 3, 7], dtype=torch.int32)
    tokens = torch.arange(7)[None]
    link = SimpleNamespace(rank=1, size=2, device=torch.device("cpu"))
    division = SimpleNamespace(link=link)
    part = Division.cut(division, Batch(tokens, tokens, borders))
    assert part.tokens.tolist() == [[3, 4, 5, 6]] and part.cu_seqlens is borders
    with pytest.raises(ValueError, match=r"tokens was \(1, 7\); .* be \(1, 4\), this process's part of all 7"):
        Division.read(division, tokens, cu_seqlens=borders)
