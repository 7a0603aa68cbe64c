"""The files of a tokenised corpus: writing, verifying and mapping them.

A corpus is a folder with ``{split}-00000.bin`` … (token ids, little-endian, uint8, uint16 or uint32 by the vocabulary's
size, each ``shard_tokens`` long but the last), ``{split}-documents.bin`` (int64: where each document begins, and the
end) and ``manifest.json`` (counts, tokenizer, sizes and checksums of the others).

While it is made, any of its files can be cut back to what an earlier moment had written (``SplitWriter.rewind``); the
files come out the same, byte for byte, however often that happened (``build.py``).

What is held out: document 0 is for training; each later one goes to validation when a hash of its position says so,
with probability ``validation_fraction``. When that chose none (a corpus of one or a few documents) the last
``validation_fraction`` of the bytes is cut from the end of the last document. No token is in both splits.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .encode import Encoded
from .files import DataError
from .split import derive, mix64

logger = logging.getLogger("palimpsest.train")

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
_HELD_OUT = 0x70616C696D707365


def held_out(positions: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents go to validation by the hash of their position, bool; see the module."""
    words = derive(_HELD_OUT) ^ mix64(positions.astype(np.uint64))
    return (mix64(words) < np.uint64(int(fraction * 2**64))) & (positions > 0)


def token_dtype(vocab_size: int) -> str:
    """The narrowest unsigned integers that hold every id."""
    room = {"<u1": 2**8, "<u2": 2**16, "<u4": 2**32}
    return next(kind for kind, ids in room.items() if vocab_size <= ids)


class FileWriter:
    """A file that knows its size and checksum, and is on the disk once closed.

    Args:
        size: how much of what is there is kept, and written on from.

    Raises:
        DataError: when less is there.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path, self.size = path, size
        self._stream, self._digest = open(path, "r+b" if size else "wb"), hashlib.sha256()  # noqa: SIM115
        left = size
        while left and (block := self._stream.read(min(left, 2**18))):
            self._digest.update(block)
            left -= len(block)
        if left:
            self._stream.close()
            raise DataError(f"{path} had {size - left} bytes; {size} were written")
        self._stream.truncate()

    def write(self, content: bytes | memoryview) -> None:
        """Append ``content``."""
        self._stream.write(content)
        self._digest.update(content)
        self.size += len(content)

    def sync(self) -> None:
        """Bring to the disk what has been written."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> dict[str, Any]:
        """Flush to the disk; the file's name, size and sha256, for the manifest."""
        if not self._stream.closed:
            self.sync()
            self._stream.close()
        return {"file": self.path.name, "size": self.size, "sha256": self._digest.hexdigest()}


