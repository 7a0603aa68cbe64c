"""Bad updates: judged without a host read, left out bit for bit, rolled back, or the end; and the same however late the
host hears of them."""

import json
import math
import random
import statistics

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from training import MODEL, STEPS, TRAIN, learnt

from palimpsest.train import loop, read_config, train
from palimpsest.train.checkpoint import Checkpointer
from palimpsest.train.spikes import GOOD, LEAST_SIGMA, NOT_FINITE, SPIKE, FaultConfig, Watch, update_unless

CPU = torch.device("cpu")


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


# -- the judge --------------------------------------------------------------------------------------------------------


NAMES = ("loss", "grad_norm")


def numbers(count, seed=0):
    """(loss, norm) of steps, with a few wild ones."""
    draw = random.Random(seed)
    rows = []
    for step in range(count):
        wild = draw.choice([0, 0, 0, 0, 0, 0, 0, 30.0, math.nan, math.inf]) if step > 5 else 0
        rows.append((3.0 + draw.gauss(0, 0.2) + wild, 1.0 + draw.gauss(0, 0.1)))
    return rows


@pytest.mark.parametrize("watch", ["loss", "grad_norm", "both"])
def test_a_spike_is_above_the_mean_and_deviations_of_the_accepted_steps(watch):
    """Judged by the statistics module, over a window longer than the run: then both are the plain ones."""
    config = FaultConfig(spike="skip", sigma=4.0, window=1000, settle=8, watch=watch)
    judge = Watch(config, CPU)
    rows = [(a, b + (20.0 if i in (30, 31) else 0.0)) for i, (a, b) in enumerate(numbers(60))]
    accepted: list[tuple[float, float]] = []
    kinds = set()
    for step, row in enumerate(rows):
        levels = [math.inf, math.inf]
        if len(accepted) >= 8:
            past = list(zip(*accepted, strict=True))
            sigmas = [max(statistics.pstdev(x), LEAST_SIGMA * statistics.fmean(x)) for x in past]
            levels = [statistics.fmean(x) + 4.0 * sigma for x, sigma in zip(past, sigmas, strict=True)]
        kind = NOT_FINITE
        if all(map(math.isfinite, row)):
            spikes = [watch in (name, "both") and x > level for name, x, level in zip(NAMES, row, levels, strict=True)]
            kind = SPIKE if any(spikes) else GOOD
        bad = judge.judge(step, *map(torch.tensor, row))
        (verdict,) = judge.read()
        assert (verdict.step, verdict.kind, bool(bad)) == (step, kind, kind != GOOD)
        assert verdict.loss == pytest.approx(row[0], rel=1e-6, nan_ok=True)  # the judge is given float32 numbers
        assert verdict.level == pytest.approx(levels, rel=1e-5)
        kinds.add(kind)
        if kind == GOOD:
            accepted.append(row)
    assert kinds == {GOOD, NOT_FINITE, SPIKE} and 10 < len(accepted) < 58


def test_old_steps_are_forgotten():
    """After a fall of the loss, what was usual before is a spike; and a loss that stands still has none by rounding."""
    judge = Watch(FaultConfig(spike="skip", sigma=3.0, window=4, settle=2), CPU)
    norm = torch.tensor(1.0)
    for step in range(40):
        assert not judge.judge(step, torch.tensor(8.0 if step < 10 else 2.0), norm)
    assert not judge.judge(40, torch.tensor(2.0 * (1 + 2.9 * LEAST_SIGMA)), norm)
    assert judge.judge(41, torch.tensor(8.0), norm)


def test_statistics_survive_a_checkpoint_exactly():
    config = FaultConfig(spike="skip", settle=4)
    one, other = Watch(config, CPU), Watch(config, CPU)
    for step, row in enumerate(numbers(20)):
        one.judge(step, *map(torch.tensor, row))
    other.restore(json.loads(json.dumps(one.state())))
    assert torch.equal(one.stats, other.stats) and one.stats[4] > 10
    for faulty in ([1.0], [math.nan] * 5):
        with pytest.raises(ValueError, match="state of the loss statistics was"):
            other.restore(faulty)


def test_verdicts_may_be_read_late_and_come_in_order():
    judge = Watch(FaultConfig(), CPU)
    for step in range(5):
        judge.judge(step, torch.tensor(1.0), torch.tensor(1.0))
        assert [verdict.step for verdict in judge.read(lag=2)] == ([step - 2] if step >= 2 else [])
    assert [verdict.step for verdict in judge.read()] == [3, 4]


