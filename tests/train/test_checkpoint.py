"""Checkpoints: exact, atomic, checked; damaged ones are named and skipped; a full disk stops nothing."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from palimpsest.models.mixer_config import MemoryConfig
from palimpsest.train import checkpoint as module
from palimpsest.train import staging
from palimpsest.train.checkpoint import MANIFEST, Checkpointer, CheckpointError, ConfigMismatch, differences
from palimpsest.train.launch import complete_model
from palimpsest.train.optim import adamw

IDENTITY = {"dim": 8, "layers": 2, "mixer": [{"kind": "attention"}]}


class Net(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return (x * self.scale) @ self.embed.weight.T


def trained(steps: int = 3, seed: int = 0):
    """A small model and its optimizer after some updates."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = adamw(model, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(steps):
        update(model, optimizer)
    return model, optimizer


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.arange(12).view(2, 6)).square().mean().backward()
    optimizer.step()


def flat(model, optimizer):
    """Every tensor of weights and optimizer, by name."""
    named = {f"w.{k}": v.detach().clone() for k, v in model.state_dict().items()}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        named |= {f"o.{i}.{k}": v.detach().clone() for k, v in optimizer.state[p].items()}
    return named


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_restoring_gives_every_tensor_back_bit_for_bit_and_training_goes_on_alike(tmp_path):
    model, optimizer = trained()
    saver = Checkpointer(tmp_path, identity=IDENTITY)
    path = saver.save(3, model, optimizer, {"tokens": 72})
    assert path == tmp_path / "step-000003"
    before = flat(model, optimizer)
    other, fresh = trained(steps=0, seed=1)
    assert Checkpointer(tmp_path, identity=IDENTITY).restore(path, other, fresh) == {"step": 3, "tokens": 72}
    assert same(before, flat(other, fresh))
    for _ in range(2):
        update(model, optimizer)
        update(other, fresh)
    assert same(flat(model, optimizer), flat(other, fresh))


def test_saving_changes_neither_weights_nor_optimizer(tmp_path):
    model, optimizer = trained()
    before = flat(model, optimizer)
    Checkpointer(tmp_path).save(3, model, optimizer)
    assert same(before, flat(model, optimizer))


def test_hyperparameters_come_from_the_run_not_from_the_checkpoint(tmp_path):
    model, optimizer = trained()
    path = Checkpointer(tmp_path).save(3, model, optimizer)
    other = Net()
    fresh = adamw(other, lr=0.5, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    Checkpointer(tmp_path).restore(path, other, fresh)
    assert [g["weight_decay"] for g in fresh.param_groups] == [0.3, 0.0]
    assert all(g["lr"] == 0.5 and g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 for g in fresh.param_groups)


def test_weights_alone_can_be_restored(tmp_path):
    model, optimizer = trained()
    path = Checkpointer(tmp_path).save(3, model, optimizer)
    other = Net()
    assert Checkpointer(tmp_path).restore(path, other)["step"] == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_keeps_the_last_k(tmp_path):
    model, optimizer = trained()
    saver = Checkpointer(tmp_path, keep_last=2)
    for step in (5, 10, 1_000_000, 2_000_000):
        saver.save(step, model, optimizer)
    assert [path.name for path in saver.list()] == ["step-2000000", "step-1000000"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-2000000"]


def truncate(folder: Path):
    name = folder / "__0_0.distcp"
    name.write_bytes(name.read_bytes()[:-7])
    return "__0_0.distcp has"


def flip(folder: Path):
    name = folder / "__0_0.distcp"
    data = bytearray(name.read_bytes())
    data[len(data) // 2] ^= 1
    name.write_bytes(data)
    return "__0_0.distcp differs from its checksum"


def flip_metadata(folder: Path):
    data = bytearray((folder / ".metadata").read_bytes())
    data[40] ^= 16
    (folder / ".metadata").write_bytes(data)
    return ".metadata differs from its checksum"


def lose_file(folder: Path):
    (folder / "__0_0.distcp").unlink()
    return "__0_0.distcp cannot be read"


def lose_manifest(folder: Path):
    (folder / MANIFEST).unlink()
    return "manifest.json is missing"


def cut_manifest(folder: Path):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:100])
    return "manifest.json cannot be read"


def change_manifest(folder: Path):
    body = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(body | {"step": body["step"] + 1}))
    return "manifest.json differs from its own checksum"


def empty_manifest(folder: Path):
    (folder / MANIFEST).write_text("[]")
    return "manifest.json cannot be read"


DAMAGES = [truncate, flip, flip_metadata, lose_file, lose_manifest, cut_manifest, change_manifest, empty_manifest]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, caplog):
    model, optimizer = trained()
    saver = Checkpointer(tmp_path, keep_last=3)
    saver.save(1, model, optimizer)
    saver.save(2, model, optimizer)
    complaint = damage(tmp_path / "step-000002")
    with caplog.at_level(logging.WARNING, "palimpsest.train"):
        assert Checkpointer(tmp_path).latest_valid() == tmp_path / "step-000001"
    (line,) = [r.getMessage() for r in caplog.records if r.name == "palimpsest.train"]
    assert str(tmp_path / "step-000002") in line and complaint in line
    with pytest.raises(CheckpointError, match="step-000002 is damaged"):
        Checkpointer(tmp_path).restore(tmp_path / "step-000002", model, optimizer)
    assert saver.save(2, model, optimizer) == tmp_path / "step-000002", "written anew when the step comes again"
    assert Checkpointer(tmp_path).latest_valid() == tmp_path / "step-000002"


