"""Where text comes from: local files, Hugging Face datasets, and the Python standard library's own sources.

A source is read once, in a fixed order, a document at a time. What it yields is UTF-8 text without NUL bytes; anything
else is refused, naming the file and the place in it.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import platform
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .data_config import DataConfig

JSONL = (".jsonl", ".ndjson", ".json")
SUFFIXES = {
    "jsonl": tuple(name + packed for name in JSONL for packed in ("", ".gz", ".zst")),
    "parquet": (".parquet",),
}
NOT_TEXT = (*SUFFIXES["jsonl"], *SUFFIXES["parquet"], ".gz", ".zst", ".zip", ".bz2", ".xz", ".tar")


class DataError(ValueError):
    """Data that cannot be used; the message names the key or file, what it was, and what it must be."""


class Document(NamedTuple):
    """One document: UTF-8 text without NUL bytes (it may be empty), and where it came from, for messages."""

    text: bytes
    name: str


def documents(config: DataConfig) -> Iterator[Document]:
    """The documents of a source, in a fixed order, one in memory at a time.

    text: a document is a file. jsonl: a line that is not blank. parquet and hf: a row. stdlib: a ``.py`` file.

    Raises:
        DataError: for a missing path, a file of another kind, text that is binary or not UTF-8, a malformed line, a
            missing text key, or a package that is not installed.
    """
    if config.source == "hf":
        yield from _hugging_face(config)
        return
    read = {"stdlib": _python_file, "text": _text_file, "jsonl": _json_lines, "parquet": _parquet_rows}[config.source]
    for path in files(config):
        yield from read(path, config.text_key)


def files(config: DataConfig) -> list[Path]:
    """The local files of a source in the order in which they are read; empty for hf.

    Folders are walked whole, sorted, without hidden files and folders; in a folder, jsonl and parquet take the files
    with their suffixes, text takes all.

    Raises:
        DataError: for a path that is missing, matches nothing, comes twice, or has another source's suffix.
    """
    if config.source == "hf":
        return []
    if config.source == "stdlib":
        return _standard_library()
    found: list[Path] = []
    for item in [config.path] if isinstance(config.path, str) else config.path or []:
        found += _expand(item, config.source)
    seen: set[str] = set()
    for path in found:
        _check_suffix(path, config.source)
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(f"data.path was {config.path!r}, which names {path} twice; it must name each file once")
        seen.add(real)
    return found


def source_digest(config: DataConfig) -> str | None:
    """A checksum of the source files' names, sizes and times of change; None for hf, whose files are not ours to see.

    Raises:
        DataError: as ``files``.
    """
    if config.source == "hf":
        return None
    digest = hashlib.sha256(platform.python_version().encode() if config.source == "stdlib" else b"")
    for path in files(config):
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# -- local files ------------------------------------------------------------------------------------------------------


def _expand(item: str, source: str) -> list[Path]:
    """The files that one entry of ``data.path`` names."""
    path = Path(item).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        wanted: Callable[[Path], bool] = lambda file: source == "text" or file.name.endswith(SUFFIXES[source])  # noqa: E731
        found = [file for file in _walk(path) if wanted(file)]
        if not found:
            kind = "any file" if source == "text" else f"a file ending in {' or '.join(SUFFIXES[source])}"
            raise DataError(f"data.path was {item!r}, a folder without {kind}")
        return found
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
    if not found:
        what = "which matches no file" if glob.has_magic(item) else "which does not exist"
        raise DataError(f"data.path was {item!r}, {what}; it must name existing files, folders or globs")
    return found


def _walk(root: Path, without: Iterable[str] = ()) -> list[Path]:
    """Every file below a folder, sorted; hidden ones and folders named in ``without`` are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _check_suffix(path: Path, source: str) -> None:
    name = path.name.lower()
    if source == "text":
        other = next((kind for kind, endings in SUFFIXES.items() if name.endswith(endings)), None)
        if other or name.endswith(NOT_TEXT):
            advice = f"read it with data.source {other!r}" if other else "unpack it"
            raise DataError(f"data.path named {path}, which data.source 'text' cannot read; {advice}")
    elif not name.endswith(SUFFIXES[source]):
        endings = ", ".join(SUFFIXES[source])
        raise DataError(f"data.path named {path}, which data.source {source!r} cannot read; it must end in {endings}")


