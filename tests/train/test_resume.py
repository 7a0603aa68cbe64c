"""A run that is killed and started again learns exactly what one learns that never was."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training import MODEL, STEPS, TRAIN, learnt

from palimpsest.models import build
from palimpsest.train import launch, optim, parallel
from palimpsest.train.checkpoint import Checkpointer, step_of

KILL = signal.SIGKILL

# Ends the process by SIGKILL at the n-th moment when it is about to change something on disk.
AT_EVENT = """
import os, shutil, signal, pathlib
count = 0
def deadly(function):
    def wrapped(*arguments, **options):
        global count
        count += 1
        if count == {event}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapped
if rank == {rank}:
    os.fsync = deadly(os.fsync)
    os.replace = deadly(os.replace)
    shutil.rmtree = deadly(shutil.rmtree)
    for name in ("rename", "replace", "write_text", "mkdir"):
        setattr(pathlib.Path, name, deadly(getattr(pathlib.Path, name)))
"""


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def same_run(one: Path, other: Path) -> None:
    assert learnt(one) == learnt(other)
    assert weights(one) == weights(other)


@pytest.fixture(scope="module")
def whole(run, corpus, tmp_path_factory):
    """A run that nobody disturbed: its folder and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "whole.yaml"
    content = {"name": "tiny", "seed": 3, "model": MODEL, "data": corpus, "train": TRAIN | {"out": str(folder / "run")}}
    path.write_text(yaml.safe_dump(content))
    result = run(path)
    assert result.codes == [0], result.output
    assert [record["step"] for record in learnt(folder / "run")] == list(range(1, STEPS + 1))
    return folder / "run", result.seconds


def test_killed_at_random_moments_a_run_learns_the_same_bit_for_bit(run, config, whole, tmp_path):
    draw = random.Random(1)
    kills = 0
    for _ in range(60):
        # Up to the time of a whole run, so that early kills meet the start and late ones a run that has gone on.
        result = run(config, signal=KILL, after=draw.uniform(0.1, 1.0) * whole[1] * draw.choice([0.5, 1.0]))
        if result.codes == [0]:
            break
        assert result.codes == [-KILL], result.output
        kills += 1
        if kills >= 10:
            break
    while kills < 10:  # a fast machine finished early: begin again elsewhere, with kills that come sooner
        out = tmp_path / f"again-{kills}"
        result = run(config, f"train.out={out}", signal=KILL, when=f"step {draw.randint(1, 12)}/16")
        assert result.codes == [-KILL], result.output
        assert run(config, f"train.out={out}").codes == [0]
        same_run(out, whole[0])
        kills += 1
    assert run(config).codes == [0]
    same_run(tmp_path / "run", whole[0])


def test_killed_before_each_change_on_disk_a_run_learns_the_same_bit_for_bit(run, config, whole, tmp_path):
    kills = 0
    for event in range(1, 60):
        result = run(config, "train.checkpoint_every=1", prelude=AT_EVENT.format(event=event, rank=0))
        if result.codes == [0]:
            break
        assert result.codes == [-KILL], result.output
        kills += 1
    assert result.codes == [0], "a run makes progress between kills"
    assert kills >= 10
    same_run(tmp_path / "run", whole[0])
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000015", "step-000016"], "nothing is left over"


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(run, config, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    newest = tmp_path / "run" / "checkpoints" / "step-000016"
    data = bytearray((newest / "__0_0.distcp").read_bytes())
    data[len(data) // 3] ^= 4
    (newest / "__0_0.distcp").write_bytes(data)
    result = run(config)
    assert result.codes == [0]
    assert f"checkpoint {newest} is damaged and skipped: __0_0.distcp differs from its checksum" in result.output
    assert "going on after step 15" in result.output
    same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_a_run_saves_and_exits_cleanly_and_goes_on_later(run, config, whole, tmp_path, number):
    result = run(config, signal=number, when="step 4/16")
    assert result.codes == [0], result.output
    done = learnt(tmp_path / "run")[-1]["step"]
    assert 4 <= done < STEPS
    assert f"stopped: {done} of 16 steps" in result.output
    assert Checkpointer(tmp_path / "run" / "checkpoints").latest_valid().name == f"step-{done:06d}"
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "config.json").exists()
    result = run(config)
    assert f"going on after step {done}" in result.output
    same_run(tmp_path / "run", whole[0])


AT_EXPORT = """
import os, signal
from palimpsest.models import MemoryLM
MemoryLM.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_weights_of_an_earlier_stop_are_not_taken_for_the_final_ones(run, config, whole, tmp_path):
    """Stopped once, which exports weights, then killed just before the final ones are exported."""
    assert run(config, signal=signal.SIGTERM, when="step 4/16").codes == [0]
    assert run(config, prelude=AT_EXPORT).codes == [-KILL]
    assert run(config).codes == [0]
    same_run(tmp_path / "run", whole[0])


def test_a_complete_run_says_so_and_changes_nothing(run, config, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "config.yaml"}
    result = run(config)
    assert result.codes == [0] and "already complete" in result.output
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "config.yaml"}
    assert after == before


def test_how_often_it_saves_and_logs_changes_nothing_that_is_learnt(run, config, whole, tmp_path):
    quiet = ["train.checkpoint_every=0", "train.validate_every=0", "train.diagnostics_every=0", "train.log_every=8"]
    assert run(config, *quiet).codes == [0]
    assert weights(tmp_path / "run") == weights(whole[0])
    assert [record["step"] for record in learnt(tmp_path / "run")] == [8, 16]


# -- checkpoints that a thread writes ----------------------------------------------------------------------------------

ASYNC = "train.async_checkpoint=true"


def test_it_changes_nothing_that_is_learnt_and_killed_in_the_middle_of_a_write_neither(run, config, whole, tmp_path):
    """Killed at each of a few moments when the thread is about to change something on disk, several saves on."""
    kills = 0
    for event in (12, 9, 7):  # no further than the second save of each life
        result = run(config, ASYNC, prelude=AT_EVENT.format(event=event, rank=0))
        assert result.codes == [-signal.SIGKILL], result.output
        kills += 1
    assert kills == 3 and run(config, ASYNC).codes == [0]
    same_run(tmp_path / "run", whole[0])
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000015", "step-000016"]


# A disk whose every sync in the thread takes long; the step that training has reached when a checkpoint's name appears.
SLOW = """
import os, threading, time
from palimpsest.train import checkpoint, loop
sync, at, seen = os.fsync, [0], {}
def slow(handle):
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.1)
    sync(handle)
