"""Making a corpus: a source tokenised into shards, in a folder beside that can be left and gone on with at any moment.

``.NAME.partial`` beside the corpus' folder NAME holds its files as far as they are, and ``progress.json``, which says
how much of them is sure and where the source is read on. It is replaced about once a second, after the files were
synced. Whoever finds it (the same command again) cuts the files back to it and goes on, so that the corpus is the same
byte for byte however often it was interrupted. A lock on the folder keeps a second process out, which waits. When all
is written the manifest is, the folder is renamed, and from then on it is a corpus.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .data_config import DataConfig
from .encode import Encoded, encode, encoded
from .files import DataError, files
from .metrics import _clock
from .shards import (
    MANIFEST,
    SPLITS,
    Counts,
    FileWriter,
    SplitWriter,
    held_out,
    read_manifest,
    sync_folder,
    token_dtype,
    write_manifest,
)
from .sources import Piece, Place, cut_stream, parse, pieces
from .tokenizer import Tokenizer

logger = logging.getLogger("palimpsest.train")

PROGRESS = "progress.json"
JOURNAL_SECONDS = 1.0
"""Seconds of work that an interruption may cost, about."""
LOG_SECONDS = 30.0
"""Seconds between two lines on how far it is, where there is no terminal."""


def build(
    folder: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    about: dict[str, Any],
    jobs: int = 1,
    found: list[Path] | None = None,
) -> bool:
    """Tokenise into a folder beside ``folder``, then rename it there; or go on with what an interrupted call left.

    Returns whether this call did it; False when another process was first.

    Args:
        about: further entries of the manifest, with its ``fingerprint``. jobs: processes that tokenise.
        found: the source's files, where they have been looked for.

    Raises:
        DataError: for a source or text that cannot be used, and for a folder that holds something else; nothing stays.
        OSError: from the disk or the network; what was done stays, for the same call to go on with.
    """
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (folder / MANIFEST).exists():  # looked at last: a corpus may appear at any moment
        raise DataError(
            f"data.folder was {str(folder)!r}, which holds no {MANIFEST}; it must be a corpus, new or empty"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.parent / f".{folder.name}.partial"
    with _held(beside, folder) as mine:
        if not mine:
            return False
        first = True
        try:
            _clear_of_others(beside, about["fingerprint"])
            if not (beside / MANIFEST).exists():
                write_manifest(beside, tokenise(beside, config, tokenizer, about=about, jobs=jobs, found=found) | about)
            for path in (beside / PROGRESS, *beside.glob("tail-*.bin")):  # only now: what goes on needs them
                path.unlink(missing_ok=True)
            try:
                os.rename(beside, folder)
            except OSError:
                if not (folder / MANIFEST).exists():  # else another process was first, and its corpus is as good
                    raise
                first = False
                shutil.rmtree(beside, ignore_errors=True)
            sync_folder(folder.parent)
        except Exception as error:
            if isinstance(error, DataError) or not (beside / PROGRESS).exists():
                shutil.rmtree(beside, ignore_errors=True)
            else:
                logger.warning("what is done stays in %s; the same command goes on with it", beside)
            raise
        return first


@contextmanager
def _held(beside: Path, folder: Path) -> Iterator[bool]:
    """Hold the folder in which a corpus is made; False when another process has made it in the meantime."""
    waiting = False
    while True:
        beside.mkdir(exist_ok=True)
        handle = os.open(beside, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waiting:
                    logger.info("another process prepares %s: waiting for it", folder)
                waiting = True
                time.sleep(0.05)
                continue
            except OSError as error:
                logger.warning("%s cannot be locked (%s): let no other process prepare it now", beside, error)
            if not _is_still(handle, beside):  # it was renamed or removed before the lock was had
                continue
            mine = not (folder / MANIFEST).exists()
            if not mine:
                shutil.rmtree(beside, ignore_errors=True)
            yield mine
            return
        finally:
            os.close(handle)


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _clear_of_others(beside: Path, fingerprint: str) -> None:
    """Empty the folder when it holds no progress towards this corpus."""
    found = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, DataError):
        if (beside / MANIFEST).exists():
            found = read_manifest(beside)["fingerprint"]
        else:
            found = json.loads((beside / PROGRESS).read_bytes())["fingerprint"]
    if found == fingerprint:
        return
    if found is not None:
        logger.info("%s was of another configuration or source: starting anew", beside)
    for path in beside.iterdir():
        path.unlink()


def tokenise(
    folder: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    about: dict[str, Any],
    jobs: int = 1,
    found: list[Path] | None = None,
) -> dict[str, Any]:
    """Write a source's shards and indices, or finish those that are begun; returns their part of the manifest."""
    corpus = Making(folder, config, tokenizer, about["fingerprint"])
    try:
        corpus.resume()
        if not corpus.cut:
            if found is None:
                found = files(config)
            meter = Meter(found, corpus.size, corpus.read)
            source = pieces(config, corpus.place, found)
            with contextlib.closing(encoded(source, config.text_key, tokenizer, corpus.dtype, jobs)) as contents:
                for piece, content in contents:
                    corpus.add(piece, content)
                    meter.show(corpus.size, corpus.read)
            meter.close()
        return corpus.finish()
    finally:
        corpus.close()


