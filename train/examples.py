"""Training on a task: examples with labels, made from a seed, in the place of a corpus of text.

``data.source: task`` with ``data.task: mqar`` reads :mod:`palimpsest.eval.tasks.mqar`; a name with dots is a module of
your own. The module's ``task(**options)`` takes ``data.options`` and gives a :class:`Task`; that is all that training
knows of it.
"""

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.config import ConfigError
from .sources import DataError
from .split import IGNORE, Batch, derive, permute

TASKS = "palimpsest.eval.tasks"


@dataclass(frozen=True)
class Group:
    """Examples of one kind and length.

    ``read(start, count)`` gives tokens and labels, int64 [count, length]: a label is what the model has to say at its
    position, -100 where nothing is asked.

    ``judge(logits, where)`` gives scores besides accuracy, one number per label: float [n] by name, of logits [n, V] in
    float32 and ``where``, int64 [n, 2], the example's number and the position of each, both on the CPU. A score of the
    group is the mean over all of its labels.
    """

    name: str
    length: int
    count: int
    read: Callable[[int, int], tuple[Tensor, Tensor]]
    judge: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None


class Task(NamedTuple):
    """A task's examples: to learn from, to choose settings by, and to report."""

    name: str
    vocab_size: int
    train: Sequence[Group]
    validation: Sequence[Group]
    test: Sequence[Group]


def assemble(
    name: str, vocab_size: int, splits: Sequence[Sequence[Sequence[Any]]], seed: int, make: Callable[..., Group]
) -> Task:
    """The task whose groups are ``make(own, *size)`` for every size of the three ``splits``: to train on, to choose by,
    and to report. Split i draws from a seed of its own, ``own`` = 3 · seed + i.

    Raises:
        ValueError: for a size that ``make`` or the group's ``read`` refuses; one example of each is read.
    """
    parts = [[make(3 * seed + i, *size) for size in sizes] for i, sizes in enumerate(splits)]
    for group in (group for part in parts for group in part):
        group.read(0, 1)
    return Task(name, vocab_size, *parts)


