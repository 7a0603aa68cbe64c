"""Reading a distributed checkpoint that a stranger may have written: nothing in it is executed.

torch keeps the table of a distributed checkpoint, ``.metadata``, as a pickle, and loads values that are no tensors as
pickles too. Here the table comes through an unpickler that knows the classes such a table is made of and no others, its
file names must be names inside the folder, and values come through torch's ``weights_only`` reader.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

_META = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    (_META, "Metadata"),
    (_META, "MetadataIndex"),
    (_META, "StorageMeta"),
    (_META, "TensorStorageMetadata"),
    (_META, "BytesStorageMetadata"),
    (_META, "ChunkStorageMetadata"),
    (_META, "TensorProperties"),
    (_META, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}
"""(module, name) of everything that a table of torch 2.11 to 2.13 refers to, apart from dtypes: ``torch.float32`` …"""


class UnsafeCheckpoint(ValueError):
    """A checkpoint whose table names what no checkpoint needs, or is no table; the message says what."""


class _Unpickler(pickle._Unpickler):
    """The one in Python: the one in C sets aside memory for as many objects as a single number in the file says."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise UnsafeCheckpoint(f"it names {module}.{name}, which is no part of a checkpoint's table")


def read_metadata(path: Path) -> Metadata:
    """The table of a distributed checkpoint.

    Raises:
        UnsafeCheckpoint: when it names a class that a table is not made of, is no table, or leads out of its folder.
    """
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        _check(found)
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{path.name} is refused: {error}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in any way that Python can
        raise UnsafeCheckpoint(f"{path.name} is no table of a checkpoint ({type(error).__name__}: {error})") from None
    return found


def _check(found: Any) -> None:
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise UnsafeCheckpoint(f"it holds a {type(found).__name__}, not a table")
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise UnsafeCheckpoint(f"entry {name!r} is a {type(entry).__name__}")
    if not isinstance(found.storage_data, dict):
        raise UnsafeCheckpoint("it says of nothing where it lies")
    for info in found.storage_data.values():
        where = info.relative_path
        if not isinstance(where, str) or Path(where).name != where or where in (".", ".."):
            raise UnsafeCheckpoint(f"it points to {where!r}, which is no file of this folder")
        if any(not isinstance(number, int) or number < 0 for number in (info.offset, info.length)):
            raise UnsafeCheckpoint(f"it points to bytes {info.offset!r} + {info.length!r} of {where}")
        if getattr(info, "transform_descriptors", None):
            raise UnsafeCheckpoint(f"{where} is transformed by {info.transform_descriptors!r}")


class Reader(dcp.FileSystemReader):
    """torch's reader of distributed checkpoints, with :func:`read_metadata` for its table."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table, checked; UnsafeCheckpoint when it is refused."""
        metadata = read_metadata(Path(self.path) / ".metadata")
        about = getattr(metadata, "storage_meta", None)
        metadata.storage_meta = about if isinstance(about, StorageMeta) else StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(dcp.DefaultLoadPlanner):
    """torch's plan of a load, in which a value that is no tensor (a counter, a float) is read as data only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value where the state has one; UnsafeCheckpoint where the state has a tensor."""
        fqn = read_item.dest_index.fqn
        if isinstance(self.state_dict[fqn], torch.Tensor):
            raise UnsafeCheckpoint(f"{fqn} is a pickled value there, where a tensor must be")
        loaded = torch.load(value, weights_only=True)
        self.state_dict[fqn] = loaded
        if self.flatten_state_dict:
            place: Any = self.original_state_dict
            *path, last = self.mappings[fqn]
            for key in path:
                place = place[key]
            place[last] = loaded