class Making:
    """A corpus on its way: its files, where its source is read on, and what must be known of the last document.

    The last document's text is kept in a file of its own (``tail-N.bin``) as long as nothing is held out, for the end
    of it may have to be: see ``shards.py``.
    """

    def __init__(self, folder: Path, config: DataConfig, tokenizer: Tokenizer, fingerprint: str) -> None:
        self.folder, self.config, self.tokenizer, self.fingerprint = folder, config, tokenizer, fingerprint
        self.fraction = config.validation_fraction
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.splits = {
            name: SplitWriter(folder, name, tokenizer.separator, self.dtype, config.shard_tokens) for name in SPLITS
        }
        self.place = Place()
        self.position = self.empty = self.size = self.read = 0
        """Documents with text, without; bytes of text; bytes of source files read."""
        self.any_held_out = False
        self.marks: list[tuple[int, Counts]] = []
        """Of each part of the last document: the byte at which it begins, and what the train split held before it."""
        self.tail: FileWriter | None = None
        self.cut: list[int] = []
        """When all is read and nothing was held out: the byte of the last mark that stays, and where text is cut."""
        self._journalled = time.monotonic()

    # -- pieces -------------------------------------------------------------------------------------------------------

    def add(self, piece: Piece, content: Encoded) -> None:
        """Write what a piece became, and note about once a second that it is done."""
        documents = self.position - 1 + np.cumsum(content.opens)
        chosen = held_out(documents, self.fraction)
        self.any_held_out |= bool(chosen.any())
        if self.any_held_out and self.tail is not None:
            self.tail.close()
            self.tail, self.marks = None, []
        if self.fraction and not self.any_held_out and len(documents):
            self._keep_tail(piece, content)
        if chosen.any():
            self.splits["train"].write(_select(content, ~chosen))
            self.splits["validation"].write(_select(content, chosen))
        else:
            self.splits["train"].write(content)
        self.position += int(content.opens.sum())
        self.empty += content.empty
        self.size += int(content.sizes.sum())
        self.place, self.read = piece.after, piece.read
        if time.monotonic() - self._journalled >= JOURNAL_SECONDS:
            self.journal()

    def _keep_tail(self, piece: Piece, content: Encoded) -> None:
        """Keep the text of the last document, and where each of its parts begins."""
        opened = np.flatnonzero(content.opens)
        first = int(opened[-1]) if len(opened) else 0
        number = self.position + len(opened)
        if len(opened):
            if self.tail is not None:
                self.tail.close()
            self.tail, self.marks = FileWriter(self._tail_path(number)), []
        assert self.tail is not None  # a document that goes on was opened by an earlier piece
        texts = [part.text for part in parse(piece, self.config.text_key) if part.text]
        before = self.splits["train"].after(content)
        for text, counts in zip(texts[first:], before[first:-1], strict=True):
            self.marks.append((self.tail.size, counts))
            self.tail.write(text)

    def _tail_path(self, number: int) -> Path:
        return self.folder / f"tail-{number}.bin"

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Hold out the end of the last document if nothing else is; the corpus' part of the manifest."""
        if self.position == 0:
            what = "nothing but empty documents" if self.empty else "no documents"
            key = "name" if self.config.source == "hf" else "path"
            raise DataError(f"data.{key} was {getattr(self.config, key)!r}, a corpus with {what}; it must have text")
        if not self.cut and self.fraction and not self.any_held_out:
            self._choose_cut()
        if self.cut:
            self._hold_out_tail(*self.cut)
        splits = {name: writer.finish() for name, writer in self.splits.items()}
        if self.empty:
            logger.info("%d empty documents left out", self.empty)
        return {"dtype": self.dtype, "empty_documents": self.empty, "splits": splits}

    def _choose_cut(self) -> None:
        """Find where the last document is cut, and note it before anything of it is taken back."""
        assert self.tail is not None
        self.tail.sync()
        length = self.tail.size
        cut = max(0, length - round(self.fraction * self.size))
        with self.tail.path.open("rb") as text:
            text.seek(cut)
            following = text.read(4)
        while 0 < cut < length and following[:1] and following[0] & 0xC0 == 0x80:  # never inside a character
            cut, following = cut + 1, following[1:]
        if cut == length:
            return
        begin, counts = [mark for mark in self.marks if mark[0] <= cut][-1]
        self.cut = [begin, cut]
        self.splits["train"].counts = counts
        self.journal()  # before anything is taken back: who goes on from here finds at least what it says

    def _hold_out_tail(self, begin: int, cut: int) -> None:
        """Write the last document again from byte ``begin`` on: to ``cut`` for training, the rest for validation."""
        train, validation = (self.splits[name] for name in SPLITS)
        train.rewind(train.counts, train.shards)
        validation.rewind(Counts(), [])
        with self._tail_path(self.position).open("rb") as text:
            text.seek(begin)
            kept = text.read(cut - begin)
            if kept:
                train.write(encode([kept], [begin == 0], self.tokenizer, self.dtype))
            for part, offset, _ in cut_stream(text):
                validation.write(encode([part], [offset == 0], self.tokenizer, self.dtype))

    # -- interruptions ------------------------------------------------------------------------------------------------

    def journal(self) -> None:
        """Bring everything to the disk, and then the note that it is there."""
        for writer in (*self.splits.values(), self.tail):
            if writer is not None:
                writer.sync()
        state = {
            "fingerprint": self.fingerprint,
            "place": self.place,
            **{key: getattr(self, key) for key in ("position", "empty", "size", "read", "any_held_out", "cut")},
            "marks": self.marks,
            "tail": 0 if self.tail is None else self.tail.size,
            "splits": {name: [writer.counts, writer.shards] for name, writer in self.splits.items()},
        }
        note = FileWriter(self.folder / f".{PROGRESS}")
        note.write(json.dumps(state).encode("utf-8"))
        note.close()
        note.path.replace(self.folder / PROGRESS)
        sync_folder(self.folder)
        current = self._tail_path(self.position)
        for path in self.folder.glob("tail-*.bin"):
            if path != current or self.any_held_out:
                path.unlink()
        self._journalled = time.monotonic()

    def _begin(self) -> None:
        for writer in self.splits.values():
            writer.rewind(Counts(), [])

    def resume(self) -> None:
        """Go back to the last note, or to the beginning where there is none."""
        path = self.folder / PROGRESS
        if not path.exists():
            self._begin()
            return
        state = json.loads(path.read_bytes())
        try:
            for name, (counts, shards) in state["splits"].items():
                self.splits[name].rewind(Counts(*counts), shards)
            if state["marks"] and not state["any_held_out"]:
                self.tail = FileWriter(self._tail_path(state["position"]), state["tail"])
        except (OSError, DataError) as error:
            logger.warning("%s is not as its %s says (%s): starting anew", self.folder, PROGRESS, error)
            self._begin()
            return
        for key in ("position", "empty", "size", "read", "any_held_out", "cut"):
            setattr(self, key, state[key])
        self.place = Place(*state["place"])
        self.marks = [(begin, Counts(*counts)) for begin, counts in state["marks"]]
        logger.info("going on with %s after %s bytes of text", self.folder, f"{self.size:,}")

    def close(self) -> None:
        """Let go of the files."""
        for writer in (*self.splits.values(), self.tail):
            if writer is not None:
                writer.close()


