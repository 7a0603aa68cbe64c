"""A split of a tokenised corpus, and the batches that are read from it.

The tokens of a split are a ring of R tokens: each document is a separator followed by its text, and after the last
document comes the first one's separator. A window is T consecutive tokens, its targets the T tokens one later, so every
target is a real token of the corpus: at a document's end it is the separator that opens the next.

Training reads W = R // T windows an epoch, in a pseudo-random order that is computed per index (``permute``: nothing is
shuffled in memory), from a starting point in the ring that is drawn anew each epoch, so that window borders move; the
R mod T tokens left over are others each time. Validation reads windows in order from the start of the first document.

Windows of whole documents (``whole``) are others: each holds documents that fit it together (``packing.py``), and what
room they leave is padding, without targets. Training reads them in an order that is drawn anew each epoch; there and in
validation every token of the corpus comes once an epoch, and every one has a target.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .files import DataError
from .packing import Plan, plan
from .tokenizer import Tokenizer

logger = logging.getLogger("palimpsest.train")

IGNORE = -100
"""A target that no loss counts."""

_MASK = 2**64 - 1
_ROUNDS = 8
_Word = TypeVar("_Word", int, np.ndarray)


def mix64(word: _Word) -> _Word:
    """A bijection of 64-bit words that scatters them: splitmix64's finaliser (Steele, Lea & Flood 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def derive(*parts: int) -> int:
    """A 64-bit key from a sequence of integers, in which the order counts."""
    key = 0
    for part in parts:
        key = mix64(key ^ mix64(part & _MASK))
    return key


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where ``index`` goes in the pseudo-random permutation of 0..size-1 that ``key`` names; O(1) memory in ``size``.

    Rounds of ``x * odd + key mod 2**bits`` and ``x ^ (x >> bits / 2)``, each a bijection of the words of the fewest
    bits that hold ``size``; a word that falls outside goes through again until it falls inside (cycle walking, Black &
    Rogaway 2002), which makes it a bijection of 0..size-1.

    Args:
        index: integers in [0, size), one-dimensional. size: 1 to 2**62. key: a 64-bit word.
    """
    bits = (size - 1).bit_length()
    low, shift = 2**bits - 1, (bits + 1) // 2
    keys = [derive(key, turn) for turn in range(2 * _ROUNDS)]
    result = np.asarray(index).astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        word = result[outside]
        for factor, term in zip(keys[::2], keys[1::2], strict=True):
            word = (word * (factor | 1) + term) & low
            word ^= word >> shift
        result[outside] = word
        outside = outside[word >= size]
    return result.astype(np.int64)


class Batch(NamedTuple):
    """What a model is trained on at once.

    tokens and targets are int64, [rows, seq_len], or [1, rows * seq_len] with ``cu_seqlens`` int32 [N + 1] when
    documents are packed. A target is the token after its token, or -100 where there is nothing to learn.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        borders = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=non_blocking)
        tokens, targets = (part.to(device, non_blocking=non_blocking) for part in self[:2])
        return Batch(tokens, targets, borders)


class Rows(NamedTuple):
    """Windows: int64 tokens and targets [rows, seq_len], and where a document begins in each, from 0 on; None where
    windows have no borders."""

    tokens: np.ndarray
    targets: np.ndarray
    borders: list[np.ndarray] | None

    def batch(self) -> Batch:
        """The windows as a batch; end to end in one row when they have borders."""
        tokens, targets = torch.from_numpy(self.tokens), torch.from_numpy(self.targets)
        if self.borders is None:
            return Batch(tokens, targets)
        count, seq_len = self.tokens.shape
        ends = [row * seq_len + borders for row, borders in enumerate(self.borders)]
        cu_seqlens = np.concatenate([*ends, [count * seq_len]]).astype(np.int32)
        return Batch(tokens.view(1, -1), targets.view(1, -1), torch.from_numpy(cu_seqlens))