def test_none_when_nothing_sound_is_there(tmp_path):
    assert Checkpointer(tmp_path / "absent").latest_valid() is None
    model, optimizer = trained()
    lose_manifest(Checkpointer(tmp_path).save(1, model, optimizer))
    assert Checkpointer(tmp_path).latest_valid() is None


def test_a_damaged_later_one_does_not_push_out_the_sound_ones(tmp_path):
    model, optimizer = trained()
    saver = Checkpointer(tmp_path, keep_last=2)
    for step in (1, 2, 9):
        saver.save(step, model, optimizer)
    lose_file(tmp_path / "step-000009")
    saver = Checkpointer(tmp_path, keep_last=2)
    saver.save(3, model, optimizer)
    assert [p.name for p in saver.list()] == ["step-000009", "step-000003", "step-000002"]


def test_leftovers_of_a_killed_save_are_removed_at_the_start(tmp_path):
    model, optimizer = trained()
    path = Checkpointer(tmp_path).save(1, model, optimizer)
    shutil.copytree(path, tmp_path / ".saving-step-000002")
    shutil.copytree(path, tmp_path / ".removing-step-000000")
    saver = Checkpointer(tmp_path)
    assert saver.latest_valid() == path
    saver.clean()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_the_manifest_is_written_last_and_the_name_appears_only_then(tmp_path, monkeypatch):
    seen = []
    write = module._write_synced

    def spy(path, text):
        seen.append((path.name, sorted(p.name for p in path.parent.iterdir()), (tmp_path / "step-000001").exists()))
        write(path, text)

    monkeypatch.setattr(module, "_write_synced", spy)
    model, optimizer = trained()
    Checkpointer(tmp_path).save(1, model, optimizer)
    assert seen == [(MANIFEST, [".metadata", "__0_0.distcp"], False)]


@pytest.mark.parametrize("victim", ["_write_synced", "_sync_folder", "_sha256"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole_and_says_so(tmp_path, monkeypatch, caplog, victim):
    model, optimizer = trained()
    saver = Checkpointer(tmp_path)
    first = saver.save(1, model, optimizer)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, victim, full)
        assert saver.save(2, model, optimizer) is None
    assert "CHECKPOINT OF STEP 2 NOT SAVED" in caplog.text and "No space left" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert Checkpointer(tmp_path).latest_valid() == first
    assert saver.save(3, model, optimizer) is not None, "saving works again when there is room"


LIMITED = """
import logging, resource, signal, sys, torch
sys.path.insert(0, sys.argv[2])
from test_checkpoint import Net, adamw, update
from palimpsest.train.checkpoint import Checkpointer
logging.basicConfig()
model = Net(64)  # tensors larger than a file's buffer, so that the refusal comes inside of torch's writer too
optimizer = adamw(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
update(model, optimizer)
saver = Checkpointer(sys.argv[1])
assert saver.save(1, model, optimizer) is not None
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = (saver.folder / "step-000001" / "__0_0.distcp").stat().st_size
for limit in (0, *range(500, size, size // 20)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    assert saver.save(2, model, optimizer) is None, limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert Checkpointer(sys.argv[1]).latest_valid() == saver.folder / "step-000001"
assert saver.save(3, model, optimizer) is not None
print("went on")
"""


def test_when_the_system_refuses_the_bytes_training_goes_on(tmp_path):
    """The kernel itself refuses (a file size limit, which fails as a full disk does: a short write, then an error)."""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), here], capture_output=True, text=True, timeout=120
    )
    assert "went on" in done.stdout, done.stderr
    assert done.stderr.count("CHECKPOINT OF STEP 2 NOT SAVED") >= 20
    assert "OSError" in done.stderr and "RuntimeError" in done.stderr, "both ways that a refusal shows"


