"""Sequences divided among processes are those of one process: every mixer, the schedule, whole runs, and what fails."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import training
import yaml
from training import MODEL, TRAIN, learnt

from palimpsest.train import read_config
from palimpsest.train.sequence import Division
from palimpsest.train.sequence.check import CASES
from palimpsest.train.sequence.link import flat, nested
from palimpsest.train.sequence.schedule import BACKWARD, FORWARD, ahead, order, slots
from palimpsest.train.split import Batch

#: The largest relative difference in float64. Rounding makes 5e-15 in the losses and up to 3e-13 in the gradients of
#: memories, whose inner steps take differences apart; as much as reading in two calls in one process does. A wrong or
#: missing term makes 1e-3 and more.
OUTPUTS, GRADIENTS = 1e-13, 1e-12

# One world of four processes goes through all mixers. Parts of 23 tokens in 4 and 2 end inside of chunks, windows and
# segments; those of 6 are shorter than any of them. Some with checkpoints of activations, and by their states alone.
FEW = ["titans_mal", "tnt", "mixture of gated delta rules", "delta rule", "hcam and titans in turns"]
WAYS = [(way, name) for way in ("4 of 23", "2 of 23") for name in CASES]
WAYS += [(way, name) for way in ("4 of 6", "checkpointed", "states alone") for name in FEW]


@pytest.fixture(scope="module")
def checked(run, tmp_path_factory):
    few = training.cases(FEW)
    ways = {
        "4 of 23": "check.CASES, 4, length=23",
        "2 of 23": "check.CASES, 2, length=23, micro_batches=1",
        "4 of 6": f"{few}, 4, length=6, micro_batches=1",
        "checkpointed": f"{few}, 2, length=11, again=True",
        "states alone": f"{few}, 2, length=11, micro_batches=1, whole=True",
    }
    return training.checked(run, tmp_path_factory.mktemp("checked"), ways)


@pytest.mark.parametrize(("way", "name"), WAYS)
def test_every_mixer_is_that_of_one_process(checked, way, name):
    found = checked[way][name]
    assert found["outputs"] < OUTPUTS and found["gradients"] < GRADIENTS


def test_what_is_sent_is_the_border_and_no_more(checked):
    """Bytes of float64 that cross 3 borders for 2 micro batches of 2 layers, and as many back as gradients."""
    times = 3 * 2 * 2 * 2 * 8
    sent = {name: found["bytes"] for name, found in checked["4 of 23"].items()}
    assert sent["window_attention"] == times * 3 * 2 * (2 * 2)  # 3 tokens' k and v, 2 heads of 2
    state, inputs = 3 * (2 * 4 * 8 + 2 * 8 * 4), 2 * 24  # W, S and the anchor; 2 inputs of q, k, v
    place = 3 * 2 * 2 * 4  # int32, forward alone
    assert sent["neural_memory"] == times * (state + inputs) + place
    assert sent["delta rule"] == times * (2 * 4 * 4 + 2 * (8 + 16))  # M, 2 inputs of q and of k, v
    # All earlier tokens' k and v, 2 heads of 4, to each of the parts behind: of 5, 6, 6 tokens to 3, 2, 1.
    assert sent["attention"] == 2 * 2 * 2 * 8 * (5 * 3 + 6 * 2 + 6 * 1) * 2 * (2 * 4)


# -- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("ranks", [2, 4, 7])
@pytest.mark.parametrize("backward", [1, 2])
def test_processes_wait_no_longer_than_a_pipeline_must(ranks, layers, backward):
    for micro_batches in (1, 2, 5, 16):
        orders = [list(order(rank, ranks, micro_batches, layers)) for rank in range(ranks)]
        for rank, turns in enumerate(orders):
            every = [(kind, m) for kind in (FORWARD, BACKWARD) for m in range(micro_batches)]
            assert sorted(turns) == sorted(every)
            open_, most = 0, 0
            for kind, _ in turns:
                open_ += 1 if kind == FORWARD else -1
                most = max(most, open_)
            assert most == ahead(rank, ranks, micro_batches, layers) <= 1 + 2 * (ranks - 1 - rank)
        work = micro_batches * layers * (1 + backward)
        waited = 1 - work / slots(orders, layers, backward)
        assert waited == pytest.approx((ranks - 1) / (micro_batches * layers + ranks - 1))


def test_what_it_takes_without_a_schedule_and_when_nobody_can_begin():
    one_by_one = [(kind, m) for m in range(8) for kind in (FORWARD, BACKWARD)]
    assert slots([one_by_one] * 4, 2) > slots([list(order(rank, 4, 8, 2)) for rank in range(4)], 2)
    with pytest.raises(ValueError, match="wait for each other"):
        slots([[(FORWARD, 0), (BACKWARD, 0), (FORWARD, 1)], [(FORWARD, 0), (FORWARD, 1), (BACKWARD, 0)]], 1)


def test_the_processes_keep_to_the_schedule(checked):
    """By the clocks of the messages: nobody waited for anything but the pipeline; micro batches of 2 layers."""
    for way, ranks, count in (("4 of 23", 4, 2), ("2 of 23", 2, 1)):
        for name in ("neural_memory", "titans_mac", "titans_mag", "titans_mal", "lact", "hcam", "block_union"):
            found = checked[way][name]
            assert found["worked"] == 2 * count * 2 and found["slots"] == 2 * (count * 2 + ranks - 1)
        for name in ("attention", "window_attention", "delta rule", "gated delta rule"):
            assert checked[way][name]["slots"] == 0  # nothing is handed on: all work at once


# -- whole runs -------------------------------------------------------------------------------------------------------

MIXERS = (
    "model.mixer=[{kind: titans_mag, heads: 2, window: 8, persistent: 2, memory: {heads: 2, chunk_size: 8}},"
    " {kind: mixture, heads: 2, memories: 3, chunk_size: 8, balance_weight: 0.1, router_z_weight: 0.01}]"
)
SHORT = ["train.steps=4", "train.validate_every=2", "train.diagnostics_every=2", "train.checkpoint_every=2", MIXERS]


@pytest.fixture(scope="module")
def path(corpus, tmp_path_factory):
    """A config whose sequences of 19 tokens divide unevenly."""
    file = tmp_path_factory.mktemp("sequence") / "tiny.yaml"
    train = TRAIN | {"seq_len": 19, "micro_batch_size": 2}
    file.write_text(yaml.safe_dump({"name": "tiny", "seed": 3, "model": MODEL, "data": corpus, "train": train}))
    return file


@pytest.fixture(scope="module")
def alone(run, path):
    """What a short run in one process learnt."""
    folder = path.parent / "alone"
    result = run(path, *SHORT, f"train.out={folder}")
    assert result.codes == [0], result.output
    return learnt(folder)


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (2, ["train.parallel=ddp"]),
        (4, ["train.parallel=ddp", "train.activation_checkpointing=true"]),
        (4, ["train.parallel=fsdp", "train.activation_checkpointing=true"]),
    ],
)
def test_a_run_is_that_of_one_process(run, path, alone, tmp_path, processes, arguments):
    """Losses, norms, validation and diagnostics in float32, whose sums are in another order, over four updates; and one
    process goes on where several left a checkpoint."""
    options = [path, *SHORT, f"train.out={tmp_path}"]
    result = run(*options, *arguments, "train.sequence_parallel=2", processes=processes)
    assert result.codes == [0] * processes, result.output
    found = learnt(tmp_path)
    for mine, theirs in zip(found, alone, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)
    if processes == 2:
        (tmp_path / "model.safetensors").unlink()
        shutil.rmtree(tmp_path / "checkpoints" / "step-000004")
        assert run(*options).codes == [0]
        assert learnt(tmp_path)[:2] == found[:2]
        for mine, theirs in zip(learnt(tmp_path), alone, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-5)


# -- what fails -------------------------------------------------------------------------------------------------------

DEAF = """
import os, time
from palimpsest.train.sequence.link import Link
send, sent = Link.send, []
def some(self, to, tensors, what, **options):
    sent.append(what)
    if rank == 0 and len(sent) == 9:
        {}
    return send(self, to, tensors, what, **options)