def _standard_library() -> list[Path]:
    """The standard library's ``.py`` files, sorted, without its tests and without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
    found = [path for path in _walk(root, left_out) if path.suffix == ".py"]
    if not found:
        raise DataError(f"data.source was 'stdlib', but {root} has no .py files; use data.source 'text' and data.path")
    return found


def _checked(text: bytes, name: str) -> Document:
    """A document, once it is known to be UTF-8 without NUL bytes."""
    zero = text.find(b"\0")
    if zero >= 0:
        raise DataError(f"{name} is binary (a NUL byte at byte {zero}); it must be text")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}); it must be") from None
    return Document(text, name)


def _text_file(path: Path, text_key: str) -> Iterator[Document]:
    yield _checked(path.read_bytes(), str(path))


def _python_file(path: Path, text_key: str) -> Iterator[Document]:
    """A Python source in whatever encoding it declares, as UTF-8."""
    raw = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        raw = raw if encoding == "utf-8" else raw.decode(encoding).encode("utf-8")
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not in the encoding that it declares: {error}") from None
    yield _checked(raw, str(path))


class _Zstandard(io.RawIOBase):
    """Reads any number of zstandard frames. A file that ends inside one is an EOFError: the library passes over it."""

    def __init__(self, stream: BinaryIO) -> None:
        import zstandard

        self._stream, self._decompressor = stream, zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._stream.read(2**16)
            if not block and self._frame is not None:
                raise EOFError("the file ends inside a compressed frame")
            if not block:
                return 0
            while block:
                self._frame = self._frame or self._decompressor.decompressobj()
                self._ready += self._frame.decompress(block)
                block = self._frame.unused_data
                if self._frame.eof:
                    self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


@contextmanager
def _open_zstandard(path: Path, mode: str) -> Iterator[BinaryIO]:
    with open(path, "rb") as stream:
        yield io.BufferedReader(_Zstandard(stream), 2**20)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read, unpacked while it is read; damage to a packed one is named."""
    faults: tuple[type[Exception], ...] = (gzip.BadGzipFile, zlib.error, EOFError)
    opener: Callable[..., Any] = open
    if path.name.lower().endswith(".gz"):
        opener = gzip.open
    elif path.name.lower().endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path} needs the extra 'data': pip install 'palimpsest[data]'") from error
        faults, opener = (*faults, zstandard.ZstdError), _open_zstandard
    try:
        with opener(path, "rb") as stream:
            yield stream
    except faults as error:
        raise DataError(f"{path} is damaged or not what its suffix says: {error}") from error


def _json_lines(path: Path, text_key: str) -> Iterator[Document]:
    with _opened(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _json_line(line, f"{path}:{number}", text_key)


def _json_line(line: bytes, name: str, text_key: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{name} is not JSON: {error}; each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise DataError(f"{name} holds {type(record).__name__}; each line must be one JSON object")
    return _field(record, text_key, name)


def _field(record: dict[str, Any], text_key: str, name: str) -> Document:
    """The document in a record's text field."""
    if text_key not in record:
        raise DataError(f"{name} has no field {text_key!r} (data.text_key); it has {list(record)}")
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(f"field {text_key!r} (data.text_key) of {name} was {type(text).__name__}; it must be a string")
    try:
        return _checked(text.encode("utf-8"), name)
    except UnicodeEncodeError as error:
        raise DataError(f"{name} has text that is not Unicode ({error.reason} at character {error.start})") from None


def _parquet_rows(path: Path, text_key: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("data.source 'parquet' needs the extra 'data': pip install 'palimpsest[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_key not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise DataError(f"{path} has no column {text_key!r} (data.text_key); it has {columns}")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                for record in batch.to_pylist():
                    row += 1
                    yield _field(record, text_key, f"{path} row {row}")
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is damaged or not parquet: {error}") from error


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def _hugging_face(config: DataConfig) -> Iterator[Document]:
    """Rows of a dataset, streamed. ``data.name`` is a name, or a local folder of jsonl or parquet files."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.source 'hf' needs the extra 'data': pip install 'palimpsest[data]'") from error
    try:
        rows = datasets.load_dataset(config.name, config.subset, split=config.split, streaming=True)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        what = f"{config.name!r} (data.subset {config.subset!r}, data.split {config.split!r})"
        raise DataError(f"data.name was {what}, which cannot be loaded: {error}") from error
    for number, record in enumerate(rows, start=1):
        yield _field(record, config.text_key, f"{config.name}/{config.split} row {number}")
