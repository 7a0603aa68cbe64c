"""What tasks that hide something in text share: the sentences around it, the reading of a prompt, and scores.

Every piece of text is encoded by itself, so that the same text is the same tokens at every length, and an example has
exactly the length asked for.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger("palimpsest.eval")

Encode = Callable[[str], Sequence[int]]

SENTENCES = (
    "The rain came over the hills. ",
    "A cart went slowly down the lane. ",
    "Two birds sat on the wall. ",
    "Somebody lit the lamp again. ",
    "Then it was quiet for a while. ",
)
OWN = "own sentences"
PATIENCE = 8  # tokens that the model may write beyond the length of the answer before it must have said it


class Example(NamedTuple):
    """One question: ``prompt`` and ``answer`` are token ids, ``value`` what the answer must contain."""

    prompt: list[int]
    answer: list[int]
    value: str


@dataclass(frozen=True)
class Filler:
    """Sentences as tokens, each with the space behind it, to be repeated for ever; ``name`` tells where from."""

    name: str
    sentences: list[list[int]]

    def stretch(self, room: int) -> tuple[list[int], NDArray[np.int64]]:
        """The last ``room`` tokens of the sentences repeated, and the places where a sentence begins or ends."""
        lengths = np.array([len(sentence) for sentence in self.sentences])
        rounds = room // int(lengths.sum()) + 1
        tokens = [token for _ in range(rounds) for sentence in self.sentences for token in sentence]
        borders = np.concatenate([[0], np.tile(lengths, rounds).cumsum()]) - (len(tokens) - room)
        return tokens[len(tokens) - room :], np.unique(np.concatenate([[0], borders[borders >= 0]]))

    def around(self, pieces: Sequence[Sequence[int]], depths: Sequence[float], room: int) -> list[int]:
        """``pieces``, in order, in ``room`` tokens of filler, each at the border nearest to its depth (ascending, from
        0, before all of the filler, to 1, behind it)."""
        tokens, borders = self.stretch(room)
        laid, done = [], 0
        for piece, depth in zip(pieces, depths, strict=True):
            cut = int(borders[np.abs(borders - depth * room).argmin()])
            laid += [*tokens[done:cut], *piece]
            done = cut
        return laid + tokens[done:]


def own_filler(encode: Encode) -> Filler:
    """This project's five sentences."""
    return Filler(OWN, [list(encode(sentence)) for sentence in SENTENCES])


def prose(encode: Encode, path: str | Path, tokens: int) -> Filler:
    """The sentences of a text file from its beginning, white space made one space, until they are ``tokens`` tokens.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is not UTF-8 text, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"filler was {str(path)!r}; it must be a text file, and there is none")
    try:
        words = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"filler was {str(path)!r}; it must be UTF-8 text: {error}") from None
    found: list[list[int]] = []
    for sentence in re.split(r"(?<=[.!?]) ", " ".join(words)) if words else []:
        found.append(list(encode(sentence + " ")))
        tokens -= len(found[-1])
        if tokens <= 0:
            break
    if not found:
        raise ValueError(f"filler was {str(path)!r}; it must hold text, and it is empty")
    return Filler(path.name, found)


def make_filler(encode: Encode, path: str | None, tokens: int) -> Filler:
    """Of the file ``path``, or the own sentences for None."""
    return own_filler(encode) if path is None else prose(encode, path, tokens)


def score(continuation: str, value: str) -> tuple[bool, float]:
    """Whether ``value`` stands in the continuation (RULER's score), and the share of its characters that stand at their
    place. The second looks at the beginning only: ``score(" 4821999.", "4821763") == (False, 4 / 7)``.
    """
    said = continuation.lstrip()[: len(value)]
    return value in continuation, sum(a == b for a, b in zip(said, value, strict=False)) / len(value)


class Read(NamedTuple):
    """Where a model stands after prompts: ``logits`` [N, V] of what follows, and its state."""

    logits: Tensor
    state: Any


@torch.no_grad()
def read(model: torch.nn.Module, prompts: Tensor, chunk: int) -> Read:
    """Read ``prompts`` int64 [N, T] in pieces of ``chunk`` tokens with a carried state."""
    state = None
    for piece in prompts.split(chunk, dim=1):
        out = model(piece, state=state)
        state = out.state
    return Read(out.logits[:, -1], state)


@torch.no_grad()
def write(model: torch.nn.Module, after: Read, count: int) -> Tensor:
    """Greedy continuations [N, count]."""
    said = []
    for _ in range(count):
        said.append(after.logits.argmax(-1, keepdim=True))
        if len(said) < count:
            out = model(said[-1], state=after.state)
            after = Read(out.logits[:, -1], out.state)
    return torch.cat(said, dim=1)


@torch.no_grad()
def likelihood(model: torch.nn.Module, after: Read, candidate: Sequence[int]) -> Tensor:
    """log p of ``candidate`` following each prompt, in nats: float64 [N]."""
    told = after.logits.double().log_softmax(-1)[:, candidate[0]]
    if len(candidate) > 1:
        ids = torch.tensor(candidate, device=told.device).expand(len(told), -1)
        logits = model(ids[:, :-1], state=after.state).logits.double()
        told = told + logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].sum(-1)
    return told


def alike(examples: Sequence[Example]) -> list[list[int]]:
    """Numbers of the examples whose prompts are equally long, to be asked together."""
    sizes = sorted({len(example.prompt) for example in examples})
    return [[i for i, example in enumerate(examples) if len(example.prompt) == size] for size in sizes]


def long_enough(task: str, lengths: Sequence[int], least: int) -> tuple[list[int], list[int]]:
    """The lengths that hold ``least`` tokens, and those left out, which a log line names.

    Raises:
        ValueError: when not one does.
    """
    fitting, short = [n for n in lengths if n >= least], [n for n in lengths if n < least]
    if not fitting:
        raise ValueError(f"{task} lengths were {tuple(lengths)}; at least one must hold {least} tokens")
    if short:
        logger.info("%s: lengths %s are left out, the question alone takes %d tokens", task, short, least)
    return fitting, short


def ask(model: torch.nn.Module, tokenizer: Any, examples: Sequence[Example], chunk: int) -> tuple[float, float]:
    """Mean scores of greedy continuations; see :func:`score`."""
    device = next(model.parameters()).device
    scores = []
    for group in ([examples[i] for i in numbers] for numbers in alike(examples)):
        prompts = torch.tensor([example.prompt for example in group], dtype=torch.int64, device=device)
        count = max(len(example.answer) for example in group) + PATIENCE
        said = write(model, read(model, prompts, chunk), count).tolist()
        scores += [score(tokenizer.decode(ids), example.value) for example, ids in zip(group, said, strict=True)]
    return sum(hit for hit, _ in scores) / len(scores), sum(share for _, share in scores) / len(scores)
