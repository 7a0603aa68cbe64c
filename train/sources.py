"""Reading text: local files, standard input, Hugging Face datasets, and the Python standard library's own sources.

A source is read once, in a fixed order, in pieces of about a megabyte, and can be read on from the end of any piece
(:class:`Place`). Reading (:func:`pieces`, in one process) only moves bytes; what they hold is parsed and checked by
:func:`parse`, wherever a piece is tokenised. Documents are UTF-8 text without NUL bytes; anything else is refused,
naming the file and the place in it.

A document longer than ``LONGEST`` bytes is handled in parts, so that memory stays bounded whatever a file holds. They
are cut after a line, where a tokenizer that splits text into words, as byte-level ones do, would have cut anyway.
"""

import gzip
import io
import json
import re
import sys
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

from .files import STDIN, DataError, files, source_digest

if TYPE_CHECKING:  # see files.py
    from .data_config import DataConfig

__all__ = ["DataError", "Document", "Part", "Piece", "Place", "documents", "files", "parse", "pieces", "source_digest"]

PIECE = 2**20
"""Bytes of a source that are handed on together, about."""
LONGEST = 8 * 2**20
"""Bytes of a document that are tokenised at once, at most."""

STANDARD_INPUT = Path(STDIN)

ROWS = 256
"""Rows of parquet files that are read at once."""


class Document(NamedTuple):
    """One document: UTF-8 text without NUL bytes (it may be empty), and where it came from, for messages."""

    text: bytes
    name: str


class Part(NamedTuple):
    """A document, or a part of a long one: text, whether it opens its document, and where it came from."""

    text: bytes
    opens: bool
    name: str


class Place(NamedTuple):
    """Where a source is read on: a file's number, bytes (unpacked) or rows into it, and its lines before that.

    ``checksum`` is the CRC-32 of what standard input has given, which cannot be recognised by name.
    """

    file: int = 0
    offset: int = 0
    line: int = 0
    checksum: int = 0


class Piece(NamedTuple):
    """Some of a source, not yet looked into, and where the next one begins.

    ``content``: for text, (bytes, offset in the document, name) of each part; for lines, (whole lines, name, number of
    lines before); for rows, (values, name, number of rows before). ``read``: bytes of source files read so far.
    """

    kind: Literal["text", "lines", "rows"]
    content: Any
    after: Place
    read: int


def documents(config: "DataConfig") -> Iterator[Document]:
    """The documents of a source, in a fixed order, one in memory at a time.

    text: a document is a file, or all of standard input. jsonl: a line that is not blank. parquet and hf: a row.
    stdlib: a ``.py`` file.

    Raises:
        DataError: for a missing path, a file of another kind, text that is binary or not UTF-8, a malformed line, a
            missing text key, or a package that is not installed.
    """
    held: list[Part] = []
    for part in (part for piece in pieces(config) for part in parse(piece, config.text_key)):
        if part.opens and held:
            yield Document(b"".join(each.text for each in held), held[0].name)
            held = []
        held.append(part)
    if held:
        yield Document(b"".join(each.text for each in held), held[0].name)


def pieces(
    config: "DataConfig",
    start: Place = Place(),  # noqa: B008
    found: list[Path] | None = None,
) -> Iterator[Piece]:
    """A source in pieces of about ``PIECE`` bytes, from ``start``: the beginning, or ``after`` of an earlier piece.

    Args:
        found: the source's files, where they have been looked for.

    Raises:
        DataError: for what can be told without parsing; else see :func:`documents`.
    """
    if config.source == "hf":
        yield from _dataset_pieces(config, start)
        return
    read = {"stdlib": _text_pieces, "text": _text_pieces, "jsonl": _line_pieces, "parquet": _row_pieces}[config.source]
    if config.path == STDIN:
        found = [STANDARD_INPUT]
    yield from read(config, files(config) if found is None else found, start)


def parse(piece: Piece, text_key: str) -> Iterator[Part]:
    """The documents in a piece, long ones in parts; see :func:`documents` for the errors."""
    if piece.kind == "text":
        for text, offset, name in piece.content:
            yield Part(_checked(text, name, offset).text, offset == 0, name)
        return
    content, name, before = piece.content
    if piece.kind == "lines":
        for number, line in enumerate(content.split(b"\n"), start=before + 1):
            if line.strip():
                yield from _parts(_json_line(line, f"{name}:{number}", text_key))
    else:
        for number, value in enumerate(content, start=before + 1):
            yield from _parts(_field({text_key: value}, text_key, f"{name} row {number}"))


# -- long documents ---------------------------------------------------------------------------------------------------

