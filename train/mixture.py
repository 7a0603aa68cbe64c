"""Several corpora in one: every window of a batch is drawn from one of them, by weight.

Which one window n of the endless sequence is from, and how many windows of that corpus came before, is a pure function
of (seed, n). The sequence is cut into blocks of ``BLOCK`` windows. By the end of block b component c has given
⌊C_c b BLOCK⌋ - ⌊C_(c-1) b BLOCK⌋ windows, C_c being the sum of the shares up to c: never one window more or less than
its share, at any time. Inside a block the order is pseudo-random. So resuming is an integer here too, and each
component's own sequence of epochs is read in order, none of its windows twice before all were read once.
"""

import hashlib
import logging
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np

from .corpus import Corpus
from .files import DataError
from .shards import SPLITS, Counts
from .split import Rows, Split, derive, permute

logger = logging.getLogger("palimpsest.train")

BLOCK = 1024
"""Windows in which every component gets its share."""


class MixtureSplit(Split):
    """The same split of several corpora.

    Args:
        parts: by label. weights: of each, more than 0; they are taken as ratios to their sum.

    Raises:
        DataError: for a weight that is less than 1 / ``BLOCK`` of the sum.
    """

    def __init__(self, name: str, parts: dict[str, Split], weights: Sequence[float]) -> None:
        self.parts = parts
        each = list(parts.values())
        self.shares = _shares(parts, weights)
        sums = {key: sum(getattr(part, key) for part in each) for key in ("bytes", "table_bytes")}
        super().__init__(
            name,
            [],
            np.zeros(1, dtype=np.int64),
            each[0].tokenizer,
            byte_count=sums["bytes"],
            table_bytes=sums["table_bytes"],
            packed=each[0].packed,
            whole=each[0].whole,
            where=", ".join(part.where for part in each),
        )
        self.tokens = sum(part.tokens for part in each)
        self.documents = sum(part.documents for part in each)
        self._edges = list(accumulate(self.shares))
        self._draw = lru_cache(maxsize=8)(self._drawn)

    def windows(self, seq_len: int) -> int:
        """The number of windows of all components, each counted once.

        Raises:
            ValueError, DataError: as :meth:`Split.windows`, of any component.
        """
        return sum(part.windows(seq_len) for part in self.parts.values())

    def batches(self, *, batch_size: int, seq_len: int) -> int:
        """The number of batches until the first component has been read once, a last one that is not full counted."""
        counts = np.array([part.windows(seq_len) for part in self.parts.values()])
        fewest = min(int(count / share) for count, share in zip(counts.tolist(), self.shares, strict=True))
        block = max(0, fewest // BLOCK - 1)  # in the blocks before no component can have come to its end
        while True:
            component, number = self.drawn(np.arange(block * BLOCK, (block + 1) * BLOCK), 0)
            again = number >= counts[component]
            if again.any():
                return -(-(block * BLOCK + int(again.argmax())) // batch_size)
            block += 1

    def rows(self, numbers: Sequence[int] | np.ndarray, *, seed: int, seq_len: int) -> Rows:
        """The windows with some numbers in the endless sequence; see the module."""
        wanted = np.asarray(numbers, dtype=np.int64)
        component, place = self.drawn(wanted, seed)
        tokens, targets = (np.empty((len(wanted), seq_len), dtype=np.int64) for _ in range(2))
        borders: list[np.ndarray] | None = [np.empty(0)] * len(wanted) if self.packed else None
        for index, part in enumerate(self.parts.values()):
            here = np.flatnonzero(component == index)
            if not len(here):
                continue
            found = part.rows(place[here], seed=derive(seed, index, 6), seq_len=seq_len)
            tokens[here], targets[here] = found.tokens, found.targets
            if borders is not None and found.borders is not None:
                for row, each in zip(here.tolist(), found.borders, strict=True):
                    borders[row] = each
        return Rows(tokens, targets, borders)

    def drawn(self, numbers: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The component that each window comes from, and its number in that component's sequence, int64; of validation
        whatever the seed is."""
        seed = 0 if self.name == "validation" else seed
        blocks, places = np.divmod(numbers, BLOCK)
        component, number = np.empty_like(numbers), np.empty_like(numbers)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            chosen, before = self._draw(block, seed)
            component[here], number[here] = chosen[places[here]], before[places[here]]
        return component, number

    def _drawn(self, block: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """``drawn`` of all windows of a block."""
        first, last = (self._given(block + more) for more in (0, 1))
        slots = permute(np.arange(BLOCK), BLOCK, derive(seed, block, 5))
        component = np.searchsorted(np.cumsum(last - first), slots, side="right")
        number = np.empty(BLOCK, dtype=np.int64)
        for index, count in enumerate(first.tolist()):
            here = component == index
            number[here] = count + np.arange(here.sum())
        return component, number

    def _given(self, blocks: int) -> np.ndarray:
        """How many windows of each component the first blocks hold, int64."""
        return np.diff([int(edge * blocks * BLOCK) for edge in self._edges], prepend=0)

    def _read_into(self, out: np.ndarray, start: int) -> None:
        """The components' rings one after the other, for who reads text and draws no windows."""
        start, done = start % self.tokens, 0
        while done < len(out):
            for part in self.parts.values():
                if start < part.tokens:
                    count = min(part.tokens - start, len(out) - done)
                    out[done : done + count] = part.read(start, count)
                    done += count
                start = max(0, start - part.tokens)


def _shares(parts: dict[str, Split], weights: Sequence[float]) -> list[Fraction]:
    exact = [Fraction(weight) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    for label, weight, share in zip(parts, weights, shares, strict=True):
        if share * BLOCK < 1:
            raise DataError(
                f"data.mixture gave {label!r} the weight {weight}, {float(share):.2g} of the sum; "
                f"it must be at least 1/{BLOCK} of it"
            )
    return shares


class MixtureCorpus(Corpus):
    """Several corpora with one tokenizer, opened."""

    def __init__(self, corpora: dict[str, Corpus], weights: Sequence[float]) -> None:
        first = next(iter(corpora.values()))
        self.corpora, self.weights = corpora, list(weights)
        self.folder, self.tokenizer = first.folder, first.tokenizer
        self.documents, self.resets = first.documents, first.resets
        text = ",".join(
            f"{corpus.checksum}:{weight!r}" for corpus, weight in zip(corpora.values(), weights, strict=True)
        )
        self.checksum = self.fingerprint = hashlib.sha256(text.encode("ascii")).hexdigest()
        manifests = {label: corpus.manifest for label, corpus in corpora.items()}
        splits = {
            name: {key: sum(each["splits"][name][key] for each in manifests.values()) for key in Counts._fields}
            for name in SPLITS
        }
        self.manifest = {"splits": splits, "mixture": manifests}

    def split(self, name: str, documents: str | None = None) -> MixtureSplit:
        """The ``train`` or the ``validation`` split of every component; components without validation are left out.

        Raises:
            ValueError, DataError: as :meth:`Corpus.split`.
        """
        parts, weights, missing = {}, [], None
        for (label, corpus), weight in zip(self.corpora.items(), self.weights, strict=True):
            try:
                parts[label] = corpus.split(name, documents)
            except DataError as error:
                missing = error
                logger.info("%s of the mixture is left out of the %s split: %s", label, name, error)
                continue
            weights.append(weight)
        if not parts and missing is not None:
            raise missing
        return MixtureSplit(name, parts, weights)