# -- the update -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("first", [False, True])
def test_an_update_that_is_left_out_changes_no_bit_and_the_next_is_as_ever(name, first):
    """A bad step, in the middle or as the very first, beside an optimizer that never met it."""
    ends = []
    for bad_steps in ({}, {0} if first else {2}):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
        optimizer = OPTIMIZERS[name](parameters)
        for step in range(4):
            for rounds in [True, False] if step in bad_steps else [False]:
                for number, parameter in enumerate(parameters):
                    gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9 * step + number))
                    parameter.grad = gradient * (math.nan if rounds else 1.0)
                update_unless(torch.tensor(rounds), optimizer)
        states = [value for p in parameters for value in optimizer.state[p].values() if torch.is_tensor(value)]
        ends.append([*parameters, *states])
    assert len(ends[0]) == len(ends[1]) > 3
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Reads(TorchDispatchMode):
    """Notes what makes the host wait for a device: reading a scalar, and shapes that depend on values."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found, self.ops = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.ops += 1
        if function.overloadpacket.__name__ in self.NAMES:
            self.found.append(str(function))
        return function(*arguments, **(options or {}))


def test_no_step_reads_anything_from_the_device(content, monkeypatch):
    """Of the whole update: forward, backward, clipping, verdict, optimizer. The first one reads its verdict alone."""
    update, reads = loop.Run.update, []

    def watched(self, batches, valid):
        with Reads() as mode:
            rate = update(self, batches, valid)
        reads.append(mode)
        return rate

    monkeypatch.setattr(loop.Run, "update", watched)
    # On a CPU the values of arguments are checked too, where nobody is compiling: not so on a GPU.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    faults = {"spike": "rollback"}
    train(read_config(content, {"train.steps": 4, "train.micro_batch_size": 2, "train.faults": faults}))
    assert len(reads) == 4 and min(mode.ops for mode in reads) > 100
    assert [mode.found for mode in reads] == [["aten._local_scalar_dense.default"], [], [], []]
    with Reads() as mode:
        float(torch.ones(()))
    assert mode.found, "and it would have been seen"


# -- whole runs -------------------------------------------------------------------------------------------------------

# The loss, and with it the gradient, of some updates is multiplied; the verdicts come some steps late.
TROUBLE = """
from palimpsest.train import loop, spikes
spikes.LAG = {{"cpu": {lag}}}
inner = loop.Run.forward
def forward(self, batch, **options):
    output = inner(self, batch, **options)
    factor = {factors}.get(self.step) if self.model.training and not options else None
    if factor is not None and rank == {rank}:
        output.loss_sum = output.loss_sum * float(factor)
    return output
loop.Run.forward = forward
"""
QUIET = ("train.log_every=16", "train.diagnostics_every=0", "train.validate_every=0", "train.checkpoint_every=5")
SPIKES = ("train.faults.settle=4", "train.faults.sigma=5")


def trouble(factors, lag=0, rank=0):
    return TROUBLE.format(factors=factors, lag=lag, rank=rank)


@pytest.fixture(scope="module")
def without(run, corpus, tmp_path_factory):
    """Final weights of a run whose updates of some steps were left out, by those steps: what the others must equal.

    The judge of itself is ``test_a_bad_step_leaves_weights_and_optimizer_as_they_were``.
    """
    folder = tmp_path_factory.mktemp("without")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "seed": 3, "model": MODEL, "data": corpus, "train": TRAIN}))

    def of(*steps, processes=1):
        out = folder / f"{steps} {processes}"
        if not out.exists():
            ways = ["train.parallel=fsdp"] if processes > 1 else []
            factors = dict.fromkeys(steps, "nan")
            bad = run(path, *QUIET, f"train.out={out}", *ways, processes=processes, prelude=trouble(factors))
            assert bad.codes == [0] * processes and bad.output.count("the update is skipped") == len(steps) * processes
        return weights(out)

    return of


def test_a_spike_is_done_by_default_and_skipped_when_asked(run, config, without, tmp_path):
    result = run(config, *QUIET, prelude=trouble({9: 50}))
    assert result.codes == [0] and "skipped" not in result.output
    assert weights(tmp_path / "run") not in (without(), without(9))
    out = tmp_path / "skip"
    result = run(config, *QUIET, *SPIKES, f"train.out={out}", "train.faults.spike=skip", prelude=trouble({9: 50}, 3))
    assert result.codes == [0] and "step 9: loss 2" in result.output and "(spike: above " in result.output
    assert weights(out) == without(9)


@pytest.mark.parametrize(("lag", "factor"), [(0, "nan"), (3, "nan"), (3, "50")])
def test_a_rollback_goes_on_without_the_batches_since_the_checkpoint(run, config, without, tmp_path, lag, factor):
    """Bad at step 8, a checkpoint at 5: as if 6, 7 and 8 had been left out. And once more at 12, from 10."""
    arguments = [*SPIKES, "train.faults.nonfinite=rollback", "train.faults.spike=rollback"]
    result = run(config, *QUIET, *arguments, prelude=trouble({8: factor, 12: factor}, lag))
    assert result.codes == [0], result.output
    assert "back to the weights of step 5; the batches of steps 6 to 8 are not seen again" in result.output
    assert "back to the weights of step 10; the batches of steps 11 to 12" in result.output
    folder = tmp_path / "run"
    assert weights(folder) == without(6, 7, 8, 11, 12)
    told = [(r["step"], r["rolled_back_to"]) for r in learnt(folder) if "rolled_back_to" in r]
    assert told == [(8, 5), (12, 10)]
    manifest = json.loads((folder / "checkpoints" / "step-000016" / "manifest.json").read_text())
    assert manifest["extra"]["skipped"] == [6, 7, 8, 11, 12]


DEADLY = """
import os
update = loop.Run.update
def die(self, *rest):
    if self.step == 10:
        os.kill(os.getpid(), 9)
    return update(self, *rest)