class Split:
    """Tokens for training or for validation, memory-mapped, and their windows.

    Args:
        name: ``train`` or ``validation``.
        shards: one-dimensional arrays of unsigned integers; all but the last have the same length.
        offsets: int64 [documents + 1], where each document begins (its separator), and the number of tokens.
        byte_count: bytes of all the documents' text. table_bytes: the same by ``tokenizer.bytes_per_token``.
        packed: whether windows of this split are cut at document borders (``cu_seqlens``). whole: whether they hold
            whole documents.
        where: the corpus' folder, for messages.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[np.ndarray],
        offsets: np.ndarray,
        tokenizer: Tokenizer,
        *,
        byte_count: int,
        table_bytes: int,
        packed: bool = False,
        whole: bool = False,
        where: str = "memory",
    ) -> None:
        self.name, self.tokenizer, self.packed, self.where = name, tokenizer, packed, where
        self.whole = whole
        self._plans: dict[int, Plan] = {}
        self.shards, self.offsets = list(shards), offsets
        self.tokens = sum(len(shard) for shard in self.shards)
        self.documents = len(offsets) - 1
        self.bytes, self.table_bytes = byte_count, table_bytes

    # -- counting -----------------------------------------------------------------------------------------------------

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per token, separators counted as tokens; exact for every tokenizer."""
        return self.bytes / self.tokens

    def bytes_of(self, tokens: Tensor) -> Tensor:
        """As ``tokenizer.bytes_per_token``, scaled so that the sum over this split is its exact number of bytes."""
        return self.tokenizer.bytes_per_token(tokens) * (self.bytes / self.table_bytes)

    def windows(self, seq_len: int) -> int:
        """The number of windows of ``seq_len`` tokens in an epoch.

        Raises:
            ValueError: when ``seq_len`` is not positive.
            DataError: when the split is too short for one window and its targets.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len was {seq_len}; it must be at least 1")
        if self.whole:
            return self.plan(seq_len).windows
        if self.tokens < seq_len + 1:
            remedy = " or data.validation_fraction larger" if self.name == "validation" else ""
            raise DataError(
                f"train.seq_len was {seq_len}, but the {self.name} split of the corpus in {self.where} has "
                f"{self.tokens} tokens; seq_len must be at most {max(self.tokens - 1, 0)}, or the corpus longer{remedy}"
            )
        return self.tokens // seq_len

    def plan(self, seq_len: int) -> Plan:
        """How whole documents make windows of ``seq_len`` tokens; the first call makes it, and tells of the padding."""
        if seq_len not in self._plans:
            made = self._plans[seq_len] = plan(self.offsets, seq_len)
            logger.info(
                "%s: %s whole documents in %s windows of %d tokens, %.2f%% of it padding; %s documents are longer",
                *(self.name, f"{self.documents:,}", f"{made.windows:,}", seq_len),
                *(100 * made.padding(seq_len), f"{made.cut:,}"),
            )
        return self._plans[seq_len]

    def batches(self, *, batch_size: int, seq_len: int) -> int:
        """The number of batches in an epoch, a last one that is not full counted."""
        return -(-self.windows(seq_len) // batch_size)

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, start: int, length: int) -> np.ndarray:
        """``length`` tokens of the ring from position ``start``, int64."""
        out = np.empty(length, dtype=np.int64)
        self._read_into(out, start)
        return out

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, its separator first, int64.

        Raises:
            IndexError: when there is no such document.
        """
        if not 0 <= index < self.documents:
            raise IndexError(f"document was {index}; the {self.name} split has {self.documents}")
        start, stop = (int(offset) for offset in self.offsets[index : index + 2])
        return self.read(start, stop - start)

    def _read_into(self, out: np.ndarray, start: int) -> None:
        """Fill ``out`` from the ring, a slice per shard that it touches."""
        per_shard = len(self.shards[0])
        done = 0
        while done < len(out):
            shard, place = divmod((start + done) % self.tokens, per_shard)
            piece = self.shards[shard][place : place + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    # -- batches ------------------------------------------------------------------------------------------------------

    def batch(self, step: int, *, seed: int, batch_size: int, seq_len: int, rows: range | None = None) -> Batch:
        """The global batch at a step, or some of its rows: a pure function of (seed, step) and the shape.

        Args:
            step: 0, 1, 2, …; batch ``step`` is windows ``step * batch_size`` to ``(step + 1) * batch_size - 1`` of the
                endless sequence of epochs. Resuming needs this integer and nothing else.
            seed: names the order; unused by a validation split.
            batch_size: rows of the global batch, whatever the number of ranks.
            seq_len: tokens per row.
            rows: the rows of the global batch to read, those of a rank or of a micro-batch; None for all.

        Raises:
            ValueError: for a negative step, or rows outside of the batch.
            DataError: when the split is too short for one window.
        """
        if step < 0 or batch_size < 1:
            raise ValueError(f"step was {step} and batch_size {batch_size}; they must be at least 0 and 1")
        rows = range(batch_size) if rows is None else rows
        if len(rows) == 0 or min(rows) < 0 or max(rows) >= batch_size:
            raise ValueError(f"rows was {rows}; it must be rows of a batch of {batch_size}, and not empty")
        numbers = [step * batch_size + row for row in rows]
        return self.rows(numbers, seed=seed, seq_len=seq_len).batch()

    def rows(self, numbers: Sequence[int] | np.ndarray, *, seed: int, seq_len: int) -> Rows:
        """The windows with some numbers in the endless sequence of epochs; see ``batch``.

        Validation windows past the end of the split have no targets (all -100), so that every batch has one shape and
        a sum over batches counts each token once.
        """
        read = self._whole_rows if self.whole else self._ring_rows
        rows, beyond = read(np.asarray(numbers, dtype=np.int64), seed, seq_len)
        rows.targets[beyond] = IGNORE
        return rows if self.packed else rows._replace(borders=None)

    def _ring_rows(self, numbers: np.ndarray, seed: int, seq_len: int) -> tuple[Rows, np.ndarray]:
        """Windows of the ring, and which of them are beyond the end (validation only)."""
        starts, beyond = self._starts(numbers, seed, seq_len)
        window = np.empty((len(starts), seq_len + 1), dtype=np.int64)
        for row, start in zip(window, starts.tolist(), strict=True):
            self._read_into(row, start)
        borders = [self._borders(start, seq_len) for start in starts.tolist()] if self.packed else None
        return Rows(window[:, :-1].copy(), window[:, 1:].copy(), borders), beyond

    def _whole_rows(self, numbers: np.ndarray, seed: int, seq_len: int) -> tuple[Rows, np.ndarray]:
        """Windows of whole documents, and which of them are beyond the end (validation only)."""
        made = self.plan(seq_len)
        epochs, places = np.divmod(numbers, made.windows)
        if self.name != "validation":
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                places[here] = permute(places[here], made.windows, derive(seed, epoch, 0))
        tokens = np.full((len(places), seq_len), self.tokenizer.separator, dtype=np.int64)
        targets = np.full((len(places), seq_len), IGNORE, dtype=np.int64)
        borders = []
        for row, place in enumerate(places.tolist()):
            pieces = slice(*made.borders[place : place + 2].tolist())
            ends = np.cumsum(made.lengths[pieces])
            begins = ends - made.lengths[pieces]
            for start, begin, end in zip(made.starts[pieces].tolist(), begins.tolist(), ends.tolist(), strict=True):
                found = self.read(start, end - begin + 1)  # what follows a document is the separator of another
                tokens[row, begin:end], targets[row, begin:end] = found[:-1], found[1:]
            borders.append(np.append(begins, ends[-1:][ends[-1:] < seq_len]))  # padding stands alone, too
        return Rows(tokens, targets, borders), (epochs > 0) & (self.name == "validation")

    def _starts(self, numbers: np.ndarray, seed: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Where windows begin in the ring, int64, and which of them are beyond the end (validation only)."""
        count = self.windows(seq_len)
        epochs, places = np.divmod(numbers, count)
        if self.name == "validation":
            return places * seq_len, epochs > 0
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order = permute(places[here], count, derive(seed, epoch, 0))
            places[here] = (order * seq_len + derive(seed, epoch, 1) % self.tokens) % self.tokens
        return places, np.zeros(len(numbers), dtype=bool)

    def _borders(self, start: int, seq_len: int) -> np.ndarray:
        """Where documents begin in a window of the ring: at its start, and at each document's start."""
        inside = [np.zeros(1, dtype=np.int64)]
        for turn in (0, self.tokens):  # the ring's end may lie inside of the window
            first, last = np.searchsorted(self.offsets, (start + 1 - turn, start + seq_len - turn))
            inside.append(self.offsets[first : min(last, self.documents)] + (turn - start))
        return np.concatenate(inside)