def _select(content: Encoded, chosen: np.ndarray) -> Encoded:
    """The chosen parts."""
    tokens = content.tokens[np.repeat(chosen, content.lengths)]
    lengths, sizes, table, opens = (part[chosen] for part in content[1:5])
    return Encoded(tokens, lengths, sizes, table, opens, content.empty)


class Meter:
    """How far it is: a line that is written over on a terminal; elsewhere a log line now and then.

    Args:
        found: the source's files.
        size: bytes of text that an earlier call has tokenised. read: bytes of source files that it read.
    """

    def __init__(self, found: Sequence[Path], size: int, read: int) -> None:
        self.total = sum(path.stat().st_size for path in found)  # 0 where nobody knows
        self.size, self.read = size, read
        self.tty, self.wrote = sys.stderr.isatty(), False
        self.begin = self.shown = time.monotonic()

    def show(self, size: int, read: int) -> None:
        """Tell of it when it is time to: bytes of text tokenised and bytes of source files read, of all calls."""
        now = time.monotonic()
        if now - self.shown < (0.5 if self.tty else LOG_SECONDS):
            return
        self.shown = now
        text = self.line(size, read, now - self.begin)
        if self.tty:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
            self.wrote = True
        else:
            logger.info("%s", text)

    def line(self, size: int, read: int, seconds: float) -> str:
        """MB of text so far, MB a second; of local files also the share that is done, and the time to come."""
        text = f"{size / 1e6:,.1f} MB of text, {(size - self.size) / 1e6 / seconds:,.1f} MB/s"
        if self.total and read > self.read:
            left = seconds * max(self.total - read, 0) / (read - self.read)
            text += f", {read / self.total:.1%} of the source, {_clock(left)} to go"
        return text

    def close(self) -> None:
        """Clear the line."""
        if self.wrote:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