os.fsync = slow
update, save = loop.Run.update, checkpoint.Checkpointer._seal
def counted(self, *rest):
    at[0] = self.step
    time.sleep(0.02)
    return update(self, *rest)
def noted(self, temporary, final, step, *rest):
    result = save(self, temporary, final, step, *rest)
    print(f"rank {rank}: step {step} written at {at[0]}", flush=True)
    return result
loop.Run.update, checkpoint.Checkpointer._seal = counted, noted
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_slow_disk_does_not_hold_up_training(run, config, tmp_path, processes):
    """Saves every 8 steps that last about 0.4 s; then SIGTERM, which waits for what is being written."""
    ways = ["train.parallel=fsdp"] if processes > 1 else []
    quiet = [ASYNC, *ways, "train.checkpoint_every=8", "train.validate_every=0", "train.diagnostics_every=0"]
    result = run(config, *quiet, processes=processes, prelude=SLOW)
    assert result.codes == [0] * processes, result.output
    written = dict(
        line.split(": step ")[1].split(" written at ") for line in result.output.splitlines() if "written" in line
    )
    assert int(written["8"]) > 9, "steps were made while step 8 was being written"
    about = json.loads((tmp_path / "run" / "checkpoints" / "step-000008" / "manifest.json").read_text())
    assert about["processes"] == processes
    assert [record["step"] for record in learnt(tmp_path / "run")] == list(range(1, 17))


def test_asked_to_stop_it_waits_for_what_is_being_written(run, config, whole, tmp_path):
    result = run(config, ASYNC, signal=signal.SIGUSR1, when="step 6/16", prelude=SLOW)
    assert result.codes == [0], result.output
    done = learnt(tmp_path / "run")[-1]["step"]
    assert f"stopped: {done} of 16 steps" in result.output
    steps = [step_of(path) for path in Checkpointer(tmp_path / "run" / "checkpoints").list()]
    assert steps[0] == done and not [path for path in os.listdir(tmp_path / "run" / "checkpoints") if "saving" in path]
    assert run(config, ASYNC).codes == [0]
    same_run(tmp_path / "run", whole[0])


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(run, whole, tmp_path_factory):
    """The same run on 2 gloo processes with FSDP2."""
    folder = tmp_path_factory.mktemp("sharded")
    result = run(whole[0].parent / "whole.yaml", "train.parallel=fsdp", f"train.out={folder / 'run'}", processes=2)
    assert result.codes == [0, 0], result.output
    return folder / "run", result.seconds


def test_two_sharded_processes_learn_what_one_does(whole, sharded):
    losses = [[record["loss"] for record in learnt(folder)] for folder in (whole[0], sharded[0])]
    # The same sums in another order, over 16 updates; a wrong scale or row would show at the second step.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[1][:2], losses[0][:2], rtol=1e-6, atol=0)


def test_two_sharded_processes_killed_and_resumed_learn_the_same_bit_for_bit(run, config, sharded, tmp_path):
    draw = random.Random(2)
    for first, last in ((1, 4), (5, 8), (9, 12)):  # by what it says, not by the clock: no machine is too fast
        when = f"step {draw.randint(first, last)}/16"
        result = run(config, "train.parallel=fsdp", processes=2, signal=KILL, when=when)
        assert result.codes == [-KILL, -KILL], result.output
    for event, rank in ((9, 0), (14, 0), (3, 1)):
        run(config, "train.parallel=fsdp", processes=2, prelude=AT_EVENT.format(event=event, rank=rank))
    result = run(config, "train.parallel=fsdp", processes=2)
    assert result.codes == [0, 0], result.output
    same_run(tmp_path / "run", sharded[0])


