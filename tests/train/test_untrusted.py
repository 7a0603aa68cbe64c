"""Checkpoints, weights and states of strangers: nothing in them runs, and what is wrong with them is a clear error.

Every file is one that a person may download. An attacker makes checksums as we do, so manifests are made to fit here.
"""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict
from training import MODEL

from palimpsest.models import build, load, load_state
from palimpsest.train import optim
from palimpsest.train.checkpoint import MANIFEST, Checkpointer, CheckpointError, damages
from palimpsest.train.unpickle import UnsafeCheckpoint, read_metadata

MARK = "PALIMPSEST_TEST_RAN"


class Evil:
    """What a hostile pickle is: asks to call a function when it is loaded."""

    def __reduce__(self):
        return (exec, (f"import os; os.environ[{MARK!r}] = '1'",))


@pytest.fixture(autouse=True)
def nothing_ran():
    os.environ.pop(MARK, None)
    yield
    assert MARK not in os.environ, "the file's own code was run"


def parts():
    torch.manual_seed(0)
    model = build({"model": MODEL})
    optimizer = optim.adamw(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    model(torch.arange(16)[None], targets=torch.arange(16)[None]).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, a model's folder and a state, to be spoilt."""
    folder = tmp_path_factory.mktemp("saved")
    model, optimizer = parts()
    Checkpointer(folder / "checkpoints").save(1, model, optimizer)
    model.save(folder / "run")
    model(torch.arange(16)[None]).state.save(folder / "state")
    return folder


@pytest.fixture
def here(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "here")
    return tmp_path / "here"


def reseal(folder: Path) -> None:
    """A manifest that fits the files as they now are."""
    body = json.loads((folder / MANIFEST).read_text())
    del body["sha256"]
    for name in body["files"]:
        data = (folder / name).read_bytes()
        body["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sign(folder, body)


def sign(folder: Path, body: dict) -> None:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(body | {"sha256": digest}))


def restore(folder: Path) -> None:
    Checkpointer(folder.parent).restore(folder, *parts())


def with_table(folder: Path, change) -> None:
    """The checkpoint with its table changed, under a manifest that fits."""
    table = pickle.loads((folder / ".metadata").read_bytes())
    change(table)
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    reseal(folder)


def test_a_sound_table_is_read_as_torch_reads_it(here):
    path = here / "checkpoints" / "step-000001" / ".metadata"
    found = read_metadata(path)
    expected = pickle.loads(path.read_bytes())
    assert found.state_dict_metadata == expected.state_dict_metadata and found.storage_data == expected.storage_data
    assert found.planner_data == expected.planner_data and len(found.state_dict_metadata) > 30


def plant(table):
    table.planner_data = Evil()


def plant_getattr(table):
    table.planner_data = Getattr()


class Getattr:
    def __reduce__(self):
        return getattr, ("", "join")


def leave_the_folder(table):
    for info in table.storage_data.values():
        info.relative_path = "../../run/model.safetensors"


def transform(table):
    for info in table.storage_data.values():
        info.transform_descriptors = ["zstd"]


def claim_bytes(table):
    for info in table.storage_data.values():
        info.length = -1


def misname(table):
    table.state_dict_metadata[("a", 1)] = table.state_dict_metadata.pop("model.embed.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (plant, "refused: it names builtins.exec, which is no part of a checkpoint's table"),
        (plant_getattr, "refused: it names builtins.getattr"),
        (leave_the_folder, "points to '../../run/model.safetensors', which is no file of this folder"),
        (transform, r"is transformed by \['zstd'\]"),
        (claim_bytes, "points to bytes"),
        (misname, r"entry \('a', 1\) is a"),
    ],
)
def test_a_table_that_wants_more_is_refused_by_name(here, change, message):
    folder = here / "checkpoints" / "step-000001"
    with_table(folder, change)
    assert damages(folder) == [], "its checksums are as they should be"
    with pytest.raises(CheckpointError, match=message):
        restore(folder)


def test_a_table_of_another_kind_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsafeCheckpoint, match="it holds a dict, not a table"):
        read_metadata(tmp_path / ".metadata")
    (tmp_path / ".metadata").write_bytes(b"\x80\x04r\xff\xff\xff\xff.")  # wants room for 4 billion objects
    with pytest.raises(UnsafeCheckpoint, match="no table of a checkpoint"):
        read_metadata(tmp_path / ".metadata")


def append_evil(path: Path) -> tuple[int, int]:
    """Put a hostile value behind what the file holds; returns where it begins and its length."""
    evil = io.BytesIO()
    torch.save(Evil(), evil)
    start = path.stat().st_size
    with path.open("ab") as file:
        file.write(evil.getvalue())
    return start, len(evil.getvalue())


@pytest.mark.parametrize("name", ["model.embed.weight", "optimizer.embed.weight.exp_avg"])
def test_a_pickled_value_in_the_place_of_a_tensor_is_refused(here, name):
    """torch reads a value that the table calls bytes with everything that pickle can do."""
    folder = here / "checkpoints" / "step-000001"
    start, length = append_evil(folder / "__0_0.distcp")

    def change(table):
        info = table.storage_data[MetadataIndex(name, torch.Size([0, 0]), 0)]
        table.state_dict_metadata[name] = BytesStorageMetadata()
        table.storage_data[MetadataIndex(name)] = type(info)("__0_0.distcp", start, length)

    with_table(folder, change)
    with pytest.raises(CheckpointError, match=f"{name} is a pickled value there, where a tensor must be"):
        restore(folder)


