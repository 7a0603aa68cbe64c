"""Six small skills (MAD; Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", 2024): recall in a
context, with motifs and in noise; facts learnt by heart; selective copying; compression. ``kind`` says which.

A worked example of each, ``generate(kind, length, 1)`` (of selective copy, with 3 tokens copied)::

    in_context_recall 12
    tokens   0   8   3  14   0   8   4   8   1   8   0   8
    labels   -   -   -   -   8   -   -   -   -   -   8   -
    noisy_recall 16
    tokens  23  27   0  10   3  13   5   8   0  10   0  10  20  18   5   8
    labels   -   -   -   -   -   -   -   -  10   -  10   -   -   -   8   -
    fuzzy_recall 24
    tokens  15  15  15  15  15  15   3   2   4   7  12  10   1   4   6  11   6   4   3  13   6   4   3  13
    labels   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -   -  13   -
    memorisation 8
    tokens  60 255  74 255  26 255  54 255
    labels   - 177   - 221   - 185   - 147
    selective_copy 16
    tokens  14  14  14  14   8  14  14  14  14   2   5  14  15  14  14  14
    labels   -   -   -   -   -   -   -   -   -   -   -   -   -   8   2   5
    compression 6
    tokens  10   0  14  12  14  15  16  17  18  19  20
    labels   -   -   -   -   -   -  10   0  14  12  14

The three **recalls** say keys, each with its value: keys are the lower half of the tokens, values the upper. The value
of a key is drawn anew in every example, and asked each time that the key comes again; the last key has come before. In
*noisy recall* a pair may be two tokens of noise instead, which are the last tokens of the vocabulary. In *fuzzy recall*
keys and values are motifs of one to three distinct tokens, to be said to their end; the last token of the vocabulary
fills up in front. As in the benchmark, training examples are labelled at each position with the token that comes next,
and have keys of every length; validation and test ask only for what can be known, and all keys are of the full length.

**Memorisation** has a mapping of keys to values that is the same in all examples and all splits; behind each key stands
a token that asks for its value. **Selective copy** has tokens at random places among blanks; then they are asked in
their order. **Compression** reads random tokens and a mark, then asks for every token by its number. In the benchmark
it is an auto-encoder: a network of two layers gives all tokens back from the model's vector at the mark; a causal model
that answers behind the mark may look past it, so that its figures do not compare with published ones. No more do those
of the others exactly: here, settings are chosen by validation examples, in the benchmark by its test examples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...train.examples import Group, Task, assemble
from .. import draws

IGNORE = -100
Pair = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Settings:
    """What all examples of a run have in common.

    ``vocabulary``: tokens, with those of noise. ``noise``: the share of pairs that are noise, of ``noise_vocabulary``
    tokens. ``motif``: tokens of the longest key and value. ``copied``: tokens to copy. ``facts``: the seed of the
    mapping to learn by heart. ``training``: label and draw recalls as for training.
    """

    vocabulary: int
    noise: float = 0.0
    noise_vocabulary: int = 0
    motif: int = 1
    copied: int = 16
    facts: int = 0
    training: bool = False


def _next(tokens: NDArray[np.int64], asked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Labels: the token that comes next, where that is ``asked``."""
    labels = np.full_like(tokens, IGNORE)
    labels[:, :-1] = np.where(asked[:, 1:], tokens[:, 1:], IGNORE)
    return labels


def _among(seed: int, stream: str, allowed: NDArray[np.bool_], start: int) -> NDArray[np.int64]:
    """[rows] column numbers, one of those that are ``allowed`` in each row, each as likely."""
    rows, columns = allowed.shape
    number = draws.words(seed, stream, rows * columns, start * columns).reshape(rows, columns)
    return np.where(allowed, number >> np.uint64(1), np.uint64(0)).argmax(1)


