"""Facts scattered in filler, and a question that one, two or three of them answer together.

The shape is that of bAbI in filler (BABILong; Kuratov et al., 2024), the simulator, its words and the filler this
project's own, so that official scores do not compare. Persons walk between places, pick objects up and put them down;
what they do is told in order, between sentences that have nothing to do with it. The questions are:

    1   Where is Anna?                              her last walk
    2   Where is the apple?                         who has it, or put it down, and where that person had gone
    3   Where was the apple before the kitchen?     who had it, and that person's last two walks with it

Two scores: ``accuracy``, whether the first place that the greedy continuation names is right, and ``choice``, whether
the right place is the likeliest of the six. Chance of the second is 1/6; all names of places have seven letters.

A worked example, ``story(2, 6, seed=0, number=1)``::

    Anna went to the library.
    David went to the library.
    Clara went to the station.
    Clara went to the orchard.
    Clara picked up the apple.
    Clara picked up the key.
    Where is the key?
    orchard, from facts 4, 6

Draws come from :mod:`palimpsest.eval.draws`: a story is a function of (supports, facts, seed, its number), on every
machine, and is the same at every length.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import draws
from .haystack import PATIENCE, Encode, Example, Filler, alike, likelihood, long_enough, make_filler, read, write

PERSONS = ("Anna", "Boris", "Clara", "David")
PLACES = ("kitchen", "library", "orchard", "cottage", "harbour", "station")
OBJECTS = ("apple", "book", "key")
QUESTION = "\nQuestion: {}\nAnswer: the"
ANSWER = " {}"


class Story(NamedTuple):
    """``facts`` in order, a question, the place that answers it, and the numbers of the facts it follows from."""

    facts: list[str]
    question: str
    answer: str
    supports: tuple[int, ...]


@dataclass
class World:
    """Who is where and what lies where, each with the facts that it follows from."""

    facts: list[str] = field(default_factory=list)
    where: dict[str, tuple[str, int]] = field(default_factory=dict)  # of a person: the place, and the walk there
    holder: dict[str, tuple[str, int]] = field(default_factory=dict)  # of an object: the person, and the picking up
    lies: dict[str, tuple[str, frozenset[int]]] = field(default_factory=dict)  # of an object put down
    visits: dict[str, list[tuple[str, frozenset[int]]]] = field(default_factory=dict)  # of an object, in order

    def walk(self, person: str, place: str) -> None:
        """A person goes to a place, with all that he or she holds."""
        number = len(self.facts)
        self.facts.append(f"{person} went to the {place}.")
        self.where[person] = place, number
        for thing, (holder, taken) in self.holder.items():
            if holder == person:
                self.visits[thing].append((place, frozenset({taken, number})))

    def take(self, person: str, thing: str) -> None:
        """A person picks up an object where both are."""
        place, walked = self.where[person]
        number = len(self.facts)
        self.facts.append(f"{person} picked up the {thing}.")
        self.holder[thing] = person, number
        self.lies.pop(thing, None)
        seen = self.visits.setdefault(thing, [])
        if not seen or seen[-1][0] != place:
            seen.append((place, frozenset({walked, number})))

    def drop(self, thing: str) -> None:
        """Whoever holds an object puts it down."""
        person, _ = self.holder.pop(thing)
        place, walked = self.where[person]
        self.lies[thing] = place, frozenset({walked, len(self.facts)})
        self.facts.append(f"{person} put down the {thing}.")

    def act(self, drawn: np.ndarray) -> None:
        """One of all that can happen, by three random numbers: half the time something with an object, if it can."""
        here = {
            (person, thing)
            for person, (place, _) in self.where.items()
            for thing in OBJECTS
            if thing not in self.holder and self.lies.get(thing, (place,))[0] == place
        }
        handling = sorted(here) + [(None, thing) for thing in sorted(self.holder)]
        if handling and drawn[0] % 2:
            person, thing = handling[drawn[1] % len(handling)]
            self.drop(thing) if person is None else self.take(person, thing)
            return
        walker = PERSONS[drawn[1] % len(PERSONS)]
        others = [place for place in PLACES if place != self.where.get(walker, ("",))[0]]
        self.walk(walker, others[drawn[2] % len(others)])

    def questions(self, supports: int) -> Iterator[tuple[str, str, frozenset[int]]]:
        """Every (question, answer, facts it follows from) that takes so many facts."""
        if supports == 1:
            for person, (place, number) in sorted(self.where.items()):
                yield f"Where is {person}?", place, frozenset({number})
            return
        for thing, seen in sorted(self.visits.items()):
            if supports == 2:
                if thing in self.lies:
                    place, following = self.lies[thing]
                else:
                    person, taken = self.holder[thing]
                    place, walked = self.where[person]
                    following = frozenset({taken, walked})
                yield f"Where is the {thing}?", place, following
            elif len(seen) > 1 and sum(place == seen[-1][0] for place, _ in seen) == 1:
                following = seen[-2][1] | seen[-1][1]
                if len(following) == 3:
                    yield f"Where was the {thing} before the {seen[-1][0]}?", seen[-2][0], following


def story(supports: int, facts: int, seed: int, number: int) -> Story:
    """Story ``number`` of a seed, of so many facts, with a question that ``supports`` of them answer.

    Raises:
        ValueError: for supports outside of 1, 2, 3, or too few facts for them.
    """
    if supports not in (1, 2, 3) or facts < supports:
        raise ValueError(f"facts were {facts} and supports {supports}; supports must be 1, 2 or 3, facts at least that")
    attempt = 0
    while True:  # some worlds have no such question
        drawn = draws.words(seed, f"facts {supports} {facts} {number} {attempt}", 3 * facts + 1)
        world = World()
        for three in (drawn[:-1] >> np.uint64(1)).astype(np.int64).reshape(facts, 3):
            world.act(three)
        found = list(world.questions(supports))
        if found:
            question, answer, following = found[int(drawn[-1]) % len(found)]
            return Story(world.facts, question, answer, tuple(sorted(following)))
        attempt += 1


@dataclass(frozen=True)
class Settings:
    """``lengths`` in tokens, prompt and answer together; ``facts`` of a story; ``filler``: a text file, None for own
    sentences; ``chunk``: how many tokens are read at once."""

    lengths: tuple[int, ...]
    supports: tuple[int, ...] = (1, 2, 3)
    facts: int = 8
    filler: str | None = None
    examples: int = 8
    seed: int = 0
    chunk: int = 512


def generate(
    encode: Encode, filler: Filler, *, supports: int, facts: int, length: int, count: int, seed: int = 0
) -> list[Example]:
    """``count`` examples whose prompt and answer are together exactly ``length`` tokens; the facts lie anywhere in the
    filler, in order, each between two sentences.

    Raises:
        ValueError: see :func:`story`; or for a length too short to hold the story.
    """
    examples = []
    for number in range(count):
        told = story(supports, facts, seed, number)
        pieces, question, answer = _pieces(encode, told)
        room = length - sum(map(len, pieces)) - len(question) - len(answer)
        if room < 0:
            raise ValueError(f"length was {length}; it must be at least {length - room} tokens to hold the story")
        depths = np.sort(draws.uniform(seed, f"facts depths {supports} {facts} {number}", facts))
        examples.append(Example(filler.around(pieces, depths.tolist(), room) + question, answer, told.answer))
    return examples


def _pieces(encode: Encode, told: Story) -> tuple[list[list[int]], list[int], list[int]]:
    facts = [list(encode(fact + " ")) for fact in told.facts]
    return facts, list(encode(QUESTION.format(told.question))), list(encode(ANSWER.format(told.answer)))


def first_place(continuation: str) -> str | None:
    """The place that a text names first."""
    found = {place: continuation.find(place) for place in PLACES}
    named = {place: at for place, at in found.items() if at >= 0}
    return min(named, key=named.__getitem__) if named else None


def ask(model: torch.nn.Module, tokenizer: Any, examples: list[Example], chunk: int) -> tuple[float, float]:
    """Accuracy and choice."""
    device = next(model.parameters()).device
    candidates = [list(tokenizer.encode(ANSWER.format(place))) for place in PLACES]
    count = max(map(len, candidates)) + PATIENCE
    said = chosen = 0
    for group in ([examples[i] for i in numbers] for numbers in alike(examples)):
        after = read(model, torch.tensor([example.prompt for example in group], device=device), chunk)
        best = torch.stack([likelihood(model, after, candidate) for candidate in candidates]).argmax(0).tolist()
        texts = [tokenizer.decode(ids) for ids in write(model, after, count).tolist()]
        for example, place, text in zip(group, best, texts, strict=True):
            said += first_place(text) == example.value
            chosen += PLACES[place] == example.value
    return said / len(examples), chosen / len(examples)


def run(model: torch.nn.Module, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """Ask at every length with every number of supporting facts: a cell for each.

    Raises:
        FileNotFoundError, ValueError: for a filler that cannot be read, or when not one length can hold a story.
    """
    encode, shape = tokenizer.encode, {"facts": settings.facts, "seed": settings.seed}
    stories = [story(n, number=i, **shape) for n in settings.supports for i in range(settings.examples)]
    parts = [_pieces(encode, told) for told in stories]
    least = max(sum(map(len, facts)) + len(question) + len(answer) for facts, question, answer in parts)
    lengths, left_out = long_enough("facts", settings.lengths, least)
    filler = make_filler(encode, settings.filler, max(lengths))
    cells = []
    for length in lengths:
        for supports in settings.supports:
            examples = generate(encode, filler, supports=supports, length=length, count=settings.examples, **shape)
            accuracy, choice = ask(model, tokenizer, examples, settings.chunk)
            cells.append({"length": length, "supports": supports, "accuracy": accuracy, "choice": choice})
    return {
        "filler": filler.name,
        "facts": settings.facts,
        "cells": cells,
        "left_out": left_out,
        "examples": settings.examples,
        "seed": settings.seed,
        "accuracy": sum(cell["accuracy"] for cell in cells) / len(cells),
        "choice": sum(cell["choice"] for cell in cells) / len(cells),
    }