def test_a_run_of_two_processes_goes_on_in_one_and_back(run, config, sharded, tmp_path):
    """SIGTERM to two processes, the rest in one: the state is what was saved, the losses are those of two."""
    result = run(config, "train.parallel=fsdp", processes=2, signal=signal.SIGTERM, when="step 5/16")
    assert result.codes == [0, 0], result.output
    first = learnt(tmp_path / "run")[-1]["step"]
    assert first < 10
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    result = run(config, signal=signal.SIGTERM, when="step 11/16")
    assert f"going on after step {first}" in result.output
    result = run(config, "train.parallel=fsdp", processes=2)
    assert result.codes == [0, 0] and "going on after step" in result.output, result.output
    losses = [[record["loss"] for record in learnt(folder)] for folder in (tmp_path / "run", sharded[0])]
    assert losses[0][:first] == losses[1][:first]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)  # as above: another order of sums


def test_what_two_processes_saved_one_restores_exactly(sharded, tmp_path):
    """Judged by torch's own converter, and by the weights that the run exported."""
    path = sharded[0] / "checkpoints" / "step-000016"
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    saved = torch.load(tmp_path / "whole.pt", weights_only=False)
    about = json.loads((sharded[0] / "config.json").read_text())
    model = build({"model": about["model"]})
    optimizer = optim.adamw(model, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    identity = json.loads((path / "manifest.json").read_text())["model"]
    Checkpointer(tmp_path, identity=identity).restore(path, model, optimizer)
    exported = load_file(sharded[0] / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved["model"][name]) and torch.equal(parameter, exported[name]), name
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, saved["optimizer"][name][key]), (name, key)
        assert optimizer.state[parameter]["step"] == STEPS


# The command itself, in which the second process is killed at step 5 of the first attempt.
DIES_ONCE = """
import os, runpy, signal
from palimpsest.train import loop
update = loop.Run.update
def die(self, *rest):
    if self.step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, *rest)
loop.Run.update = die
runpy.run_module("palimpsest.train", run_name="__main__")
"""


def test_a_process_that_dies_under_torchrun_is_recovered_from(run, config, tmp_path):
    """The real command line once, from start to end: torchrun starts all again, and the run goes on from step 3."""
    (tmp_path / "dies.py").write_text(DIES_ONCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    rest = [str(config), "train.parallel=fsdp", "train.steps=7"]
    command += [str(tmp_path / "dies.py"), *rest]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "complete: 7 of 7 steps" in done.stdout and "going on after step 3" in done.stderr
    calm = run(*rest, f"train.out={tmp_path / 'calm'}", processes=2)
    assert calm.codes == [0, 0], calm.output
    same_run(tmp_path / "run", tmp_path / "calm")


# -- what else goes wrong ---------------------------------------------------------------------------------------------

LEAPS = """
import random, time
true, draw = time.time, random.Random(rank)
time.time = lambda: true() + draw.uniform(-1e6, 1e6)
"""


def test_a_clock_that_leaps_changes_nothing(run, config, whole, tmp_path):
    """Stopped and started again too: what is newest is told by steps, not by times of files."""
    result = run(config, signal=signal.SIGTERM, when="step 7/16", prelude=LEAPS)
    assert result.codes == [0], result.output
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True):
        os.utime(path, (0, int(path.name[-6:]) * -1000 + 10**6))  # the newest looks oldest
    assert run(config, prelude=LEAPS).codes == [0]
    same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_in_a_folder_is_refused_in_all_processes(run, config, tmp_path, processes):
    ways = ["train.parallel=fsdp"] if processes > 1 else []
    with launch.hold(tmp_path / "run", parallel.start("cpu")):
        result = run(config, *ways, processes=processes)
    assert result.codes == [2] * processes, result.output
    assert result.output.count("where another run is at work; wait for it or choose another") == processes


# A file system that lets nobody write, in the run folder or in its checkpoints alone.
READ_ONLY = """
import errno, os, pathlib
for name in ("mkdir", "touch"):
    def refuse(self, *arguments, inner=getattr(pathlib.Path, name), **options):
        if {part!r} in str(self):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return inner(self, *arguments, **options)
    setattr(pathlib.Path, name, refuse)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_that_cannot_be_written_is_named_at_the_start(run, config, tmp_path, processes):
    ways = ["train.parallel=fsdp"] if processes > 1 else []
    result = run(config, *ways, processes=processes, prelude=READ_ONLY.format(part=str(tmp_path / "run")))
    assert result.codes == [2] * processes, result.output
    assert result.output.count("where nothing can be written (Read-only file system); it must be") == processes


def test_checkpoints_that_cannot_be_written_are_loud_and_training_goes_on(run, config, whole, tmp_path):
    result = run(config, prelude=READ_ONLY.format(part=".saving-step-000009"))
    assert result.codes == [0] and "CHECKPOINT OF STEP 9 NOT SAVED: [Errno 30] Read-only" in result.output
    same_run(tmp_path / "run", whole[0])