# After a line that another one follows at its margin; else before a word; [!-~] is what is visible in ASCII.
_CUTS = (re.compile(rb".*\n(?=[!-~])", re.DOTALL), re.compile(rb".*[!-~](?= [!-~])", re.DOTALL))


def cut_place(text: bytes) -> int:
    """How much of a text of more than ``LONGEST`` bytes its next part is: from half of ``LONGEST`` to all of it."""
    for cut in _CUTS:
        found = cut.match(text, LONGEST // 2, LONGEST)
        if found:
            return found.end()
    place = LONGEST
    while place > LONGEST - 4 and text[place] & 0xC0 == 0x80:  # never inside a character
        place -= 1
    return place


def cut_stream(stream: BinaryIO, offset: int = 0) -> Iterator[tuple[bytes, int, bool]]:
    """The parts of one document that is read from ``offset`` on: (text, where it begins, whether more follows)."""
    text = stream.read(LONGEST + 1)
    while len(text) > LONGEST:
        place = cut_place(text)
        yield text[:place], offset, True
        offset += place
        text = text[place:] + stream.read(LONGEST + 1 - (len(text) - place))
    yield text, offset, False


def _parts(document: Document) -> Iterator[Part]:
    if len(document.text) <= LONGEST:
        yield Part(document.text, True, document.name)
        return
    for text, offset, _ in cut_stream(io.BytesIO(document.text)):
        yield Part(text, offset == 0, document.name)


# -- local files ------------------------------------------------------------------------------------------------------


def _checked(text: bytes, name: str, offset: int = 0) -> Document:
    """A document or a part of one, once it is known to be UTF-8 without NUL bytes."""
    zero = text.find(b"\0")
    if zero >= 0:
        raise DataError(f"{name} is binary (a NUL byte at byte {offset + zero}); it must be text")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text ({error.reason} at byte {offset + error.start}); it must be"
        ) from None
    return Document(text, name)


def _text_pieces(config: "DataConfig", found: list[Path], start: Place) -> Iterator[Piece]:
    """Files as text, small ones together; ``stdlib`` in UTF-8, whatever encoding a file declares."""
    group: list[tuple[bytes, int, str]] = []
    before = size = 0
    place = start
    for index, path in enumerate(found):
        if index < start.file:
            before += path.stat().st_size
            continue
        with _opened(path, _python_file if config.source == "stdlib" else None) as (stream, raw):
            first = start if index == start.file else Place(index)
            _skip(stream, first, path)
            checksum = first.checksum
            for text, offset, more in cut_stream(stream, first.offset):
                group.append((text, offset, _name(path)))
                size += len(text)
                checksum = zlib.crc32(text, checksum) if path == STANDARD_INPUT else 0
                place = Place(index, offset + len(text), 0, checksum) if more else Place(index + 1)
                if size >= PIECE:
                    yield Piece("text", group, place, before + _tell(raw))
                    group, size = [], 0
            before += _tell(raw)
    if group:
        yield Piece("text", group, place, before)