class Counts(NamedTuple):
    """What a split holds: documents, tokens with separators, bytes of text, and those by the tokenizer's table."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    table_bytes: int = 0


class SplitWriter:
    """Writes one split's documents into shards of a fixed number of tokens, once ``rewind`` has said from where."""

    def __init__(self, folder: Path, name: str, separator: int, dtype: str, shard_tokens: int) -> None:
        self.folder, self.name, self.separator, self.shard_tokens = folder, name, separator, shard_tokens
        self.dtype = np.dtype(dtype)
        self.counts = Counts()
        self.shards: list[dict[str, Any]] = []
        """The manifest's entries of the shards that are full."""
        self._index: FileWriter | None = None
        self._shard: FileWriter | None = None

    @property
    def _index_path(self) -> Path:
        return self.folder / f"{self.name}-documents.bin"

    def after(self, encoded: Encoded) -> list[Counts]:
        """The counts before each part of what is to be written next, and after the last."""
        opened = np.cumsum(encoded.opens)
        rows = (opened, opened + np.cumsum(encoded.lengths), np.cumsum(encoded.sizes), np.cumsum(encoded.table))
        steps = np.stack(rows, 1).tolist()
        return [Counts(*(a + b for a, b in zip(self.counts, step, strict=True))) for step in ([0] * 4, *steps)]

    def write(self, encoded: Encoded) -> None:
        """Add parts of documents, a separator before each document."""
        assert self._index is not None  # rewind opened it
        if not len(encoded.lengths):
            return
        begins = (np.cumsum(encoded.lengths) - encoded.lengths)[encoded.opens]
        offsets = self.counts.tokens + begins + np.arange(len(begins))
        self._index.write(offsets.astype("<i8").tobytes())
        self._append(np.insert(encoded.tokens, begins, self.separator))
        self.counts = Counts(
            self.counts.documents + len(begins),
            self.counts.tokens + len(encoded.tokens) + len(begins),
            self.counts.bytes + int(encoded.sizes.sum()),
            self.counts.table_bytes + int(encoded.table.sum()),
        )

    def _append(self, tokens: np.ndarray) -> None:
        written = self.counts.tokens
        while len(tokens):
            place = written % self.shard_tokens
            shard = self._next_shard() if self._shard is None or place == 0 else self._shard
            piece, tokens = np.split(tokens, [self.shard_tokens - place])
            shard.write(piece.tobytes())
            written += len(piece)

    def _next_shard(self) -> FileWriter:
        self._finish_shard()
        self._shard = FileWriter(self._shard_path(len(self.shards)))
        return self._shard

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.bin"

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self.shards.append(self._shard.close())
            self._shard = None

    def rewind(self, counts: Counts, shards: list[dict[str, Any]]) -> None:
        """Go back to an earlier moment: its counts, and at least the entries of the shards that were full then.

        Raises:
            DataError: when the files hold less than they did.
        """
        self.close()
        full = max(0, counts.tokens - 1) // self.shard_tokens  # the last shard is open even where it is just full
        self.counts, self.shards = counts, shards[:full]
        self._index = FileWriter(self._index_path, counts.documents * 8)
        size = (counts.tokens - full * self.shard_tokens) * self.dtype.itemsize
        self._shard = FileWriter(self._shard_path(full), size) if size else None
        number = full + bool(size)
        while (path := self._shard_path(number)).exists():
            path.unlink()
            number += 1

    def sync(self) -> None:
        """Bring to the disk what has been written."""
        for writer in (self._index, self._shard):
            if writer is not None:
                writer.sync()

    def finish(self) -> dict[str, Any]:
        """Close every file; returns the split's part of the manifest."""
        assert self._index is not None  # rewind opened it
        self._index.write(np.array([self.counts.tokens], dtype="<i8").tobytes())
        self._finish_shard()
        return {**self.counts._asdict(), "shards": self.shards, "index": self._index.close()}

    def close(self) -> None:
        """Let go of the files, whether or not they are complete."""
        for writer in (self._index, self._shard):
            if writer is not None:
                writer.close()


# -- reading ----------------------------------------------------------------------------------------------------------


def entries(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The manifest's entry (file, size, sha256) of each file, in a fixed order."""
    for name in SPLITS:
        split = manifest["splits"][name]
        yield from (*split["shards"], split["index"])


def map_file(path: Path, dtype: str) -> np.ndarray:
    """A file as a read-only memory-mapped array."""
    return np.memmap(path, dtype=dtype, mode="r")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus.

    Raises:
        DataError: when it cannot be parsed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST} is damaged: {error}; {remedy(folder)}") from None
    if not isinstance(manifest, dict) or not {"identity", "fingerprint", "splits", "dtype"} <= manifest.keys():
        raise DataError(f"{folder / MANIFEST} is not the manifest of a corpus; {remedy(folder)}")
    return manifest


def verify_files(manifest: dict[str, Any], folder: Path, *, checksums: bool) -> None:
    """Compare a corpus with its manifest: first that every file is there with its size, then the checksums.

    Raises:
        DataError: naming the first file that is missing, truncated or changed.
    """
    for entry in entries(manifest):
        path = folder / entry["file"]
        if not path.is_file():
            raise DataError(f"{path} is missing from the corpus; {remedy(folder)}")
        size = path.stat().st_size
        if size != entry["size"]:
            raise DataError(f"{path} had {size} bytes; by the manifest it must have {entry['size']}; {remedy(folder)}")
    for entry in entries(manifest) if checksums else ():
        path = folder / entry["file"]
        found = _sha256(path)
        if found != entry["sha256"]:
            must = f"by the manifest it must be {entry['sha256']}"
            raise DataError(f"{path} is corrupted: its sha256 was {found}; {must}; {remedy(folder)}")


def remedy(folder: Path) -> str:
    """What to do about a corpus that is damaged."""
    return f"delete {folder} to have the corpus prepared again"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and bring the whole folder to the disk; the last thing done to a new corpus."""
    writer = FileWriter(folder / f".{MANIFEST}")
    writer.write(json.dumps(manifest, indent=1).encode("utf-8"))
    writer.close()
    writer.path.replace(folder / MANIFEST)
    sync_folder(folder)
