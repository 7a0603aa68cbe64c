"""The exchanges of one micro batch between the processes that share its sequences, which gradients go through."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .documents import Piece, clipped, opened, pieces
from .link import Link, Tree, flat, nested

T = TypeVar("T")


class _Send(torch.autograd.Function):
    """Tensors to another process; their gradients come back from it."""

    @staticmethod
    def forward(
        ctx: Any, link: Link, to: int, what: str, names: tuple[str, ...], wanted: set[str], *args: Tensor
    ) -> Any:
        token, *tensors = args
        ctx.link, ctx.to, ctx.what, ctx.names, ctx.wanted = link, to, what, names, wanted
        link.send(to, dict(zip(names, tensors, strict=True)), what, marked=wanted)
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found: dict[str, Tensor] = {}
        if ctx.wanted:
            found, _ = ctx.link.receive(ctx.to, f"the gradient of {ctx.what}", back=True)
        return (None, None, None, None, None, grad, *(found.get(name) for name in ctx.names))


class _Receive(torch.autograd.Function):
    """Tensors from another process; their gradients go back to it."""

    @staticmethod
    def forward(ctx: Any, link: Link, source: int, what: str, names: list[str], token: Tensor) -> tuple[Tensor, ...]:
        tensors, marked = link.receive(source, what)
        names.extend(tensors)
        ctx.link, ctx.source, ctx.what, ctx.names, ctx.marked = link, source, what, list(tensors), marked
        ctx.mark_non_differentiable(*(x for name, x in tensors.items() if name not in marked))
        ctx.set_materialize_grads(False)  # where there is no gradient nothing is sent
        return (token.clone(), *tensors.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
        if ctx.marked:
            pairs = zip(ctx.names, grads, strict=True)
            found = {name: grad for name, grad in pairs if grad is not None and name in ctx.marked}
            ctx.link.send(ctx.source, found, f"the gradient of {ctx.what}", back=True)
        return None, None, None, None, d_token


class _Work(torch.autograd.Function):
    """A slot of the schedule, in the forward and in the backward."""

    @staticmethod
    def forward(ctx: Any, link: Link, token: Tensor) -> Tensor:
        ctx.link = link
        link.work()
        return token.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        ctx.link.work()
        return None, grad


class _Reached(torch.autograd.Function):
    """A gradient of zero for every parameter, so that the same ones have a gradient in every process."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *parameters: Tensor) -> Tensor:
        ctx.about = [(x.shape, x.dtype, x.device) for x in parameters]
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros(shape, dtype=kind, device=where) for shape, kind, where in ctx.about))


