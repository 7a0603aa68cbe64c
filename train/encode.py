"""Tokenising the pieces of a source, here or in worker processes; what comes out does not depend on which.

A worker is a Python process of its own that reads pickled pieces from its standard input and writes what they became to
its standard output. It imports no torch, uses one thread, and ends when its input does, so that none outlives the
process that started it, however that one dies.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import Self

from .files import DataError
from .sources import Piece, parse
from .tokenizer import Tokenizer

AHEAD = 2
"""Pieces per worker that are read and not yet written, at most."""
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""A process is a core: the tokenizers library would start a thread for every core in each of them. It has one thread of
its own, that is; told to have none it works in Python's, which takes a tenth longer."""
FEW = 4
"""So many pieces are tokenised before workers would have started."""


class Encoded(NamedTuple):
    """What a piece became. Of each part of a document that has text, in order: int64 [parts] and bool [parts].

    tokens: of all parts, without separators, in the corpus' dtype. lengths: tokens of each part. sizes: its bytes.
    table: the same by ``tokenizer.byte_counts``. opens: whether it opens a document. empty: documents without text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    table: np.ndarray
    opens: np.ndarray
    empty: int


def encode(texts: list[bytes], opens: list[bool], tokenizer: Tokenizer, dtype: str, empty: int = 0) -> Encoded:
    """Tokenise some parts of documents."""
    found = tokenizer.encode_documents(texts)
    lengths = np.array([len(tokens) for tokens in found], dtype=np.int64)
    tokens = np.concatenate([np.asarray(each).astype(dtype, copy=False) for each in (*found, np.empty(0, dtype))])
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    table = _table_bytes(tokens, lengths, tokenizer)
    return Encoded(tokens, lengths, sizes, table, np.array(opens, dtype=bool), empty)


def _table_bytes(tokens: np.ndarray, lengths: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The bytes of each part by ``tokenizer.byte_counts``, int64 [parts]."""
    counts = tokenizer.byte_counts.astype(np.int32)
    others = np.delete(counts, tokenizer.separator)  # the separator is in no text
    if (others == others[0]).all():
        return lengths * int(others[0])
    sums = np.zeros(len(lengths), dtype=np.int64)
    some = np.flatnonzero(lengths)  # reduceat has no notion of an empty part
    if len(some):
        begins = (np.cumsum(lengths) - lengths)[some]
        sums[some] = np.add.reduceat(counts[tokens], begins, dtype=np.int64)
    return sums


def encode_piece(piece: Piece, text_key: str, tokenizer: Tokenizer, dtype: str) -> Encoded:
    """Parse and tokenise a piece.

    Raises:
        DataError: as :func:`~.sources.documents`.
    """
    parts = list(parse(piece, text_key))
    kept = [part for part in parts if part.text]
    return encode([p.text for p in kept], [p.opens for p in kept], tokenizer, dtype, len(parts) - len(kept))


def encoded(
    pieces: Iterable[Piece], text_key: str, tokenizer: Tokenizer, dtype: str, jobs: int
) -> Generator[tuple[Piece, Encoded], None, None]:
    """Each piece with what it became, in order, by ``jobs`` worker processes; by none for one job or few pieces.

    Raises:
        DataError: the first that reading or tokenising meets, in the order of the source.
    """

    def here(piece: Piece) -> Encoded:
        return encode_piece(piece, text_key, tokenizer, dtype)

    stream = _until_error(pieces)
    first = list(islice(stream, FEW)) if jobs > 1 else []
    if len(first) < FEW:
        for piece in chain(first, stream):
            yield _sound(piece), here(_sound(piece))
        return
    with Workers(jobs, (text_key, tokenizer, dtype)) as workers:
        yield from in_order(chain(first, stream), workers, jobs)


def in_order(
    pieces: Iterable[Piece | Exception], work: Callable[[Piece], Encoded], jobs: int
) -> Iterator[tuple[Piece, Encoded]]:
    """``(piece, work(piece))`` in the order of the pieces, ``jobs`` of them at a time.

    At most ``AHEAD * jobs`` pieces are read before the first of them is yielded: that is all that memory holds.
    """
    waiting: deque[tuple[Piece | Exception, Future[Encoded] | None]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for piece in pieces:
                waiting.append((piece, None if isinstance(piece, Exception) else pool.submit(work, piece)))
                if len(waiting) >= AHEAD * jobs:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        finally:
            for _, future in waiting:
                if future is not None:
                    future.cancel()


def _result(piece: Piece | Exception, future: "Future[Encoded] | None") -> tuple[Piece, Encoded]:
    sound = _sound(piece)
    assert future is not None  # a piece that is not an error was handed to a worker
    return sound, future.result()


def _sound(piece: Piece | Exception) -> Piece:
    if isinstance(piece, Exception):
        raise piece
    return piece


def _until_error(pieces: Iterable[Piece]) -> Iterator[Piece | Exception]:
    """The pieces, and in its place the error that ends them: what was read before it is worked on first."""
    try:
        yield from pieces
    except Exception as error:
        yield error


class Workers:
    """Worker processes, each taken by one thread at a time.

    Args:
        setup: (text_key, tokenizer, dtype), sent to each once.
    """

    def __init__(self, count: int, setup: tuple[str, Tokenizer, str]) -> None:
        _ = setup[1].byte_counts  # found once, and sent along
        self._setup = pickle.dumps(setup, protocol=pickle.HIGHEST_PROTOCOL)
        self._count = count
        self._all: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        for _ in range(self._count):
            pipe = subprocess.PIPE
            worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
            self._all.append(worker)
        for worker in self._all:  # each reads it when it has started: only now, so that they start side by side
            assert worker.stdin is not None
            worker.stdin.write(self._setup)
            worker.stdin.flush()
            self._idle.put(worker)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.kill()  # it has nothing to finish
        for worker in self._all:
            for stream in (worker.stdin, worker.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):
                    stream.close()
            worker.wait()

    def __call__(self, piece: Piece) -> Encoded:
        worker = self._idle.get()
        try:
            assert worker.stdin is not None and worker.stdout is not None
            pickle.dump(piece, worker.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            worker.stdin.flush()
            answer: Encoded | DataError = pickle.load(worker.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = worker.poll()
            raise OSError(f"a process that tokenises ended with exit code {code}; what it said is above") from error
        finally:
            self._idle.put(worker)  # one that died, too: who takes it fails at once, and does not wait
        if isinstance(answer, DataError):
            raise answer
        return answer


def serve() -> None:
    """What a worker does until its standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells when to stop, by closing the pipe
    source = sys.stdin.buffer
    with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever a library prints, it is no answer
        setup: tuple[str, Tokenizer, str] = pickle.load(source)
        while True:
            try:
                piece = pickle.load(source)
            except EOFError:
                return
            answer: Any
            try:
                answer = encode_piece(piece, *setup)
            except DataError as error:
                answer = error
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