def test_a_fault_that_is_not_the_disks_is_an_error(tmp_path, monkeypatch):
    model, optimizer = trained()

    def broken(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(module.dcp.FileSystemWriter, "write_data", broken)
    with pytest.raises(CheckpointError, match="TypeError: a bug"):
        Checkpointer(tmp_path).save(1, model, optimizer)


def test_another_models_checkpoint_is_an_error_that_names_the_keys(tmp_path):
    model, optimizer = trained()
    path = Checkpointer(tmp_path, identity=IDENTITY).save(1, model, optimizer)
    other = IDENTITY | {"dim": 16, "mixer": [{"kind": "titans_mag"}]}
    with pytest.raises(ConfigMismatch, match="does not fit this config: dim: 8 -> 16; mixer: .*attention.*titans_mag"):
        Checkpointer(tmp_path, identity=other).restore(path, model, optimizer)


def test_keys_that_came_later_are_filled_in(tmp_path):
    model, optimizer = trained()
    path = Checkpointer(tmp_path, identity=IDENTITY).save(1, model, optimizer)
    now = IDENTITY | {"new": None}
    with pytest.raises(ConfigMismatch, match="new: 'absent' -> None"):
        Checkpointer(tmp_path, identity=now).restore(path, model, optimizer)
    assert Checkpointer(tmp_path, 2, now, lambda old: {"new": None} | dict(old)).restore(path, model, optimizer)


def test_a_model_section_is_completed_and_a_faulty_one_left():
    old = {"vocab_size": 8, "dim": 8, "layers": 1, "mixer": {"kind": "neural_memory", "memory": {"heads": 2}}}
    full = complete_model(old)
    assert full["mixer"][0]["memory"] == MemoryConfig(heads=2).model_dump(mode="json") and full["dim"] == 8
    assert complete_model({"dim": "wide"}) == {"dim": "wide"}


def test_weights_of_another_shape_are_an_error(tmp_path):
    model, optimizer = trained()
    path = Checkpointer(tmp_path).save(1, model, optimizer)
    wide = Net(16)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        Checkpointer(tmp_path).restore(path, wide, adamw(wide, lr=1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0))


def test_differences_name_the_place():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert differences(old, {"a": {"b": 2, "c": [1, 2]}, "e": 3}) == [
        "a.b: 1 -> 2",
        "d: None -> 'absent'",
        "e: 'absent' -> 3",
    ]
    assert differences(old, old) == []


def test_keep_last_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep_last was 0"):
        Checkpointer(tmp_path, keep_last=0)


# -- written by a thread while training goes on -----------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch):
    """A disk that takes no manifest until the gate is opened."""
    opened, entered, write = threading.Event(), threading.Event(), module._write_synced

    def slow(*arguments):
        entered.set()
        assert opened.wait(30)
        write(*arguments)

    monkeypatch.setattr(module, "_write_synced", slow)
    yield opened, entered
    opened.set()


def test_training_goes_on_while_a_slow_disk_takes_what_was_staged(tmp_path, gate):
    opened, entered = gate
    model, optimizer = trained()
    saver = Checkpointer(tmp_path)
    before = flat(model, optimizer)
    extra = {"skipped": [1]}
    saver.save_later(3, model, optimizer, extra)
    extra["skipped"].append(2)
    for _ in range(3):
        update(model, optimizer)
    assert entered.wait(30) and saver.list() == [] and saver.saved == -1
    opened.set()
    assert saver.wait() == tmp_path / "step-000003" and saver.saved == 3
    assert not same(before, flat(model, optimizer))
    other, fresh = trained(steps=0, seed=1)
    assert Checkpointer(tmp_path).restore(tmp_path / "step-000003", other, fresh) == {"step": 3, "skipped": [1]}
    assert same(before, flat(other, fresh))


def test_the_next_save_and_every_look_wait_for_the_one_before(tmp_path, gate, caplog, monkeypatch):
    monkeypatch.setattr(staging, "PATIENCE", 0.0)
    caplog.set_level(logging.INFO, "palimpsest.train")
    model, optimizer = trained()
    saver = Checkpointer(tmp_path, keep_last=5)
    for step, action in enumerate((saver.save, saver.save_later), 1):
        gate[0].clear()
        saver.save_later(10 * step, model, optimizer)
        threading.Timer(0.2, gate[0].set).start()
        action(10 * step + 1, model, optimizer)
        assert tmp_path / f"step-{10 * step:06d}" in saver.list()
    assert "s for the checkpoint of step 20" in caplog.text
    saver.save_later(30, model, optimizer)
    assert saver.latest_valid() == tmp_path / "step-000030"
    assert [module.step_of(path) for path in saver.list()] == [30, 21, 20, 11, 10]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), TypeError("a bug")])
def test_a_save_that_fails_is_an_error_line_and_the_next_one_works(tmp_path, monkeypatch, caplog, error):
    model, optimizer = trained()
    saver = Checkpointer(tmp_path)
    first = saver.save(1, model, optimizer)

    def broken(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "_sha256", broken)
        saver.save_later(2, model, optimizer)
        assert saver.wait() is None and saver.saved == 1
    (line,) = [r for r in caplog.records if r.name == "palimpsest.train" and r.levelno == logging.ERROR]
    assert str(error) in line.getMessage() and "step 2" in line.getMessage().lower()
    assert Checkpointer(tmp_path).latest_valid() == first
    saver.save_later(3, model, optimizer)
    assert saver.wait() == tmp_path / "step-000003"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def test_what_is_staged_shares_no_memory():
    inner = {"a": torch.ones(3), "b": [torch.zeros(2), 5], "c": "text"}
    staged = staging.stage({"x": inner})
    inner["a"].add_(1)
    inner["b"][0].add_(1)
    inner["b"].append(6)
    assert staged["x"]["a"].tolist() == [1, 1, 1] and staged["x"]["c"] == "text"
    assert staged["x"]["b"][0].tolist() == [0, 0] and staged["x"]["b"][1:] == [5]