loop.Run.update = die
"""


def test_killed_after_a_rollback_a_run_goes_on_from_it(run, config, without, tmp_path):
    """The cause is gone after the kill, but what was skipped stays skipped: the rollback was saved at once."""
    arguments = [*QUIET, "train.faults.nonfinite=rollback"]
    assert run(config, *arguments, prelude=trouble({8: "nan"}) + DEADLY).codes == [-9]
    assert Checkpointer(tmp_path / "run" / "checkpoints").latest_valid().name == "step-000008"
    result = run(config, *arguments)
    assert result.codes == [0] and "going on after step 8" in result.output
    assert weights(tmp_path / "run") == without(6, 7, 8)


def test_sharded_processes_roll_back_together(run, config, without, tmp_path):
    arguments = [*QUIET, "train.faults.nonfinite=rollback", "train.parallel=fsdp", "train.async_checkpoint=true"]
    result = run(config, *arguments, processes=2, prelude=trouble({8: "nan"}, lag=1, rank=1))
    assert result.codes == [0, 0], result.output
    assert result.output.count("back to the weights of step 5") == 2
    assert weights(tmp_path / "run") == without(6, 7, 8, processes=2)


def test_without_a_checkpoint_it_is_skipped_and_too_many_rollbacks_are_the_end(run, config, tmp_path):
    arguments = [*QUIET, "train.faults.nonfinite=rollback", "train.faults.max_rollbacks=2"]
    result = run(config, *arguments, prelude=trouble({3: "nan", 7: "inf", 9: "nan", 11: "nan"}))
    assert "step 3: loss nan, gradient norm nan: there is no checkpoint to go back to" in result.output
    assert "step 3: loss nan, gradient norm nan: the update is skipped (1 in a row)" in result.output
    # A due checkpoint, as that of step 10, says that things went well, so that the third is the first again.
    assert result.codes == [0] and result.output.count("(rollback 1 of 2)") == 2, result.output
    out = f"train.out={tmp_path / 'again'}"
    result = run(config, *arguments, out, prelude=trouble({6: "inf", 8: "nan", 9: "nan"}))
    assert result.codes == [1] and "after 2 rollbacks (train.faults.max_rollbacks = 2)" in result.output


@pytest.mark.parametrize(("name", "factor"), [("nonfinite", "nan"), ("spike", "50")])
def test_stop_is_the_end_with_nothing_saved(run, config, tmp_path, name, factor):
    result = run(config, *QUIET, *SPIKES, f"train.faults.{name}=stop", prelude=trouble({8: factor}, lag=3))
    assert (
        result.codes == [1]
        and f"train.faults.{name} is stop; stopped, with nothing saved since step 5" in result.output
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000005"]
    assert learnt(tmp_path / "run")[-1]["step"] == 8 < STEPS