Link.send = some
"""
LOST = "self._sent[to, False] += 1; return None"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (LOST, "waited for the .*: message 9 was due, and message 10 came"),
        ("os._exit(7)", "(waited for|could not send) .*onnection"),
        ("time.sleep(4); os._exit(7)", "waited for the .*, 2 s at most: "),
    ],
)
def test_a_message_that_does_not_come_ends_the_run(run, path, tmp_path, what, message):
    arguments = ["train.parallel=ddp", "train.sequence_parallel=2", "train.sequence_timeout=2", f"train.out={tmp_path}"]
    result = run(path, *SHORT, *arguments, processes=2, prelude=DEAF.format(what))
    assert result.codes[1] == 1, result.output
    assert re.search("error: process 1 of the sequence " + message, result.output), result.output
    assert result.seconds < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.sequence_parallel=3"], "train.sequence_parallel was 3; it must divide the number of processes, 1"),
        (["train.sequence_parallel=20"], "train.sequence_parallel was 20; it must be at most train.seq_len = 19"),
        (["train.compile=true"], "train.compile was true; it must be false with train.sequence_parallel"),
        (
            ["model.hmt={segment: 8, sensory: 1}", "train.parallel=fsdp"],
            "train.parallel was 'fsdp'; it must be ddp with train.sequence_parallel and model.hmt: parts pass through",
        ),
    ],
)
def test_what_cannot_be_is_named(run, path, tmp_path, arguments, message):
    result = run(path, "train.sequence_parallel=2", *arguments, f"train.out={tmp_path}")
    assert result.codes == [2] and "error: " in result.output and message in result.output


def test_batches_divide_over_those_that_share_no_sequence():
    train = read_config({"name": "x", "model": MODEL, "train": {"batch_size": 4, "sequence_parallel": 2}}).train
    assert train.micro_batches(8) == (1, 1) and train.micro_batches(2) == (1, 4)
    with pytest.raises(ValueError, match=r"train.batch_size was 4; it must be a multiple of the 3 processes that each"):
        train.micro_batches(6)


def test_a_tree_of_tensors_goes_through_names():
    tree = {"memory": {"weights.0": torch.ones(2), "deep": {"x": torch.zeros(1)}}, "position": torch.tensor([3])}
    names = dict(flat(tree))
    assert list(names) == ["memory/weights.0", "memory/deep/x", "position"]
    again = nested(names)
    assert again == tree


def test_rows_that_cannot_be_divided_are_named():
    whole = torch.arange(7)[None].long()
    division = SimpleNamespace(link=SimpleNamespace(rank=2, size=4))
    part = Division.cut(division, Batch(whole, whole + 1))
    assert part.tokens.tolist() == [[3, 4]] and part.targets.tolist() == [[4, 5]] and division.length == 7
    with pytest.raises(ValueError, match="rows were of 3 tokens; they must be of 4, the processes, or more"):
        Division.cut(division, Batch(whole[:, :3], whole[:, :3]))
    with pytest.raises(ValueError, match="return_state was True; it must be false with sequences divided among proces"):
        Division.read(division, whole, return_state=True)
