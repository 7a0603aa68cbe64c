"""Needle in a haystack (S-NIAH-1, 2 and 3 of RULER; Hsieh et al., COLM 2024): one value hidden in a long text.

The prompt and the needle are worded as RULER's for one needle; the filler is not RULER's. S-NIAH-1: a number of seven
digits among five sentences over and over, this project's own; S-NIAH-2: the same in prose; S-NIAH-3: a UUID in prose.
The prose is any text file, given as ``filler``, whose name is part of the result's name: only scores with the same
filler compare. A point when the value stands in the greedy continuation.

A worked example, ``generate(BYTES.encode, own_filler(BYTES.encode), 1, length=400, depth=0.5, count=1)``::

    input  "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about
            the number afterwards.\\n … One of the special magic numbers for pale-anchor is: 5757234. … \\nWhat is the
            special magic number for pale-anchor mentioned in the provided text? The special magic number for
            pale-anchor mentioned in the provided text is"
    label  " 5757234"

Draws come from :mod:`palimpsest.eval.draws`: example ``i`` of a seed has the same key and value at every length and
depth, and on every machine.
"""

import uuid
from dataclasses import dataclass
from typing import Any

import torch

from .. import draws
from . import passkey
from .haystack import Encode, Example, Filler, ask, long_enough, make_filler

OPENING = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n"
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}. "
QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? The special magic {kind} for {key} "
    "mentioned in the provided text is"
)
ANSWER = " {value}"
KINDS = {1: "number", 2: "number", 3: "uuid"}


@dataclass(frozen=True)
class Settings:
    """``lengths`` in tokens, prompt and answer together; ``filler``: the text file that 2 and 3 need; ``variants``:
    which of the three, None for all that there is a filler for; ``chunk``: how many tokens are read at once."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    variants: tuple[int, ...] | None = None
    filler: str | None = None
    examples: int = 8
    seed: int = 0
    chunk: int = 512

    def __post_init__(self) -> None:
        for variant in self.chosen:
            if variant not in KINDS:
                raise ValueError(f"niah variants were {self.chosen}; each must be 1, 2 or 3")
            if variant > 1 and self.filler is None:
                raise ValueError(f"niah filler was None; it must name a text file for variant {variant}")

    @property
    def chosen(self) -> tuple[int, ...]:
        """The variants to run."""
        return ((1,) if self.filler is None else (1, 2, 3)) if self.variants is None else self.variants


def values(kind: str, seed: int, count: int) -> list[str]:
    """Seven digits each, as the passkeys of this seed, or UUIDs of version 4."""
    if kind == "number":
        return [number for _, number in passkey.subjects(seed, count)]
    high, low = (draws.words(seed, f"niah uuid {half}", count) for half in ("high", "low"))
    return [str(uuid.UUID(int=int(a) << 64 | int(b), version=4)) for a, b in zip(high, low, strict=True)]


def _pieces(encode: Encode, variant: int, seed: int, count: int) -> list[tuple[list[list[int]], str]]:
    """Opening, needle, question and answer of each example, and its value."""
    kind = KINDS[variant]
    keys = [key for key, _ in passkey.subjects(seed, count)]
    return [
        ([list(encode(text.format(**said))) for text in (OPENING, NEEDLE, QUESTION, ANSWER)], value)
        for key, value in zip(keys, values(kind, seed, count), strict=True)
        for said in [{"kind": kind, "key": key, "value": value}]
    ]


def generate(
    encode: Encode, filler: Filler, variant: int, *, length: int, depth: float, count: int, seed: int = 0
) -> list[Example]:
    """``count`` examples whose prompt and answer are together exactly ``length`` tokens.

    ``depth`` is where the needle stands: 0 before all filler, 1 after all of it, and between two sentences always.

    Raises:
        ValueError: for a depth outside [0, 1], or a length too short to hold the question.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth was {depth}; it must be from 0 (first) to 1 (last)")
    examples = []
    for parts, value in _pieces(encode, variant, seed, count):
        opening, needle, question, answer = parts
        room = length - sum(map(len, parts))
        if room < 0:
            raise ValueError(f"length was {length}; it must be at least {length - room} tokens to hold the question")
        examples.append(Example(opening + filler.around([needle], [depth], room) + question, answer, value))
    return examples


def run(model: torch.nn.Module, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """Ask at every length and depth: ``variants``, each a name with its cells, and ``left_out``, the lengths too short.

    Raises:
        FileNotFoundError, ValueError: for a filler that cannot be read, or when not one length can hold the question.
    """
    encode, found = tokenizer.encode, []
    for variant in settings.chosen:
        pieces = _pieces(encode, variant, settings.seed, settings.examples)
        least = max(sum(map(len, parts)) for parts, _ in pieces)
        lengths, left_out = long_enough(f"S-NIAH-{variant}", settings.lengths, least)
        filler = make_filler(encode, None if variant == 1 else settings.filler, max(lengths))
        cells = []
        for length in lengths:
            for depth in settings.depths:
                shape = {"length": length, "depth": depth, "count": settings.examples, "seed": settings.seed}
                examples = generate(encode, filler, variant, **shape)  # type: ignore[arg-type]
                hits, shares = ask(model, tokenizer, examples, settings.chunk)
                cells.append({"length": length, "depth": depth, "accuracy": hits, "digits": shares})
        found.append(
            {
                "name": f"S-NIAH-{variant}, filler: {filler.name}",
                "value": KINDS[variant],
                "cells": cells,
                "left_out": left_out,
                "accuracy": sum(cell["accuracy"] for cell in cells) / len(cells),
                "digits": sum(cell["digits"] for cell in cells) / len(cells),
            }
        )
    return {"variants": found, "examples": settings.examples, "seed": settings.seed}
