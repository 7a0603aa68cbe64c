"""The files of a tokenised corpus: writing, verifying and mapping them.

A corpus is a folder with ``{split}-00000.bin`` … (token ids, little-endian, uint8, uint16 or uint32 by the vocabulary's
size, each ``shard_tokens`` long but the last), ``{split}-documents.bin`` (int64: where each document begins, and the
end) and ``manifest.json`` (counts, tokenizer, sizes and checksums of the others).

What is held out: document 0 is for training; each later one goes to validation when a hash of its position says so,
with probability ``validation_fraction``. When that chose none (a corpus of one or a few documents) the last
``validation_fraction`` of the bytes is cut from the end of the last document. No token is in both splits.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .data_config import DataConfig
from .sources import DataError, Document, documents
from .split import derive
from .tokenizer import Tokenizer

logger = logging.getLogger("palimpsest.train")

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
_HELD_OUT = 0x70616C696D707365
_BATCH_BYTES = 4 * 2**20


def tokenise(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write a source's shards and indices; returns their part of the manifest."""
    writers = {name: _SplitWriter(folder, name, tokenizer, config.shard_tokens) for name in SPLITS}
    empty = 0

    def with_text() -> Iterator[Document]:
        nonlocal empty
        for document in documents(config):
            if document.text:
                yield document
            else:
                empty += 1
                logger.debug("%s is empty and left out", document.name)

    try:
        for group in _grouped(assign(with_text(), config.validation_fraction)):
            encoded = tokenizer.encode_documents([text for _, text in group])
            for (name, text), tokens in zip(group, encoded, strict=True):
                writers[name].write(tokens, len(text))
        splits = {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    if not splits["train"]["tokens"]:
        what = "nothing but empty documents" if empty else "no documents"
        key = "name" if config.source == "hf" else "path"
        raise DataError(f"data.{key} was {getattr(config, key)!r}, a corpus with {what}; it must have text")
    if empty:
        logger.info("%d empty documents left out", empty)
    dtype = writers["train"].dtype
    return {"dtype": dtype, "empty_documents": empty, "splits": splits}


def assign(found: Iterable[Document], fraction: float) -> Iterator[tuple[str, bytes]]:
    """The split of each document, and its text, by the module's rule. One is held back, to know which is the last."""
    threshold = int(fraction * 2**64)
    held_out, size, last = False, 0, None
    for position, document in enumerate(found):
        if last is not None:
            yield last
        chosen = position > 0 and derive(_HELD_OUT, position) < threshold
        held_out, size = held_out or chosen, size + len(document.text)
        last = ("validation" if chosen else "train", document.text)
    if last is None:
        return
    if held_out:
        yield last
        return
    text = last[1]
    cut = max(0, len(text) - round(fraction * size))
    while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:  # never inside a character
        cut += 1
    yield from ((split, part) for split, part in (("train", text[:cut]), ("validation", text[cut:])) if part)


def _grouped(assigned: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Lists of documents of a few megabytes together, for tokenizers that encode many at once."""
    group: list[tuple[str, bytes]] = []
    size = 0
    for name, text in assigned:
        group.append((name, text))
        size += len(text)
        if size >= _BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


class FileWriter:
    """A file that knows its size and checksum, and is on the disk once closed."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._stream, self._digest = open(path, "wb"), hashlib.sha256()  # noqa: SIM115

    def write(self, content: bytes | memoryview) -> None:
        """Append ``content``."""
        self._stream.write(content)
        self._digest.update(content)
        self.size += len(content)

    def close(self) -> dict[str, Any]:
        """Flush to the disk; the file's name, size and sha256, for the manifest."""
        if not self._stream.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        return {"file": self.path.name, "size": self.size, "sha256": self._digest.hexdigest()}


class _SplitWriter:
    """Writes one split's documents into shards of a fixed number of tokens."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.folder, self.name, self.tokenizer, self.shard_tokens = folder, name, tokenizer, shard_tokens
        room = {"<u1": 2**8, "<u2": 2**16, "<u4": 2**32}
        self.dtype = next(kind for kind, ids in room.items() if tokenizer.vocab_size <= ids)
        self._table = tokenizer.byte_table.numpy()
        self.documents = self.tokens = self.bytes = self.table_bytes = 0
        self._index = FileWriter(folder / f"{name}-documents.bin")
        self._shard: FileWriter | None = None
        self._shards: list[dict[str, Any]] = []

    def write(self, tokens: np.ndarray, byte_count: int) -> None:
        """Add a document: a separator, then its tokens."""
        self._index.write(np.array([self.tokens], dtype="<i8").tobytes())
        self._append(np.array([self.tokenizer.separator], dtype=self.dtype))
        self._append(tokens.astype(self.dtype, copy=False))
        self.documents += 1
        self.bytes += byte_count
        self.table_bytes += int(self._table[tokens].sum())

    def _append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            place = self.tokens % self.shard_tokens
            shard = self._next_shard() if self._shard is None or place == 0 else self._shard
            piece, tokens = np.split(tokens, [self.shard_tokens - place])
            shard.write(piece.tobytes())
            self.tokens += len(piece)

    def _next_shard(self) -> FileWriter:
        self._finish_shard()
        self._shard = FileWriter(self.folder / f"{self.name}-{len(self._shards):05d}.bin")
        return self._shard

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close())

    def finish(self) -> dict[str, Any]:
        """Close every file; returns the split's part of the manifest."""
        self._index.write(np.array([self.tokens], dtype="<i8").tobytes())
        self._finish_shard()
        self._shard = None
        counts = {key: getattr(self, key) for key in ("documents", "tokens", "bytes", "table_bytes")}
        return {**counts, "shards": self._shards, "index": self._index.close()}

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
    writer = FileWriter(folder / MANIFEST)
    writer.write(json.dumps(manifest, indent=1).encode("utf-8"))
    writer.close()
    sync_folder(folder)
