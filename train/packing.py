"""Whole documents in windows of a fixed length: best-fit decreasing packing.

Best-fit packing of "Fewer Truncations Improve Language Modeling" (Ding et al. 2024): a document longer than a window is
split into full windows and a rest; then all pieces, from the longest to the shortest, each go into the fullest window
that still has room for it, or into a new one. No document that fits a window is cut, and few tokens are padding.
"""

from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """Which pieces of documents make which window, for a corpus of N tokens and windows of T.

    ``starts`` and ``lengths`` (int64 [pieces]): where each piece lies in the corpus, sorted by window. ``borders``
    (int64 [windows + 1]): the pieces of window w are ``borders[w]`` to ``borders[w + 1] - 1``. ``cut``: documents that
    are longer than a window.
    """

    starts: np.ndarray
    lengths: np.ndarray
    borders: np.ndarray
    cut: int

    @property
    def windows(self) -> int:
        """The number of windows."""
        return len(self.borders) - 1

    def padding(self, seq_len: int) -> float:
        """The share of all windows' tokens that are padding."""
        return 1.0 - int(self.lengths.sum()) / (self.windows * seq_len)


def plan(offsets: np.ndarray, seq_len: int) -> Plan:
    """Pack documents into windows of ``seq_len`` tokens.

    Args:
        offsets: int64 [documents + 1], where each document begins, and the end. A pure function of these and
            ``seq_len``; memory is a few words for each document, time at most about ``seq_len ** 2`` array operations.
    """
    begins, sizes = np.asarray(offsets[:-1]), np.diff(offsets)
    full, rest = np.divmod(sizes, seq_len)
    # Full windows of long documents, then what is left of every document.
    owner = np.repeat(np.arange(len(sizes)), full)
    turn = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
    left = np.flatnonzero(rest)
    starts = np.concatenate([begins[owner] + turn * seq_len, begins[left] + full[left] * seq_len])
    lengths = np.concatenate([np.full(len(owner), seq_len), rest[left]])
    window = np.concatenate([np.arange(len(owner)), len(owner) + best_fit(rest[left], seq_len)])
    order = np.argsort(window, kind="stable")
    borders = np.concatenate([[0], np.cumsum(np.bincount(window))])
    return Plan(starts[order], lengths[order], borders, int((sizes > seq_len).sum()))


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item by best-fit decreasing, int64: items from the longest on, each in the bin with the least
    room that is enough for it; of bins with equal room any is as good, and a fixed one is taken.

    All items of one length are placed together. A bin with the least sufficient room r takes r // length of them in a
    row, because each leaves it the one with the least room; then the bins with the next larger room follow.

    Args:
        lengths: integers from 1 to ``capacity``.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    if not len(lengths):
        return bins
    order = np.argsort(-lengths, kind="stable")
    sizes, firsts = np.unique(-lengths[order], return_index=True)
    room = _Room(capacity)
    for size, items in zip((-sizes).tolist(), np.split(order, firsts[1:]), strict=True):
        place = size  # rooms from here on are enough; what a bin has left is not, and need not be looked at again
        while len(items):
            place = room.next(place)
            each = place // size
            taken = room.take(place, -(-len(items) // each))
            filled = np.repeat(taken, each)[: len(items)]
            bins[items[: len(filled)]] = filled
            room.put(place - each * size, taken[: len(filled) // each])
            if len(filled) % each:  # the last bin has room for more
                room.put(place - len(filled) % each * size, taken[-1:])
            items = items[len(filled) :]
    return bins


class _Room:
    """Bins by the room that they have left."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count = capacity, 0
        self.bins: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self.some = np.zeros(capacity + 1, dtype=bool)

    def next(self, room: int) -> int:
        """The least room from ``room`` on that some bin has; a new bin has all of it."""
        found = int(np.argmax(self.some[room:])) + room
        return found if self.some[found] else self.capacity

    def take(self, room: int, count: int) -> np.ndarray:
        """At most ``count`` bins with so much room, at least one; as many new ones as needed where it is all."""
        if room == self.capacity:
            self.count += count
            return np.arange(self.count - count, self.count)
        last = self.bins[room].pop()
        if len(last) > count:
            self.bins[room].append(last[count:])
            last = last[:count]
        self.some[room] = bool(self.bins[room])
        return last

    def put(self, room: int, bins: np.ndarray) -> None:
        """Bins that now have so much room."""
        if room and len(bins):
            self.bins[room].append(bins)
            self.some[room] = True