def open_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of a configuration.

    Raises:
        ConfigError: for a module that is not there or has no ``task``, or options that it does not take.
    """
    path = name if "." in name else f"{TASKS}.{name}"
    try:
        make = importlib.import_module(path).task
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data.task was {name!r}; it must name a module with a function task: {error}") from None
    takes = inspect.signature(make).parameters
    for key in options:
        if key not in takes:
            raise ConfigError(f"data.options had the key {key!r}; {name} takes {', '.join(takes)}")
    try:
        return make(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"data.options were {dict(options)}, which {name} refuses: {error}") from None


class ExampleSplit:
    """The examples of a task's split, in batches of one group each; the same calls as a :class:`~.split.Split`.

    An epoch of training has ⌊count / batch_size⌋ batches of every group, in a pseudo-random order over all of them; the
    examples of a group are shuffled anew each epoch. Validation reads every example once, in order.
    """

    def __init__(self, name: str, groups: Sequence[Group]) -> None:
        self.name, self.groups = name, list(groups)
        if not self.groups:
            raise DataError(f"the {name} split of the task is empty; data.options must give it examples")

    @cached_property
    def _stores(self) -> list[tuple[Tensor, Tensor]]:
        """Every group's tokens and labels, int32: generated once, on first use."""
        read = [group.read(0, group.count) for group in self.groups]
        return [(tokens.int(), labels.int()) for tokens, labels in read]

    def bytes_of(self, tokens: Tensor) -> Tensor:
        """Nothing: examples are no text."""
        return torch.zeros_like(tokens)

    def windows(self, seq_len: int) -> int:
        """The number of examples.

        Raises:
            DataError: when one is longer than ``seq_len``.
        """
        longest = max(group.length for group in self.groups)
        if seq_len < longest:
            raise DataError(
                f"train.seq_len was {seq_len}; it must be at least {longest}, the longest {self.name} example"
            )
        return sum(group.count for group in self.groups)

    def _per_epoch(self, batch_size: int) -> list[int]:
        """Batches of each group in an epoch."""
        if self.name == "validation":
            return [-(-group.count // batch_size) for group in self.groups]
        counts = [group.count // batch_size for group in self.groups]
        if not all(counts):
            small = self.groups[counts.index(0)]
            raise DataError(
                f"train.batch_size was {batch_size}; it must be at most {small.count}, the examples of {small.name}"
            )
        return counts

    def batches(self, *, batch_size: int, seq_len: int) -> int:
        """The number of batches in an epoch."""
        self.windows(seq_len)
        return sum(self._per_epoch(batch_size))

    def batch(self, step: int, *, seed: int, batch_size: int, seq_len: int, rows: range | None = None) -> Batch:
        """The global batch at a step, or some of its rows: a pure function of (seed, step) and the batch size.

        Its rows are as long as its group's examples, at most ``seq_len``. Validation batches past the end, and rows
        past a group's last example, have no targets.
        """
        counts = self._per_epoch(batch_size)
        whole = sum(counts)
        epoch, place = divmod(step, whole)
        training = self.name != "validation"
        if training:
            place = int(permute(np.array([place]), whole, derive(seed, epoch, 2))[0])
        group = int(np.searchsorted(np.cumsum(counts), place, side="right"))
        first = (place - sum(counts[:group])) * batch_size
        wanted = np.asarray(range(batch_size) if rows is None else rows, dtype=np.int64) + first
        size = self.groups[group].count
        beyond = wanted >= size
        wanted = wanted % size
        if training:
            wanted = permute(wanted, size, derive(seed, epoch, 3, group))
        tokens, labels = (part[torch.from_numpy(wanted)].long() for part in self._stores[group])
        if not training and (epoch or beyond.any()):
            labels[torch.from_numpy(beyond | (epoch > 0))] = IGNORE
        return Batch(tokens, labels)


class TaskCorpus:
    """A task in the place of a :class:`~.data.Corpus`."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.task = open_task(name, options)
        self.tokenizer = SimpleNamespace(vocab_size=self.task.vocab_size)
        self.checksum = hashlib.sha256(json.dumps([name, options], sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> ExampleSplit:
        """The ``train`` or the ``validation`` split."""
        return ExampleSplit(name, self.task.train if name == "train" else self.task.validation)


def answered(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many labels [B, T] are the likeliest token of logits [B, T, V], and how many labels there are."""
    return (logits.argmax(-1) == labels).sum(), (labels != IGNORE).sum()


@torch.no_grad()
def scores(model: torch.nn.Module, group: Group, *, tokens: int = 4096, stream: int | None = None) -> dict[str, float]:
    """How well a model answers a group: ``accuracy``, the share of labels that are its likeliest next token, and the
    means of what ``group.judge`` gives.

    ``stream``: read every example so many tokens at a time, with the state carried from piece to piece: for examples
    longer than memory holds at once, and for models that look up only what an earlier call has stored. At most
    ``tokens`` tokens go through the model in a call, or one row.

    Raises:
        ValueError: for ``tokens`` or ``stream`` less than 1, or a group without a label.
    """
    for key, value in (("tokens", tokens), ("stream", stream)):
        if value is not None and value < 1:
            raise ValueError(f"{key} was {value}; it must be at least 1")
    device = next(model.parameters()).device
    width = min(stream or group.length, group.length)
    size = max(1, tokens // width)
    sums, asked = {"accuracy": 0.0}, 0
    for start in range(0, group.count, size):
        x, labels = group.read(start, min(size, group.count - start))
        state = None
        for first in range(0, group.length, width):
            piece, wanted = x[:, first : first + width], labels[:, first : first + width]
            output = model(piece.to(device), state=state, return_state=first + width < group.length)
            state, place = output.state, wanted != IGNORE
            logits = output.logits[place.to(device)].float().cpu()
            given = {"accuracy": logits.argmax(-1) == wanted[place]} if len(logits) else {}
            if group.judge is not None and len(logits):
                given |= group.judge(logits, place.nonzero() + torch.tensor([start, first]))
            sums |= {name: sums.get(name, 0.0) + float(value.double().sum()) for name, value in given.items()}
            asked += len(logits)
    if not asked:
        raise ValueError(f"group {group.name} of {group.count} examples had no label; it must ask something")
    return {name: value / asked for name, value in sums.items()}


def accuracy(model: torch.nn.Module, group: Group, tokens: int = 4096) -> float:
    """Share of a group's labels that are the model's likeliest next token, read ``tokens`` tokens at a time."""
    return scores(model, group, tokens=tokens)["accuracy"]
