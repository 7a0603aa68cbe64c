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

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import draws

logger = logging.getLogger("palimpsest.eval")

FILLER = (
    "The rain came over the hills. ",
    "A cart went slowly down the lane. ",
    "Two birds sat on the wall. ",
    "Somebody lit the lamp again. ",
    "Then it was quiet for a while. ",
)
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
PATIENCE = 8  # tokens that the model may write beyond the length of the answer before it must have said the value


@dataclass(frozen=True)
class Example:
    """One question: ``prompt`` and ``answer`` are token ids, ``value`` the digits that the answer must contain."""

    prompt: list[int]
    answer: list[int]
    value: str


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
        self.sentences = [list(encode(sentence)) for sentence in FILLER]

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
        filler, borders = _filler(self.sentences, room)
        cut = int(borders[np.abs(borders - depth * room).argmin()])
        return Example(self.opening + filler[:cut] + needle + filler[cut:] + question, answer, value)


def _filler(sentences: list[list[int]], room: int) -> tuple[list[int], np.ndarray]:
    """The last ``room`` tokens of the sentences repeated for ever, and the places where a sentence begins or ends."""
    lengths = np.array([len(sentence) for sentence in sentences])
    rounds = room // int(lengths.sum()) + 1
    tokens = [token for _ in range(rounds) for sentence in sentences for token in sentence]
    borders = np.concatenate([[0], np.tile(lengths, rounds).cumsum()]) - (len(tokens) - room)
    return tokens[len(tokens) - room :], np.unique(np.concatenate([[0], borders[borders >= 0]]))


def shortest(encode: Callable[[str], Sequence[int]]) -> int:
    """The least length that holds every question: opening, the longest key's needle and question, and the answer."""
    key, value = f"{max(ADJECTIVES.split(), key=len)}-{max(NOUNS.split(), key=len)}", "9" * DIGITS
    return sum(len(encode(text.format(key=key, value=value))) for text in (OPENING, NEEDLE, QUESTION, ANSWER))


def score(continuation: str, value: str) -> tuple[bool, float]:
    """Whether ``value`` stands in the continuation (RULER's score), and the share of its digits said at their place.

    The second looks at the first word only: ``score(" 4821999.", "4821763") == (False, 4 / 7)``. Chance is 0.1.
    """
    said = continuation.lstrip()[:DIGITS]
    return value in continuation, sum(a == b for a, b in zip(said, value, strict=False)) / DIGITS


@torch.no_grad()
def continuations(model: torch.nn.Module, prompts: Tensor, count: int, chunk: int) -> Tensor:
    """Greedy continuations [N, count] of ``prompts`` int64 [N, T], read in pieces of ``chunk`` with a carried state."""
    state = None
    for piece in prompts.split(chunk, dim=1):
        out = model(piece, state=state)
        state = out.state
    said = []
    for _ in range(count):
        said.append(out.logits[:, -1].argmax(-1, keepdim=True))
        if len(said) < count:
            out = model(said[-1], state=state)
            state = out.state
    return torch.cat(said, dim=1)


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
    least = shortest(tokenizer.encode)
    lengths = [length for length in settings.lengths if length >= least]
    left_out = [length for length in settings.lengths if length < least]
    if not lengths:
        raise ValueError(f"passkey lengths were {settings.lengths}; at least one must hold {least} tokens")
    if left_out:
        logger.info("passkey: lengths %s are left out, the question alone takes %d tokens", left_out, least)
    device = next(model.parameters()).device
    cells = []
    for length in lengths:
        for depth in settings.depths:
            examples = generate(
                tokenizer.encode, length=length, depth=depth, count=settings.examples, seed=settings.seed
            )
            hits, digits = _cell(model, tokenizer, examples, settings.chunk, device)
            cells.append({"length": length, "depth": depth, "accuracy": hits, "digits": digits})
    return {
        "cells": cells,
        "left_out": left_out,
        "examples": settings.examples,
        "seed": settings.seed,
        "accuracy": sum(cell["accuracy"] for cell in cells) / len(cells),
        "digits": sum(cell["digits"] for cell in cells) / len(cells),
    }


def _cell(
    model: torch.nn.Module, tokenizer: Any, examples: list[Example], chunk: int, device: torch.device
) -> tuple[float, float]:
    """Mean scores of one cell. Prompts differ in length when their answers do: equal ones are asked together."""
    scores = []
    for size in sorted({len(example.prompt) for example in examples}):
        group = [example for example in examples if len(example.prompt) == size]
        prompts = torch.tensor([example.prompt for example in group], dtype=torch.int64, device=device)
        count = max(len(example.answer) for example in group) + PATIENCE
        for example, said in zip(group, continuations(model, prompts, count, chunk).tolist(), strict=True):
            scores.append(score(tokenizer.decode(said), example.value))
    return sum(hit for hit, _ in scores) / len(scores), sum(share for _, share in scores) / len(scores)