def _apart(codes: NDArray[np.int64], counted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """``codes``, with those that are not ``counted`` made unlike all others."""
    return np.where(counted, codes, -1 - np.arange(codes.shape[1]))


def _recall(length: int, count: int, seed: int, start: int, name: str, settings: Settings) -> Pair:
    """In-context and noisy recall."""
    pairs = length // 2
    useful = settings.vocabulary - settings.noise_vocabulary
    half = useful // 2
    if length % 2 or pairs < 2:
        raise ValueError(f"length was {length}; it must be even, and at least 4")
    if half < 1 or settings.noise_vocabulary < 0:
        raise ValueError(
            f"vocabulary was {settings.vocabulary} with {settings.noise_vocabulary} tokens of noise; "
            "at least 2 of them must be left, and neither be negative"
        )
    if not 0 <= settings.noise < 1 or (settings.noise and not settings.noise_vocabulary):
        raise ValueError(f"noise was {settings.noise}; it must lie in [0, 1), and be 0 without a noise_vocabulary")
    keys = draws.integers(seed, f"{name} keys", count * pairs, 0, half, start * pairs).reshape(count, pairs)
    values = draws.integers(seed, f"{name} values", count * half, half, useful, start * half).reshape(count, half)
    noisy = draws.uniform(seed, f"{name} noisy", count * pairs, start * pairs).reshape(count, pairs) < settings.noise
    rows, always = np.arange(count), draws.integers(seed, f"{name} always", count, 0, pairs - 1, start)
    noisy[rows, always] = noisy[:, -1] = False
    said = ~noisy
    said[:, -1] = False
    new = said & (draws.first_of(_apart(keys, said)) == np.arange(pairs))
    keys[:, -1] = keys[rows, _among(seed, f"{name} last", new, start)]
    again = draws.first_of(_apart(keys, ~noisy)) < np.arange(pairs)
    tokens = np.stack([keys, np.take_along_axis(values, keys, 1)], 2)
    if settings.noise:
        others = draws.integers(seed, f"{name} noise", count * length, useful, settings.vocabulary, start * length)
        tokens = np.where(noisy[..., None], others.reshape(count, pairs, 2), tokens)
    tokens = tokens.reshape(count, length)
    asked = np.zeros((count, pairs, 2), bool)
    asked[..., 1] = again
    return tokens, _next(tokens, asked.reshape(count, length) | settings.training)


def _fuzzy(length: int, count: int, seed: int, start: int, name: str, settings: Settings) -> Pair:
    """Fuzzy recall."""
    motif, fill = settings.motif, settings.vocabulary - 1
    half = fill // 2
    if motif < 1 or half < motif:
        raise ValueError(f"motif was {motif} with vocabulary {settings.vocabulary}; it must be from 1 to {half}")
    if length < 4 * motif:
        raise ValueError(f"length was {length} with motif {motif}; it must be at least {4 * motif}, two pairs")
    least = 1 + (1 if settings.training else motif)  # tokens of a pair
    pairs = -(-(length - 2 * motif) // least)
    many = (count * pairs, start * pairs)

    def motifs(what: str, kinds: int, sizes: bool) -> Pair:
        """[count, pairs, motif] tokens, and [count, pairs] how many of them are in use."""
        parts = draws.arrange(seed, f"{name} {what}", many[0], motif, kinds, many[1]).reshape(count, pairs, motif)
        size = draws.integers(seed, f"{name} {what} sizes", many[0], 1, motif + 1, many[1]).reshape(count, pairs)
        return parts, size if sizes else np.full_like(size, motif)

    keys, key_size = motifs("keys", half, settings.training)
    values, value_size = motifs("values", fill - half, True)
    place = np.arange(motif)
    code = np.where(place < key_size[..., None], keys + 1, 0) @ (half + 1) ** place
    first = draws.first_of(code)
    values = np.take_along_axis(values, first[..., None], 1) + half
    value_size = np.take_along_axis(value_size, first, 1)
    fits = np.cumsum(key_size + value_size, 1) <= length - 2 * motif
    # the last pair is one of those before it
    last = _among(seed, f"{name} last", fits & (first == np.arange(pairs)), start)
    whole = [
        np.concatenate([x, x[np.arange(count), last][:, None]], 1) for x in (keys, values, key_size, value_size, fits)
    ]
    keys, values, key_size, value_size, fits = whole
    again = np.pad(first < np.arange(pairs), ((0, 0), (0, 1)), constant_values=True)
    slots = np.concatenate([keys, values], 2).reshape(count, -1)
    used = np.concatenate([place < key_size[..., None], place < value_size[..., None]], 2) & fits[..., None]
    asked = np.broadcast_to(again[..., None] & (np.arange(2 * motif) >= motif), used.shape)
    order = np.argsort(used.reshape(count, -1), 1, kind="stable")[:, -length:]  # what is in use, at the end
    used = np.take_along_axis(used.reshape(count, -1), order, 1)
    tokens = np.where(used, np.take_along_axis(slots, order, 1), fill)
    asked = np.take_along_axis(asked.reshape(count, -1), order, 1) & used
    return tokens, _next(tokens, asked | settings.training)


def _memorise(length: int, count: int, seed: int, start: int, name: str, settings: Settings) -> Pair:
    """Memorisation."""
    ask = settings.vocabulary - 1
    half, pairs = ask // 2, length // 2
    if length % 2 or pairs < 1 or half < 1:
        raise ValueError(
            f"length was {length} and vocabulary {settings.vocabulary}; they must be even, and at least 2 and 3"
        )
    values = draws.distinct(settings.facts, f"mad facts {settings.vocabulary}", 1, half, half, ask)[0]
    keys = draws.integers(seed, f"{name} keys", count * pairs, 0, half, start * pairs).reshape(count, pairs)
    tokens, labels = np.full((count, length), ask), np.full((count, length), IGNORE)
    tokens[:, ::2], labels[:, 1::2] = keys, values[keys]
    return tokens, labels


def _copy(length: int, count: int, seed: int, start: int, name: str, settings: Settings) -> Pair:
    """Selective copy."""
    some, blank, ask = settings.copied, settings.vocabulary - 2, settings.vocabulary - 1
    if blank < 1:
        raise ValueError(f"vocabulary was {settings.vocabulary}; it must be at least 3, with a blank and a mark")
    if some < 1 or length < 2 * some + 1:
        raise ValueError(f"length was {length} with {some} copied; it must be at least {2 * some + 1}, 2 × copied + 1")
    room = length - some - 1
    said = draws.integers(seed, f"{name} tokens", count * some, 0, blank, start * some).reshape(count, some)
    place = np.sort(draws.distinct(seed, f"{name} places", count, some, 0, room, start), 1)
    tokens, labels = np.full((count, length), blank), np.full((count, length), IGNORE)
    np.put_along_axis(tokens, place, said, 1)
    tokens[:, room], labels[:, room + 1 :] = ask, said
    return tokens, labels


def _compress(length: int, count: int, seed: int, start: int, name: str, settings: Settings) -> Pair:
    """Compression."""
    mark, some = settings.vocabulary - 1, length - 1
    if mark < 1 or some < 1:
        raise ValueError(f"length was {length} and vocabulary {settings.vocabulary}; both must be at least 2")
    said = draws.integers(seed, f"{name} tokens", count * some, 0, mark, start * some).reshape(count, some)
    asks = np.broadcast_to(settings.vocabulary + np.arange(some), said.shape)
    tokens = np.concatenate([said, np.full((count, 1), mark), asks], 1)
    return tokens, np.concatenate([np.full((count, length), IGNORE), said], 1)


@dataclass(frozen=True)
class Kind:
    """A skill: its examples, and the benchmark's length, number of training examples, and settings."""

    make: Callable[[int, int, int, int, str, Settings], Pair]
    length: int
    train: int
    settings: Settings


KINDS = {
    "in_context_recall": Kind(_recall, 128, 12_800, Settings(16)),
    "fuzzy_recall": Kind(_fuzzy, 128, 12_800, Settings(16, motif=3)),
    "noisy_recall": Kind(_recall, 128, 12_800, Settings(32, noise=0.2, noise_vocabulary=16)),
    "memorisation": Kind(_memorise, 32, 256, Settings(256)),
    "compression": Kind(_compress, 32, 12_800, Settings(16)),
    "selective_copy": Kind(_copy, 256, 12_800, Settings(16)),
}
TEST = 1280


def generate(
    kind: str, length: int, count: int, seed: int = 0, *, settings: Settings | None = None, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Examples ``start`` … ``start + count − 1`` of a seed: tokens and labels, int64 [count, length]; of compression,
    which asks behind the mark, [count, 2 · length − 1].

    Each is a function of (seed, its number, kind, length, settings), on every machine. Without ``settings`` they are
    the benchmark's.

    Raises:
        ValueError: for an unknown kind, or a length or settings that do not fit; the message says which.
    """
    if kind not in KINDS:
        raise ValueError(f"kind was {kind!r}; it must be one of {', '.join(KINDS)}")
    settings = settings or KINDS[kind].settings
    tokens, labels = KINDS[kind].make(
        length, count, seed, start, f"mad {kind} {length} {settings.vocabulary}", settings
    )
    return torch.from_numpy(np.ascontiguousarray(tokens)), torch.from_numpy(np.ascontiguousarray(labels))


def task(
    kind: str = "in_context_recall",
    train: Sequence[Sequence[int]] | None = None,
    validation: Sequence[Sequence[int]] | None = None,
    test: Sequence[Sequence[int]] | None = None,
    vocabulary: int | None = None,
    noise: float | None = None,
    noise_vocabulary: int | None = None,
    motif: int | None = None,
    copied: int | None = None,
    seed: int = 0,
) -> Task:
    """The examples of a run. Sizes are (length, examples); each split draws from a seed of its own. What is not given
    is as in the benchmark.

    Raises:
        ValueError: see :func:`generate`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind was {kind!r}; it must be one of {', '.join(KINDS)}")
    usual = KINDS[kind]
    given: dict[str, Any] = {
        "vocabulary": vocabulary,
        "noise": noise,
        "noise_vocabulary": noise_vocabulary,
        "motif": motif,
        "copied": copied,
    }
    told = {key: value for key, value in given.items() if value is not None}
    settings = replace(usual.settings, facts=seed, **told)
    standard = ((usual.length, TEST),)
    split = (
        ((usual.length, usual.train),) if train is None else train,
        standard if validation is None else validation,
        standard if test is None else test,
    )

    def make(own: int, length: int, count: int, training: bool = False) -> Group:
        def read(first: int, some: int) -> tuple[Tensor, Tensor]:
            return generate(kind, length, some, own, settings=replace(settings, training=training), start=first)

        return Group(f"{length}", 2 * length - 1 if kind == "compression" else length, count, read)

    longest = max(size[0] for sizes in split for size in sizes)
    asks = longest - 1 if kind == "compression" else 0
    sizes = ([(*size, True) for size in split[0]], *split[1:])
    return assemble(f"mad {kind}", settings.vocabulary + asks, sizes, seed, make)