def rows_of(tree: Tree, rows: slice) -> Tree:
    """Some rows of a state."""
    return {name: rows_of(x, rows) if isinstance(x, dict) else x[rows] for name, x in tree.items()}


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Results [B, T, ...] of pieces as one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def borders(length: int, ranks: int) -> list[int]:
    """The first token of each process, and the number of tokens: ⌊r T / R⌋."""
    return [r * length // ranks for r in range(ranks + 1)]


class Passage:
    """One micro batch on its way through the processes of a sequence of ``length`` tokens.

    Process r of R holds tokens ⌊r T / R⌋ to ⌊(r + 1) T / R⌋ − 1. ``token`` is a zero that goes through all exchanges
    and is added to the loss: so each of them is met by the backward, whatever was made of what it brought, and they are
    met in exactly the reverse order, in every process.

    Args:
        documents: borders of the documents packed into the sequence, 0 and ``length`` among them; None: rows without.
    """

    def __init__(self, link: Link, length: int, documents: Sequence[int] | None = None) -> None:
        self.link, self.length, self.documents = link, length, documents
        self.borders = borders(length, link.size)
        self.token = torch.zeros((), device=link.device, requires_grad=True)
        self.routed: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # see _route in mixers.py
        self._heard: list[Tree] | None = None  # what is received is written down here
        self.cu_seqlens: Tensor | None = None
        if documents is None:
            self.pieces = [Piece(slice(None), slice(None), None, not self.first, not self.last)]
        else:
            begin, end = self.borders[link.rank : link.rank + 2]
            self.pieces = pieces(documents, begin, end, link.device)
            self.cu_seqlens = torch.tensor(clipped(documents, begin, end), dtype=torch.int32, device=link.device)
        self.piece = self.pieces[0]

    @contextmanager
    def recorded(self, heard: list[Tree]) -> Iterator[None]:
        """Inside, what is received is added to ``heard``."""
        self._heard = heard
        try:
            yield
        finally:
            self._heard = None

    def again(self, heard: list[Tree]) -> "Passage":
        """A passage for running a piece of this one a second time: it receives ``heard``, and sends nothing."""
        return Repeated(self.link, self.length, self.documents, heard)

    @property
    def first(self) -> bool:
        """This process holds the first tokens."""
        return self.link.rank == 0

    @property
    def last(self) -> bool:
        """This process holds the last tokens."""
        return self.link.rank == self.link.size - 1

    @property
    def begin(self) -> int:
        """The number of this process's first token."""
        return self.borders[self.link.rank]

    def send(self, to: int, tree: Mapping[str, Any], what: str) -> None:
        """Tensors to the process ``to``, with their gradients to come back."""
        names, tensors = zip(*flat(tree), strict=True)
        recorded = torch.is_grad_enabled()
        wanted = {name for name, x in zip(names, tensors, strict=True) if recorded and x.requires_grad}
        self.token = _Send.apply(self.link, to, what, names, wanted, self.token, *tensors)

    def receive(self, source: int, what: str) -> Tree:
        """What the process ``source`` has sent."""
        names: list[str] = []
        self.token, *tensors = _Receive.apply(self.link, source, what, names, self.token)
        found = nested(dict(zip(names, tensors, strict=True)))
        if self._heard is not None:
            kept = {name: x.detach().requires_grad_(x.requires_grad) for name, x in flat(found)}
            self._heard.append(nested(kept))
        return found

    def seen(self, rows: int) -> Tensor:
        """Tokens before this process's first one, int32 [rows]: of the row, or of each document in its part."""
        seen = torch.zeros(rows, dtype=torch.int32, device=self.link.device)
        if self.documents is None:
            return seen + self.begin
        seen[0] = self.begin - opened(self.documents, self.begin)
        return seen

    def each(self, run: Callable[[Piece], T]) -> list[T]:
        """``run`` of every piece of the part, which is meanwhile :attr:`piece`; the results in the order of tokens."""
        found = []
        for piece in self.pieces:
            self.piece = piece
            found.append((piece.tokens.start or 0, run(piece)))
        return [result for _, result in sorted(found, key=lambda pair: pair[0])]

    def hand_on(
        self,
        what: str,
        work: Callable[[Piece, Tree | None, bool], tuple[T, Tree | None]],
        start: Tree | None = None,
        *,
        waits: bool = True,
    ) -> list[T]:
        """:meth:`through` with every piece; the results in the order of tokens."""
        return self.each(lambda piece: self.through(piece, what, work, start, waits=waits))

    def through(
        self,
        piece: Piece,
        what: str,
        work: Callable[[Piece, Tree | None, bool], tuple[T, Tree | None]],
        start: Tree | None = None,
        *,
        waits: bool = True,
    ) -> T:
        """``work`` on a piece, where it ``takes`` from the state that the process before leaves behind, whose own state
        the next one gets where it ``gives``: ``work(piece, state, whether a state is wanted)`` gives its result and
        the state.

        Args:
            start: the state before the first token, of all rows or documents of this part.
            waits: whether all pieces together are a slot of the schedule.
        """
        if piece.takes:
            state: Tree | None = self.receive(self.link.rank - 1, what)
        else:
            state = start if start is None else rows_of(start, piece.rows)
        result, after = work(piece, state, piece.gives)
        if waits and piece is self.pieces[0]:
            self.work()
        if piece.gives:
            assert after is not None
            self.send(self.link.rank + 1, after, what)
        return result

    def work(self) -> None:
        """See :meth:`Link.work`; once more in the backward."""
        self.token = _Work.apply(self.link, self.token)

    def reached(self, parameters: list[Tensor]) -> None:
        """Give each of these a gradient, of zero where nothing else does."""
        self.token = _Reached.apply(self.token, *parameters)

    def before(
        self, tensors: dict[str, Tensor], size: int | None, what: str, held: dict[str, Tensor] | None = None
    ) -> Any:
        """The last ``size`` entries before this process's first token, or as many as there are; None: all of them. Of
        documents those of the one that this token lies in.

        Args:
            tensors: [B, this process's tokens, ...] each.
            held: what goes before the first token of all, [B, P, ...] each; the same P in every process. None with
                documents, each of which has a beginning.

        Returns: {name: [B, S, ...]}. Every process sends what others need before it waits for anything: all work at
        once.
        """
        virtual = 0 if held is None else next(iter(held.values())).shape[1]
        lowest = [-virtual if self.documents is None else opened(self.documents, x) for x in self.borders[:-1]]
        starts = [-virtual, *self.borders[1:]]
        if self.first and held is not None:
            tensors = {name: torch.cat([held[name].to(x.dtype), x], 1) for name, x in tensors.items()}
        mine = self.link.rank

        def part(owner: int, reader: int) -> tuple[int, int]:
            """The tokens of ``owner`` that ``reader`` needs."""
            need = lowest[reader] if size is None else max(self.borders[reader] - size, lowest[reader])
            return max(starts[owner], need), self.borders[owner + 1]

        for reader in range(mine + 1, self.link.size):
            begin, end = part(mine, reader)
            if begin < end:
                cut = slice(begin - starts[mine], end - starts[mine])
                self.send(reader, {name: x[:, cut] for name, x in tensors.items()}, what)
        pieces = []
        for owner in range(mine):
            begin, end = part(owner, mine)
            if begin < end:
                pieces.append(self.receive(owner, what))
        if self.first:
            kept = virtual if size is None else min(virtual, size)
            return {name: x[:, virtual - kept : virtual] for name, x in tensors.items()}
        return {name: torch.cat([x[:, :0], *(piece[name] for piece in pieces)], 1) for name, x in tensors.items()}


class Repeated(Passage):
    """See :meth:`Passage.again`."""

    def __init__(self, link: Link, length: int, documents: Sequence[int] | None, heard: list[Tree]) -> None:
        super().__init__(link, length, documents)
        self.due = list(heard)

    def send(self, to: int, tree: Mapping[str, Any], what: str) -> None:
        """Nothing: it was sent."""

    def receive(self, source: int, what: str) -> Tree:
        """What was received then."""
        return self.due.pop(0)

    def work(self) -> None:
        """Nothing: the slot has passed, and the backward counts its own."""

    def reached(self, parameters: list[Tensor]) -> None:
        """Nothing: they are."""
