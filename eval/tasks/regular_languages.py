"""In-context language learning (Akyürek et al., 2024): strings of a language never seen before; what comes next?

Each example has an automaton of its own: 4 to 12 states, 4 to 18 of the 18 symbols, and from every state 1 to 3 edges
with distinct symbols to distinct other states. It is minimal (what is not is drawn anew), and no two automata of a seed
have the same language, so that those of training, validation and test differ. 10 to 19 strings are said, each walk 1
to 49 symbols from the first state, every edge of a state as likely; between strings stands a separator, and behind the
last as much filling as the longest example would need. At each position the label is the next symbol, but none where
the string ends.

Besides accuracy, which cannot reach 1 as walks are random, two scores: ``legal``, the share of likeliest next tokens
that the language allows, and ``l1``, the mean over labels of Σ_x |p(x) − q(x)|, p the model's and q the true
distribution, from 0 to 2. q itself has the accuracy ``best``: the mean of its largest probability.

A worked example, ``generate(1, 1, strings=(3, 3), symbols=(1, 5))``; 18 is the separator, 19 filling::

    tokens  17  18   8  18  17   9  17   8   8  19  19  19  19  19  19  19  19
    labels   -   8   -  17   9  17   8   8   -   -   -   -   -   -   -   -   -
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...train.examples import Group, Task
from ...train.split import mix64
from .. import draws

IGNORE = -100
SYMBOLS, SEPARATOR, FILL = 18, 18, 19
VOCABULARY = 20
STATES, EDGES = (4, 12), (1, 3)
ALPHABET = (4, SYMBOLS)
BLOCK = 2048  # automata drawn at once
Ints = NDArray[np.int64]

#: (automata, examples)
TRAIN = ((5_000, 5_000),)
VALIDATION = TEST = ((500, 500),)


class Automata(NamedTuple):
    """N automata; state 0 begins. ``degree`` [N, 12] edges of a state; ``symbol``, ``target`` [N, 12, 3]."""

    degree: Ints
    symbol: Ints
    target: Ints


def _draw(seed: int, start: int, count: int) -> Automata:
    """Automata with all states that were drawn, minimal or not."""
    most, edges = STATES[1], EDGES[1]

    def numbers(what: str, low: int, high: int, each: int = 1) -> Ints:
        return draws.integers(seed, f"automata {what}", count * each, low, high + 1, start * each)

    def few(what: str, kinds: Ints) -> Ints:
        """[count, 12, 3] distinct of each state's kinds."""
        kinds = np.repeat(kinds, most)
        found = draws.arrange(seed, f"automata {what}", count * most, edges, kinds, start * most)
        return found.reshape(count, most, edges)

    states, letters = numbers("states", *STATES), numbers("letters", *ALPHABET)
    degree = numbers("edges", *EDGES, most).reshape(count, most)
    degree[np.arange(most) >= states[:, None]] = 0
    alphabet = draws.distinct(seed, "automata alphabet", count, SYMBOLS, 0, SYMBOLS, start)
    symbol = np.take_along_axis(alphabet, few("symbols", letters).reshape(count, -1), 1).reshape(count, most, edges)
    target = few("targets", states - 1)
    target += target >= np.arange(most)[:, None]  # another state
    used = np.arange(edges) < degree[..., None]
    return Automata(degree, np.where(used, symbol, 0), np.where(used, target, 0))


def _languages(automata: Automata) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """[N] a number for each automaton's language, and [N] whether it is minimal with enough states.

    A state's number after r rounds tells the strings of up to r symbols that can follow it: two states of minimal
    automata with at most 12 states each have the same language when all strings of 24 symbols agree.
    """
    count, most = automata.degree.shape
    used = np.arange(automata.symbol.shape[2]) < automata.degree[..., None]
    rows = np.arange(count)[:, None, None]
    letter = mix64(automata.symbol.astype(np.uint64) + np.uint64(1))
    number = np.zeros((count, most), np.uint64)
    reached = np.arange(most) == np.zeros((count, 1))
    for _ in range(2 * most):
        number = mix64(np.where(used, mix64(letter ^ number[rows, automata.target]), np.uint64(0)).sum(2))
        follow = used & reached[..., None]
        reached[np.broadcast_to(rows, follow.shape)[follow], automata.target[follow]] = True
    place = np.where(reached, number, np.arange(most, dtype=np.uint64))  # a number that no state has, but for 2⁻⁶⁰
    place = np.sort(place, 1)
    minimal = (place[:, 1:] != place[:, :-1]).all(1) & (reached.sum(1) >= STATES[0])
    return number[:, 0], minimal


