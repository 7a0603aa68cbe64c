"""Passkey retrieval: a number is said once inside filler text, and asked for at the end.

The shape is that of RULER's single needle with repeated filler (S-NIAH-1; Hsieh et al., COLM 2024): five filler
sentences over and over, a key of an adjective and a noun, a value of seven digits, and a point when the value stands in
the greedy continuation. The wording is this project's own, so that its scores do not compare with published ones.

A worked example (the byte tokenizer, 320 tokens, depth 0.5, seed 0; the filler is cut from its beginning so that prompt
and answer together are exactly 320 tokens)::

    input  "One special number is hidden in this text. Remember it.\\n … The special number for quiet-lantern is:
            4821763. … \\nWhich number was it? The special number for quiet-lantern is:"
    label  " 4821763"

Draws come from :mod:`palimpsest.eval.draws`: example ``i`` of a seed has the same key and value at every length and
depth, and on every machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import draws
from .haystack import SENTENCES, Example, ask, long_enough, own_filler

FILLER = SENTENCES
ADJECTIVES = """amber bitter brave calm copper distant dusty eager early faint frozen gentle golden hollow humble icy
ivory jolly keen little mellow narrow olive pale quiet rapid silver tidy upper violet warm young"""
NOUNS = """anchor basket bridge candle castle dragon drum engine falcon feather garden glacier hammer harbour island
jacket kettle ladder lantern meadow mirror needle orchard pebble quarry ribbon saddle tunnel umbrella valley
window yard"""
OPENING = "One special number is hidden in this text. Remember it.\n"
NEEDLE = "The special number for {key} is: {value}. "
QUESTION = "\nWhich number was it? The special number for {key} is:"
ANSWER = " {value}"
DIGITS = 7


def generate(
    encode: Callable[[str], Sequence[int]], *, length: int, depth: float, count: int, seed: int = 0
) -> list[Example]:
    """``count`` examples whose prompt and answer are together exactly ``length`` tokens.

    ``depth`` is where the needle stands: 0 before all filler, 1 after all of it, and between two sentences always.
    The pieces are encoded one by one, so that the same text is the same tokens at every length.

    Raises:
        ValueError: for a depth outside [0, 1], or a length too short to hold the question (:func:`shortest`).
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth was {depth}; it must be from 0 (first) to 1 (last)")
    pieces = Pieces(encode)
    return [pieces.example(key, value, length, depth) for key, value in subjects(seed, count)]


def subjects(seed: int, count: int, start: int = 0) -> list[tuple[str, str]]:
    """Key and value of the examples ``start`` … ``start + count − 1`` of a seed."""
    adjectives, nouns = ADJECTIVES.split(), NOUNS.split()
    first = draws.integers(seed, "passkey adjective", count, 0, len(adjectives), start)
    second = draws.integers(seed, "passkey noun", count, 0, len(nouns), start)
    values = draws.integers(seed, "passkey value", count, 10 ** (DIGITS - 1), 10**DIGITS, start)
    return [(f"{adjectives[a]}-{nouns[n]}", str(value)) for a, n, value in zip(first, second, values, strict=True)]


class Pieces:
    """The texts of an example as tokens, encoded one by one."""

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self.encode = encode
        self.opening = list(encode(OPENING))
        self.filler = own_filler(encode)

    def example(self, key: str, value: str, length: int, depth: float) -> Example:
        """The question for one number.

        Raises:
            ValueError: for a length too short to hold it.
        """
        encode = self.encode
        needle, question = list(encode(NEEDLE.format(key=key, value=value))), list(encode(QUESTION.format(key=key)))
        answer = list(encode(ANSWER.format(value=value)))
        room = length - len(self.opening) - len(needle) - len(question) - len(answer)
        if room < 0:
            raise ValueError(f"length was {length}; it must be at least {length - room} tokens to hold the question")
        return Example(self.opening + self.filler.around([needle], [depth], room) + question, answer, value)


def shortest(encode: Callable[[str], Sequence[int]]) -> int:
    """The least length that holds every question: opening, the longest key's needle and question, and the answer."""
    key, value = f"{max(ADJECTIVES.split(), key=len)}-{max(NOUNS.split(), key=len)}", "9" * DIGITS
    return sum(len(encode(text.format(key=key, value=value))) for text in (OPENING, NEEDLE, QUESTION, ANSWER))


@dataclass(frozen=True)
class Settings:
    """``lengths`` in tokens, prompt and answer together; ``chunk``: how many tokens are read at once."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    examples: int = 8
    seed: int = 0
    chunk: int = 512


def run(model: torch.nn.Module, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """Ask at every length and depth: a cell for each in the result, and ``left_out``, the lengths too short to ask at.

    Raises:
        ValueError: when not one length can hold the question.
    """
    encode = tokenizer.encode
    lengths, left_out = long_enough("passkey", settings.lengths, shortest(encode))
    cells = []
    for length in lengths:
        for depth in settings.depths:
            examples = generate(encode, length=length, depth=depth, count=settings.examples, seed=settings.seed)
            hits, digits = ask(model, tokenizer, examples, settings.chunk)
            cells.append({"length": length, "depth": depth, "accuracy": hits, "digits": digits})
    return {
        "cells": cells,
        "left_out": left_out,
        "examples": settings.examples,
        "seed": settings.seed,
        "accuracy": sum(cell["accuracy"] for cell in cells) / len(cells),
        "digits": sum(cell["digits"] for cell in cells) / len(cells),
    }
