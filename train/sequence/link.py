"""Messages between the processes that share a sequence: nested dictionaries of tensors, numbered, and never awaited for
ever."""

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Tree = dict[str, Any]

TIMEOUT = timedelta(minutes=10)
"""How long a message is waited for."""
ALIGN = 16  # bytes: each tensor of a message begins at a multiple, to be read in place
HEADER = 4  # int64 that it begins with: its number, the sender's clock, bytes of its description, bytes in all
FIRST = 4096  # bytes that every message has; one that is longer comes in two pieces, for then its length is known


class SequenceError(ConnectionError):
    """A message of another process of the sequence did not come, or not the one that was due."""


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a nested dictionary under names like ``memory/weights.0``."""
    for name, x in tree.items():
        if isinstance(x, Mapping):
            yield from flat(x, f"{prefix}{name}/")
        else:
            yield prefix + name, x


def nested(tensors: Mapping[str, Tensor]) -> Tree:
    """The inverse of :func:`flat`."""
    tree: Tree = {}
    for name, x in tensors.items():
        *path, last = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = x
    return tree


def _padded(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


class Link:
    """One of the processes that share a sequence, and its way to the others.

    Messages go ahead (to those that hold later tokens) in one process group and back in another, each pair's in the
    order in which they are sent. Sending does not wait. Every message has a number, so that one that is lost or out of
    order is noticed, and the sender's ``clock``: the time in slots, as of Lamport (1978), in which each :meth:`work` is
    a slot long and messages take none. It says how a schedule went, whatever the machine was doing besides.

    Args:
        ranks: the processes in the order of their tokens, by their ranks among all.
        ahead, back: process groups of these.
        device: where messages lie that are on their way.
        timeout: how long one is waited for.
    """

    def __init__(
        self,
        ranks: list[int],
        ahead: dist.ProcessGroup,
        back: dist.ProcessGroup,
        device: torch.device,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        self.ranks, self.groups, self.device, self.timeout = ranks, (ahead, back), device, timeout
        self.rank, self.size = ranks.index(dist.get_rank()), len(ranks)
        self.clock = self.worked = self.bytes = 0
        self._sent: dict[tuple[int, bool], int] = {}
        self._received: dict[tuple[int, bool], int] = {}
        self._pending: deque[tuple[dist.Work, Tensor, str]] = deque()

    def work(self) -> None:
        """A slot passes."""
        self.clock += 1
        self.worked += 1

    def send(self, to: int, tensors: Mapping[str, Tensor], what: str, *, back: bool = False, marked: Any = ()) -> None:
        """Send tensors to the process ``to`` of the sequence; ``marked``: names that the receiver is told of.

        Raises:
            SequenceError: when that process is gone.
        """
        self._reap()
        about = [(name, list(x.shape), str(x.dtype)[6:], name in marked) for name, x in tensors.items()]
        said = json.dumps(about).encode()
        pieces = [torch.frombuffer(bytearray(said), dtype=torch.uint8)]
        pieces += [x.detach().contiguous().flatten().view(torch.uint8) for x in tensors.values()]
        size = 8 * HEADER + sum(_padded(len(x)) for x in pieces)
        number = self._sent[to, back] = self._sent.get((to, back), 0) + 1
        header = torch.tensor([number, self.clock, len(said), size]).view(torch.uint8)
        message = torch.zeros(max(size, FIRST), dtype=torch.uint8, device=self.device)
        place = 0
        for x in (header, *pieces):
            message[place : place + len(x)] = x
            place += _padded(len(x))
        text = f"process {self.rank} of the sequence could not send {what} to process {to}"
        for tag, x in enumerate((message[:FIRST], message[FIRST:])):
            if len(x):
                try:
                    work = dist.isend(x, self.ranks[to], group=self.groups[back], tag=tag)
                except RuntimeError as error:
                    raise SequenceError(f"{text}: {str(error).splitlines()[0]}") from None
                assert work is not None
                self._pending.append((work, x, text))
        self.bytes += sum(len(x) for x in pieces[1:])

    def receive(self, source: int, what: str, *, back: bool = False) -> tuple[dict[str, Tensor], set[str]]:
        """The next tensors from the process ``source`` of the sequence, and the names that it marked.

        Raises:
            SequenceError: when they do not come in time, that process is gone, or a message is missing.
        """
        text = f"process {self.rank} of the sequence waited for {what} from process {source}"
        message = torch.empty(FIRST, dtype=torch.uint8, device=self.device)
        self._take(message, source, 0, back, text)
        number, clock, said, size = message[: 8 * HEADER].view(torch.int64).tolist()
        due = self._received[source, back] = self._received.get((source, back), 0) + 1
        if number != due:
            raise SequenceError(f"{text}: message {due} was due, and message {number} came")
        if size > FIRST:
            message = torch.cat([message, message.new_empty(size - FIRST)])
            self._take(message[FIRST:], source, 1, back, text)
        self.clock = max(self.clock, clock)
        tensors, marked, place = {}, set(), 8 * HEADER
        about = bytes(message[place : place + said].tolist())
        place += _padded(said)
        for name, shape, kind, mark in json.loads(about):
            dtype = getattr(torch, kind)
            count = math.prod(shape) * dtype.itemsize
            tensors[name] = message[place : place + count].view(dtype).view(shape)
            place += _padded(count)
            if mark:
                marked.add(name)
        return tensors, marked

    def flush(self) -> None:
        """Wait until all that was sent has left.

        Raises:
            SequenceError: when it does not in time.
        """
        while self._pending:
            work, _, text = self._pending.popleft()
            self._wait(work, text)

    def _take(self, buffer: Tensor, source: int, tag: int, back: bool, text: str) -> None:
        try:
            work = dist.irecv(buffer, self.ranks[source], group=self.groups[back], tag=tag)
        except RuntimeError as error:
            raise SequenceError(f"{text}: {str(error).splitlines()[0]}") from None
        assert work is not None
        self._wait(work, text)

    def _wait(self, work: dist.Work, text: str) -> None:
        try:
            work.wait(self.timeout)
        except RuntimeError as error:
            limit = f"{self.timeout.total_seconds():g} s at most"
            raise SequenceError(f"{text}, {limit}: {str(error).splitlines()[0]}") from None

    def _reap(self) -> None:
        while self._pending and self._pending[0][0].is_completed():
            self._pending.popleft()