class Counting(torch.optim.SGD):
    """Keeps a plain number in its state, as optimizers may."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1


def test_a_plain_number_of_an_optimizers_comes_back_and_a_program_in_its_place_does_not(tmp_path):
    torch.manual_seed(0)

    def pair():
        model = torch.nn.Linear(2, 2)
        optimizer = Counting(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = pair()
    optimizer.step()
    folder = Checkpointer(tmp_path).save(1, model, optimizer)
    other, fresh = pair()
    Checkpointer(tmp_path).restore(folder, other, fresh)
    assert get_state_dict(other, fresh)[1]["state"]["weight"]["count"] == 2
    start, length = append_evil(folder / "__0_0.distcp")

    def change(table):
        for index, info in table.storage_data.items():
            if index.fqn.endswith("count"):
                info.offset, info.length = start, length

    with_table(folder, change)
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        Checkpointer(tmp_path).restore(folder, other, fresh)


@pytest.mark.parametrize("name", ["../run/config.json", "..", "a/b"])
def test_a_manifest_that_leads_elsewhere_is_damaged(here, name):
    folder = here / "checkpoints" / "step-000001"
    body = json.loads((folder / MANIFEST).read_text())
    del body["sha256"]
    body["files"][name] = {"bytes": 1, "sha256": ""}
    sign(folder, body)
    assert damages(folder) == [f"manifest.json cannot be read (ValueError: {name!r} is no file of this folder)"]


# -- files changed at random ------------------------------------------------------------------------------------------


def spoil(data: bytes, draw: random.Random) -> bytes:
    """Cut short, bits flipped, a stretch overwritten or put in twice; mostly near the beginning, where headers are."""
    place = draw.randrange(min(len(data), draw.choice([8, 64, 1000, len(data)])))
    way = draw.randrange(5)
    if way == 0:
        return data[:place]
    if way == 1:
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    if way == 2:
        return data[:place] + draw.randbytes(8) + data[place + 8 :]
    if way == 3:
        return data[:place] + data[place : place + 30] * 2 + data[place + 30 :]
    return data[:place] + struct.pack("<Q", draw.choice([2**63, 2**64 - 1, 2**40, 0])) + data[place + 8 :]


NESTED = b"[" * 100_000
HEADERS = [b"", b"\xff" * 8, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 100_000) + NESTED, b"\x00" * 100]
HEADERS += [
    struct.pack("<Q", len(header)) + header
    for header in (
        b'{"position": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 8]}}',
        b'{"position": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}',
        b'{"__metadata__": {"palimpsest.state": "[]"}}',
        b'{"__metadata__": {"palimpsest.state": "{\\"schema\\": \\"1\\", \\"layers\\": \\"99999999999\\"}"}}',
        b'{"__metadata__": {"palimpsest.state": "{\\"schema\\": \\"1\\", \\"layers\\": \\"2\\"}"}}',
    )
]


def attempts(data: bytes, count: int, further: list[bytes]):
    draw = random.Random(len(data))
    return [*further, *(spoil(data, draw) for _ in range(count))]


def survive(path: Path, contents: list[bytes], read, *errors: type[Exception]) -> int:
    """How many of the contents were refused, each with a message; any other exception fails the test."""
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            read()
        except errors as error:
            assert len(str(error)) > 20, (type(error), error)
            refused += 1
    return refused


def test_a_state_file_is_read_or_refused(here):
    contents = attempts((here / "state").read_bytes(), 40, HEADERS)
    refused = survive(here / "state", contents, lambda: load_state(here / "state"), ValueError)
    assert len(HEADERS) < refused < len(contents), "a flipped bit of a number is nobody's to see"


def test_weights_are_read_or_refused(here):
    path = here / "run" / "model.safetensors"
    contents = attempts(path.read_bytes(), 30, HEADERS)
    assert len(HEADERS) < survive(path, contents, lambda: load(here / "run"), ValueError) < len(contents)


def test_a_models_config_is_read_or_refused(here):
    path = here / "run" / "config.json"
    about = json.loads(path.read_text())
    wide = about | {"model": about["model"] | {"dim": 2**20, "vocab_size": 2**31}}
    deep = about | {"model": about["model"] | {"layers": 10**12}}
    faulty: list = [[], {}, {"schema": 1}, {"schema": 1, "model": 3}, {"schema": 1, "model": {}}, wide, deep]
    further = [b"", NESTED, *(json.dumps(content).encode() for content in faulty)]
    contents = attempts(path.read_bytes(), 20, further)
    assert survive(path, contents, lambda: load(here / "run"), ValueError) >= len(further)


def test_a_checkpoint_under_a_manifest_that_fits_is_read_or_refused(here):
    folder = here / "checkpoints" / "step-000001"
    parted = parts()

    def read():
        reseal(folder)
        Checkpointer(folder.parent).restore(folder, *parted)

    for name, count in ((".metadata", 30), ("__0_0.distcp", 15)):
        whole = (folder / name).read_bytes()
        further = [b"", NESTED, pickle.dumps(Evil())]
        refused = survive(folder / name, attempts(whole, count, further), read, CheckpointError)
        assert refused >= len(further)
        (folder / name).write_bytes(whole)
    read()


def test_a_manifest_is_read_or_refused(here):
    """Sealed with its own checksum, so that what it says is what is judged."""
    folder = here / "checkpoints" / "step-000001"
    body = json.loads((folder / MANIFEST).read_text())
    del body["sha256"]
    for key in body:
        for value in (None, -1, "x", [], [[]], {"a": None}, 1e300):
            sign(folder, body | {key: value})
            try:
                restore(folder)
            except CheckpointError as error:
                assert MANIFEST in str(error)
            except ValueError as error:
                assert key == "model", error
    sign(folder, body)
    restore(folder)