def _python_file(path: Path) -> BinaryIO:
    """A Python source in whatever encoding it declares, as UTF-8."""
    raw = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return io.BytesIO(raw if encoding == "utf-8" else raw.decode(encoding).encode("utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not in the encoding that it declares: {error}") from None


def _name(path: Path) -> str:
    return "standard input" if path == STANDARD_INPUT else str(path)


def _tell(raw: BinaryIO) -> int:
    """How far a file has been read; 0 for standard input, which may be a pipe."""
    return 0 if raw is sys.stdin.buffer else raw.tell()


def _skip(stream: BinaryIO, place: Place, path: Path) -> None:
    """Go to where an earlier process stopped; what a pipe gives, and what is packed, is read again up to there."""
    if path != STANDARD_INPUT and not path.name.lower().endswith((".gz", ".zst")):
        stream.seek(place.offset)
        return
    left, checksum = place.offset, 0
    while left and (block := stream.read(min(left, PIECE))):
        left -= len(block)
        checksum = zlib.crc32(block, checksum) if place.checksum else 0
    if left or checksum != place.checksum:
        raise DataError(
            f"{_name(path)} is not what it was when its preparation was interrupted: its first {place.offset} bytes "
            f"{'are not there' if left else 'differ'}; give the same again"
        )


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
def _opened(path: Path, convert: Callable[[Path], BinaryIO] | None = None) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file, unpacked while it is read, and as it lies on the disk; damage to a packed one is named."""
    if path == STANDARD_INPUT:
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    if convert is not None:
        stream = convert(path)
        yield stream, stream
        return
    faults: tuple[type[Exception], ...] = (gzip.BadGzipFile, zlib.error, EOFError)
    name = path.name.lower()
    if name.endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path} needs the extra 'data': pip install 'palimpsest[data]'") from error
        faults = (*faults, zstandard.ZstdError)
    try:
        with open(path, "rb") as raw:
            unpacked: Any = raw
            if name.endswith(".gz"):
                unpacked = gzip.GzipFile(fileobj=raw)
            elif name.endswith(".zst"):
                unpacked = io.BufferedReader(_Zstandard(raw), 2**20)
            yield unpacked, raw
    except faults as error:
        raise DataError(f"{path} is damaged or not what its suffix says: {error}") from error


def _line_pieces(config: "DataConfig", found: list[Path], start: Place) -> Iterator[Piece]:
    """Blocks of whole lines of jsonl files, unpacked."""
    before = 0
    for index, path in enumerate(found):
        if index < start.file:
            before += path.stat().st_size
            continue
        place = start if index == start.file else Place(index)
        with _opened(path) as (stream, raw):
            _skip(stream, place, path)
            while block := stream.read(PIECE):
                block += stream.readline()
                checksum = zlib.crc32(block, place.checksum) if path == STANDARD_INPUT else 0
                after = Place(index, place.offset + len(block), place.line + block.count(b"\n"), checksum)
                yield Piece("lines", (block, _name(path), place.line), after, before + _tell(raw))
                place = after
            before += _tell(raw)


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


def _row_pieces(config: "DataConfig", found: list[Path], start: Place) -> Iterator[Piece]:
    """Rows of parquet files: their text column and nothing else."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("data.source 'parquet' needs the extra 'data': pip install 'palimpsest[data]'") from error
    before = 0
    for index, path in enumerate(found):
        size = path.stat().st_size
        if index >= start.file:
            try:
                with pyarrow.parquet.ParquetFile(path) as table:
                    first = start.offset if index == start.file else 0
                    for values, row in _together(_batches(table, path, config.text_key, first), first):
                        after = row + len(values)
                        read = before + size * after // max(table.metadata.num_rows, 1)
                        yield Piece("rows", (values, str(path), row), Place(index, after), read)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise DataError(f"{path} is damaged or not parquet: {error}") from error
        before += size


def _batches(table: Any, path: Path, text_key: str, row: int) -> Iterator[list[Any]]:
    """The values of a parquet file's text column from a row on; row groups before it are not read."""
    if text_key not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise DataError(f"{path} has no column {text_key!r} (data.text_key); it has {columns}")
    group, groups = 0, table.metadata.num_row_groups
    while group < groups and row >= table.metadata.row_group(group).num_rows:
        row -= table.metadata.row_group(group).num_rows
        group += 1
    for batch in table.iter_batches(batch_size=ROWS, row_groups=range(group, groups), columns=[text_key]):
        yield batch.column(0).to_pylist()[row:]
        row = max(0, row - batch.num_rows)


def _together(groups: Iterable[list[Any]], row: int) -> Iterator[tuple[list[Any], int]]:
    """Lists of values joined until they have about ``PIECE`` characters, and the number of rows before each."""
    held: list[Any] = []
    size = 0
    for group in groups:
        held += group
        size += sum(len(value) for value in group if isinstance(value, str))
        if size >= PIECE:
            yield held, row
            row += len(held)
            held, size = [], 0
    if held:
        yield held, row


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def _dataset_pieces(config: "DataConfig", start: Place) -> Iterator[Piece]:
    """Rows of a dataset, streamed."""
    rows, name = _dataset(config), f"{config.name}/{config.split}"
    if start.offset:
        rows = rows.skip(start.offset)

    def values() -> Iterator[list[Any]]:
        for number, record in enumerate(rows, start=start.offset + 1):
            if config.text_key not in record:
                _field(record, config.text_key, f"{name} row {number}")
            yield [record[config.text_key]]

    for group, row in _together(values(), start.offset):
        yield Piece("rows", (group, name, row), Place(0, row + len(group)), 0)


def _dataset(config: "DataConfig") -> Any:
    """The dataset ``data.name``: a name, a local folder of jsonl or parquet files, or what ``save_to_disk`` wrote."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.source 'hf' needs the extra 'data': pip install 'palimpsest[data]'") from error
    saved = Path(str(config.name)).expanduser()
    try:
        if (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file():
            found = datasets.load_from_disk(str(saved))
            return (found[config.split] if isinstance(found, datasets.DatasetDict) else found).to_iterable_dataset()
        return datasets.load_dataset(config.name, config.subset, split=config.split, streaming=True)
    except (FileNotFoundError, ValueError, KeyError, ConnectionError) as error:
        what = f"{config.name!r} (data.subset {config.subset!r}, data.split {config.split!r})"
        raise DataError(f"data.name was {what}, which cannot be loaded: {error}") from error