@lru_cache(maxsize=4)
def _pool(seed: int, blocks: int) -> Automata:
    """The first automata of a seed that are minimal and have a language of their own, of so many blocks drawn."""
    parts = [_draw(seed, i * BLOCK, BLOCK) for i in range(blocks)]
    drawn = Automata(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    language, minimal = _languages(drawn)
    kept = np.flatnonzero(minimal)
    kept = kept[np.sort(np.unique(language[kept], return_index=True)[1])]
    return Automata(*(part[kept] for part in drawn))


def automata(seed: int, first: int, count: int) -> Automata:
    """Automata ``first`` … ``first + count − 1`` of a seed, all different."""
    blocks = 2 + (first + count) // BLOCK
    while len(_pool(seed, blocks).degree) < first + count:
        blocks += blocks // 2
    return Automata(*(part[first : first + count] for part in _pool(seed, blocks)))


@dataclass(frozen=True)
class Settings:
    """``count`` automata from number ``first`` of ``seed``; ``strings`` and ``symbols``: the fewest and most of an
    example and of a string. Example i has automaton i mod ``count``, and draws of ``seed``."""

    seed: int
    first: int
    count: int
    strings: tuple[int, int] = (10, 19)
    symbols: tuple[int, int] = (1, 49)

    @property
    def length(self) -> int:
        """Tokens of an example."""
        return self.strings[1] * (self.symbols[1] + 1) - 1


def check(settings: Settings) -> None:
    """Refuse what cannot be drawn.

    Raises:
        ValueError: for a range that is empty or does not begin at 1 or more, or no automaton.
    """
    for key, (low, high) in (("strings", settings.strings), ("symbols", settings.symbols)):
        if not 1 <= low <= high:
            raise ValueError(f"{key} was {low, high}; it must be the fewest, at least 1, and the most")
    if settings.count < 1 or settings.length < 2:
        raise ValueError(f"automata were {settings.count} and length {settings.length}; they must be at least 1 and 2")


@lru_cache(maxsize=2)
def _walks(settings: Settings, start: int, count: int) -> tuple[Ints, Ints, Ints]:
    """Tokens, labels, and the state before each label's symbol (−1 where there is none): [count, length] each."""
    rows = np.arange(start, start + count) % settings.count
    machines = Automata(*(part[rows] for part in automata(settings.seed, settings.first, settings.count)))
    (low, most), (least, steps) = settings.strings, settings.symbols
    name = f"walks {settings.first} {settings.strings} {settings.symbols}"
    strings = draws.integers(settings.seed, f"{name} strings", count, low, most + 1, start)
    sizes = draws.integers(settings.seed, f"{name} symbols", count * most, least, steps + 1, start * most)
    sizes = sizes.reshape(count, most)
    each = most * steps
    turns = draws.words(settings.seed, f"{name} turns", count * each, start * each).reshape(count, most, steps)
    said, before = np.full((count, most, steps + 1), SEPARATOR), np.full((count, most, steps + 1), -1)
    state, row = np.zeros((count, most), np.int64), np.arange(count)[:, None]
    for step in range(steps):
        edge = (turns[..., step] % machines.degree[row, state].astype(np.uint64)).astype(np.int64)
        before[..., step], said[..., step] = state, machines.symbol[row, state, edge]
        state = machines.target[row, state, edge]
    place = np.arange(steps + 1)
    used = (place <= sizes[..., None]) & (np.arange(most)[:, None] < strings[:, None, None])
    ends = used & (place == sizes[..., None])
    said[ends], before[ends] = SEPARATOR, -1
    used = used.reshape(count, -1)
    where = np.cumsum(used, 1)[used] - 1
    rows = np.broadcast_to(row, used.shape)[used]
    tokens, states = np.full((count, each + most), FILL), np.full((count, each + most), -1)
    tokens[rows, where], states[rows, where] = said.reshape(count, -1)[used], before.reshape(count, -1)[used]
    tokens[np.arange(count), used.sum(1) - 1] = FILL  # no separator behind the last string
    labels, asked = np.full((count, settings.length), IGNORE), np.full((count, settings.length), -1)
    labels[:, :-1] = np.where(states[:, 1:-1] >= 0, tokens[:, 1:-1], IGNORE)
    asked[:, :-1] = states[:, 1:-1]
    return tokens[:, :-1], labels, asked


def generate(
    count: int,
    automata: int,
    seed: int = 0,
    *,
    first: int = 0,
    strings: tuple[int, int] = (10, 19),
    symbols: tuple[int, int] = (1, 49),
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Examples ``start`` … ``start + count − 1``: tokens and labels, int64 [count, length].

    Each is a function of (seed, its number, first, automata, strings, symbols), on every machine; example i is said by
    automaton ``first + i mod automata`` of the seed.

    Raises:
        ValueError: see :func:`check`.
    """
    settings = Settings(seed, first, automata, strings, symbols)
    check(settings)
    return _read(settings, start, count)


def _read(settings: Settings, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of one's own, apart from those that are kept to judge by."""
    tokens, labels, _ = _walks(settings, start, count)
    return torch.from_numpy(tokens.copy()), torch.from_numpy(labels.copy())


def truth(settings: Settings, where: Tensor) -> Tensor:
    """The true distribution of the next token at labels ``where``, int64 [n, 2]: float32 [n, VOCABULARY].

    Raises:
        ValueError: for a position without a label.
    """
    number, position = where.numpy().T
    start, stop = int(number.min()), int(number.max()) + 1
    state = _walks(settings, start, stop - start)[2][number - start, position]
    if (state < 0).any():
        raise ValueError("where had a position without a label; it must have labels only")
    machines = automata(settings.seed, settings.first, settings.count)
    row = number % settings.count
    degree, symbol = machines.degree[row, state][:, None], machines.symbol[row, state]
    found = np.zeros((len(row), VOCABULARY), np.float32)
    np.add.at(found, (np.arange(len(row))[:, None], symbol), np.where(np.arange(EDGES[1]) < degree, 1 / degree, 0))
    return torch.from_numpy(found)


def judge(settings: Settings, logits: Tensor, where: Tensor) -> dict[str, Tensor]:
    """``legal``, ``l1`` and ``best`` of each label: see the module. logits float32 [n, V], V at least VOCABULARY."""
    wanted = truth(settings, where)
    wanted = torch.nn.functional.pad(wanted, (0, logits.shape[1] - VOCABULARY))
    likeliest = wanted.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    return {
        "legal": likeliest > 0,
        "l1": (logits.softmax(1) - wanted).abs().sum(1),
        "best": wanted.max(1).values,
    }


def task(
    train: Sequence[Sequence[int]] = TRAIN,
    validation: Sequence[Sequence[int]] = VALIDATION,
    test: Sequence[Sequence[int]] = TEST,
    strings: Sequence[int] = (10, 19),
    symbols: Sequence[int] = (1, 49),
    seed: int = 0,
) -> Task:
    """The examples of a run. Sizes are (automata, examples). All splits and groups have automata of their own, those of
    the test set first, so that they stay the same when training has more.

    Raises:
        ValueError: see :func:`check`.
    """
    first, parts = 0, []
    for sizes in (test, validation, train):
        part = []
        for number, examples in sizes:
            settings = Settings(seed, first, number, (strings[0], strings[1]), (symbols[0], symbols[1]))
            check(settings)
            part.append(_group(settings, examples))
            first += number
        parts.append(part)
    return Task("regular_languages", VOCABULARY, *parts[::-1])


def _group(settings: Settings, examples: int) -> Group:
    """A group named by its number of automata."""

    return Group(
        f"{settings.count} automata", settings.length, examples, partial(_read, settings), partial(judge, settings)
    )
