"""Several processes: the gradient is that of the whole batch, however uneven its parts."""

import pytest
import torch
from training import learnt

from palimpsest.train import parallel

# Most targets of some rows count for nothing, so that every micro batch and process has another number of them; the
# gradients of the first update are written down by name, whole, before they are clipped.
UNEVEN = """
import torch
from palimpsest.train import loop, optim
from palimpsest.train.split import Split
read = Split.batch
def uneven(self, step, *, rows, batch_size, **rest):
    batch = read(self, step, rows=rows, batch_size=batch_size, **rest)
    for row, number in zip(batch.targets, rows):
        row[: (0, 3, 15, 16)[number % 4]] = -100
    return batch
Split.batch = uneven
update, clip = loop.Run.update, optim.clip
def noted(self, batches, valid):
    if self.step == 1:
        names = [name.removeprefix("module.") for name, _ in self.model.named_parameters()]
        def spy(parameters, limit):
            parameters = list(parameters)
            grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in parameters]
            if rank == 0:
                torch.save({{n: g.clone() for n, g in zip(names, grads)}}, r"{path}")
            optim.clip = clip
            return clip(parameters, limit)
        optim.clip = spy
    return update(self, batches, valid)
loop.Run.update = noted
"""


@pytest.fixture(scope="module")
def gradients(run, corpus, tmp_path_factory):
    """Gradients of the first update by (processes, arguments), and the run's records."""
    import yaml
    from training import MODEL, TRAIN

    folder = tmp_path_factory.mktemp("gradients")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "seed": 3, "model": MODEL, "data": corpus, "train": TRAIN}))

    def of(name: str, processes: int, *arguments: str):
        out = folder / name
        prelude = UNEVEN.format(path=folder / f"{name}.pt")
        options = ["train.steps=2", "train.warmup_steps=1", "train.validate_every=0", f"train.out={out}"]
        result = run(path, *options, *arguments, processes=processes, prelude=prelude)
        assert result.codes == [0] * processes, result.output
        return torch.load(folder / f"{name}.pt"), learnt(out)

    return of


@pytest.fixture(scope="module")
def alone(gradients):
    return gradients("alone", 1)


@pytest.mark.parametrize(
    ("name", "processes", "arguments"),
    [
        ("accumulated", 1, ["train.micro_batch_size=1"]),
        ("ddp", 2, ["train.parallel=ddp"]),
        ("ddp-accumulated", 2, ["train.parallel=ddp", "train.micro_batch_size=1"]),
        ("fsdp", 2, ["train.parallel=fsdp"]),
        ("fsdp-accumulated", 2, ["train.parallel=fsdp", "train.micro_batch_size=1"]),
        ("fsdp-checkpointing", 2, ["train.parallel=fsdp", "train.activation_checkpointing=true"]),
        ("hybrid", 4, ["train.parallel=fsdp", "train.fsdp_shard=2"]),
        ("hybrid-accumulated", 2, ["train.parallel=fsdp", "train.fsdp_shard=1", "train.micro_batch_size=1"]),
    ],
)
def test_the_gradient_is_that_of_the_whole_batch(gradients, alone, name, processes, arguments):
    compare(gradients(name, processes, *arguments), alone)


@pytest.mark.parametrize("way", ["ddp", "fsdp-checkpointing"])
def test_blocks_that_a_forward_runs_many_times(gradients, segments, way):
    """Memory over segments: each block is called for each segment of 4 tokens, and for the summaries."""
    kind, *rest = way.split("-")
    arguments = [SEGMENTS, f"train.parallel={kind}", *(["train.activation_checkpointing=true"] if rest else [])]
    compare(gradients(f"segments-{way}", 2, *arguments), segments)


# Whether each parameter's gradient is there after each micro batch, and how much of it.
SHARES = """
from palimpsest.train import loop
backward = loop.Run.backward
def noted(self, batch, valid):
    found = backward(self, batch, valid)
    params = list(self.model.parameters())
    mine = [p.grad.to_local().numel() for p in params if p.grad is not None]
    print(f"rank {rank} has", len(mine) == len(params), sum(mine) < 0.6 * sum(p.numel() for p in params))
    return found
loop.Run.backward = noted
"""


def test_between_micro_batches_a_process_keeps_its_share_of_the_gradients(run, config):
    keys = ["train.steps=1", "train.warmup_steps=1", "train.validate_every=0", "train.micro_batch_size=1"]
    result = run(config, *keys, "train.parallel=fsdp", processes=2, prelude=SHARES)
    assert result.codes == [0, 0], result.output
    for rank in (0, 1):
        assert result.output.count(f"rank {rank} has True True") == 2, result.output
        assert f"rank {rank} has False" not in result.output


SEGMENTS = "model.hmt={segment: 4, sensory: 1, memories: 3, bptt: 2}"


@pytest.fixture(scope="module")
def segments(gradients):
    return gradients("segments", 1, SEGMENTS)


def compare(spread, alone):
    (found, records), (whole, expected_records) = spread, alone
    assert found.keys() == whole.keys()
    for key, expected in whole.items():
        error = (found[key] - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 1e-5, (key, error)  # float32, another order of sums; a mean of means would be off by 0.1 or more
    for number in ("loss", "grad_norm"):
        assert records[0][number] == pytest.approx(expected_records[0][number], rel=1e-5)


@pytest.mark.parametrize(
    ("processes", "arguments", "message"),
    [
        (2, [], "train.parallel was 'none' with 2 processes; it must be 'ddp' or 'fsdp'"),
        (3, ["train.parallel=ddp"], "train.batch_size was 4; it must be a multiple of the 3 processes"),
        (2, ["train.parallel=fsdp", "train.fsdp_shard=3"], "train.fsdp_shard was 3; it must divide the number of proc"),
    ],
)
def test_a_wrong_number_of_processes_is_named(run, config, processes, arguments, message):
    result = run(config, *arguments, processes=processes)
    assert set(result.codes) == {2}, result.output
    assert result.output.count(f"error: {message}") == processes


def test_alone_the_collectives_are_the_identity():
    assert parallel.rank_and_size() == (0, 1)
    assert parallel.gather("x") == ["x"] and parallel.broadcast("x") == "x"
    assert parallel.total(torch.tensor([2.0])).tolist() == [2.0]
    world = parallel.start("cpu")
    assert world.first and world.size == 1
    parallel.stop(world)
