"""A model whose sequences are divided among processes, and how the loop calls it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ...models import MemoryLM, Output
from ...models.mixers import LayerState
from ...models.state import State
from .. import parallel
from ..config import RunConfig
from ..parallel import World
from ..split import Batch
from .documents import Piece
from .link import TIMEOUT, Link
from .mixers import checkpointed, divide, hands_on
from .passage import Passage, borders, joined
from .schedule import FORWARD, order

if TYPE_CHECKING:
    from ..loop import Run


@dataclass
class Part(Output):
    """The answer to a process's part of rows, and the passage that it took; ``counts``: how often each memory of each
    mixture was chosen, in this process and those before."""

    passage: Passage | None = None
    counts: dict[str, Tensor] = field(default_factory=dict)


BUCKET = 2**24
"""Numbers of gradients that are summed up at once."""


def start(config: RunConfig, world: World, core: MemoryLM, model: nn.Module) -> "Division | None":
    """What ``train.sequence_parallel`` asks for; None where it is 1. Called by all processes, with the model spread.

    Processes that hold the parts of one sequence are neighbours by rank. What cannot be done the config has refused.
    """
    size = config.train.sequence_parallel
    if size == 1:
        return None
    mine = [r for r in range(world.size) if r // size == world.rank // size]
    own = link(mine, world, timedelta(seconds=config.train.sequence_timeout))
    return Division(core, model, own, config.train.seq_len, again=config.train.activation_checkpointing)


def link(ranks: Sequence[int], world: World, timeout: timedelta = TIMEOUT) -> Link:
    """The link of this process to the others of ``ranks``; called by all processes, whose ``ranks`` are runs of one
    length: two process groups for each run, one for each direction, so that neither waits for the other."""
    size, mine = len(ranks), None
    for begin in range(0, world.size, size):
        some = list(range(begin, begin + size))
        ahead, back = (dist.new_group(some, timeout=timeout) for _ in range(2))
        if world.rank in some:
            mine = Link(some, ahead, back, world.device, timeout)
    assert mine is not None
    return mine


class Division:
    """The loop's view of a model whose sequences of ``length`` tokens are divided among the processes of a link.

    Args:
        core: the model; its mixers are made to exchange (:func:`.mixers.divide`).
        model: the same as it is spread over processes: a copy in each, whose gradients are summed up here when all
            micro batches are back, or what ``fsdp`` made of it.
        whole: see :func:`.mixers.divide`.
        again: see :func:`.mixers.checkpointed`.
    """

    def __init__(
        self, core: MemoryLM, model: nn.Module, link: Link, length: int, *, whole: bool = False, again: bool = False
    ) -> None:
        self.core, self.link, self.length = core, link, length
        self.model, self.sharded = model, isinstance(model, FSDPModule)
        self.everyone: dist.ProcessGroup | None = None  # over whom gradients are averaged; None: all processes
        self.now: Passage | None = None
        # In one order: what gathers parameters does so in all processes at once; who need not wait need not run ahead.
        self.together = self.sharded
        if core.hmt is None:
            mixers: list[Any] = [block.mixer for block in core.blocks]
            self.together |= not (whole or any(hands_on(mixer) for mixer in mixers))
            divide(core, self, whole=whole)
        if again:
            checkpointed(core, self)

    def cut(self, batch: Batch) -> Batch:
        """This process's part of the rows of a batch, whose length is that of all rows until the next cut. Documents
        keep the borders that they have in the whole row.

        Raises:
            ValueError: for rows with fewer tokens than there are processes.
        """
        self.length = batch.tokens.shape[1]
        if self.length < self.link.size:
            raise ValueError(
                f"rows were of {self.length} tokens; they must be of {self.link.size}, the processes, or more"
            )
        mine = slice(*borders(self.length, self.link.size)[self.link.rank :][:2])
        tokens, targets = (x[:, mine].contiguous() for x in batch[:2])
        return Batch(tokens, targets, batch.cu_seqlens)

    def read(
        self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, return_state: Any = None, **options: Any
    ) -> Part:
        """The model's answer to this process's part of rows. The processes' ``loss_sum`` sum up to that of the whole;
        ``loss`` and ``valid`` are this part's.

        Args:
            cu_seqlens: borders of the documents in the whole row, as :meth:`cut` leaves them.

        Raises:
            ValueError: when a state is asked for, or the tokens are not this process's part of the documents.
        """
        if return_state:
            must = "be false with sequences divided among processes, each of which has a part"
            raise ValueError(f"return_state was {return_state}; it must {must}")
        documents = None if cu_seqlens is None else cu_seqlens.tolist()
        passage = Passage(self.link, self.length if documents is None else documents[-1], documents)
        size = passage.borders[self.link.rank + 1] - passage.begin
        if documents is not None and tokens.shape != (1, size):
            was, must = f"tokens was {tuple(tokens.shape)}", f"(1, {size}), this process's part of all {passage.length}"
            raise ValueError(f"{was}; with cu_seqlens of a whole row it must be {must}")
        output = self._through(passage, tokens, options)
        part = Part(**{one.name: getattr(output, one.name) for one in fields(output)}, passage=passage)
        if part.loss_sum is not None:
            part.loss_sum = part.loss_sum + passage.token.to(part.loss_sum.dtype)
        part.counts = self._count_ahead(passage)
        return part

    def _through(self, passage: Passage, tokens: Tensor, options: dict[str, Any]) -> Output:
        if self.core.hmt is not None:
            return self._handed(passage, tokens, options)
        self.now = passage
        try:
            return self.model(tokens, cu_seqlens=passage.cu_seqlens, return_state=False, **options)
        finally:
            self.now = None

    def _handed(self, passage: Passage, tokens: Tensor, options: dict[str, Any]) -> Output:
        """With memory over segments each pass of the backbone begins anew: the state of the model is handed on."""

        def call(piece: Piece, state: LayerState | None, keep: bool) -> tuple[Output, LayerState | None]:
            held = None
            if state is not None:
                place = passage.seen(tokens.shape[0]).long()
                held = State(list(state.values()), place, self.core.fingerprint)
            own = {name: x[:, piece.tokens] if name == "targets" else x for name, x in options.items()}
            borders = piece.cu_seqlens
            output = self.model(tokens[:, piece.tokens], state=held, cu_seqlens=borders, return_state=keep, **own)
            after = {str(i): layer for i, layer in enumerate(output.state.layers)} if keep else None
            return output, after

        return _together(passage.hand_on("the state of the model", call))

    # -- the router's losses -------------------------------------------------------------------------------------------

    def _count_ahead(self, passage: Passage) -> dict[str, Tensor]:
        """How often each memory was chosen so far, added up from the first process to the last, which then knows."""
        what = "how often memories were chosen"
        counts = {str(i): count for i, (_, count) in enumerate(passage.routed.values())}
        if counts and not passage.first:
            before, _ = self.link.receive(self.link.rank - 1, what)
            counts = {name: count + before[name] for name, count in counts.items()}
        if counts and not passage.last:
            self.link.send(self.link.rank + 1, counts, what)
        return counts

    def close(self, part: Part) -> dict[str, Tensor]:
        """``aux`` of a part when it is about to go backward: the last process tells the others how often each memory
        was chosen. The processes' mean is that of whole sequences, for the loop takes means."""
        aux, passage, counts = dict(part.aux), part.passage, part.counts
        assert passage is not None
        if counts:
            what = "how often memories were chosen"
            if not passage.last:
                counts, _ = self.link.receive(self.link.rank + 1, what, back=True)
            if not passage.first:
                self.link.send(self.link.rank - 1, counts, what, back=True)
            each = [(counts[str(i)].to(p) * p).sum() for i, (p, _) in enumerate(passage.routed.values())]
            aux["balance"] = torch.stack(each).sum()
        return {name: value * self.link.size for name, value in aux.items()}

    # -- an update -----------------------------------------------------------------------------------------------------

    def gradients(self, run: "Run", batches: Sequence[Batch], valid: int) -> Tensor:
        """Run the micro batches of an update in the order of :mod:`.schedule`; returns the sum of this part's losses.

        Gradients are then those of the whole global batch in every process, as the loop expects.
        """
        count = len(batches)
        layers = 1 if self.core.hmt is not None else len(self.core.blocks)
        loss_sum = torch.zeros((), device=self.link.device)
        underway: dict[int, Part] = {}
        for turn, number in order(self.link.rank, self.link.size, count, layers, together=self.together):
            if turn == FORWARD:
                with run.autocast:
                    part = run.forward(batches[number])
                assert isinstance(part, Part) and part.loss_sum is not None  # it is there whenever there are targets
                underway[number] = part
                loss_sum += part.loss_sum.detach()
                continue
            part = underway.pop(number)
            objective = run.objective(replace(part, aux=self.close(part)), valid)
            with parallel.accumulate(self.model, last=number == count - 1):
                objective.backward()
        self.link.flush()
        if not self.sharded:
            average(list(self.core.parameters()), self.everyone)
        return loss_sum


def _together(outputs: Sequence[Output]) -> Output:
    """The answers to pieces of a row as one. Further losses there are none of, for the config has refused them."""
    if len(outputs) == 1:
        return outputs[0]
    if outputs[0].logits is not None:
        return Output(logits=joined([x.logits for x in outputs if x.logits is not None]))
    losses, sums, valid = (
        [value for x in outputs if (value := getattr(x, name)) is not None] for name in ("loss", "loss_sum", "valid")
    )
    count = torch.stack(valid).sum()
    total = torch.stack(sums).sum()
    loss = joined(losses) if losses[0].dim() else total / count.clamp(min=1)
    return Output(loss=loss, loss_sum=total, valid=count)


def average(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Gradients of all trainable parameters become their mean over the processes of a group (None: all); one that is
    missing counts as 0."""
    size = dist.get_world_size(group)
    bucket: list[nn.Parameter] = []

    def reduce() -> None:
        if not bucket:
            return
        joined = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
        dist.all_reduce(joined, group=group)
        joined /= size
        for p, part in zip(bucket, joined.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p)
        bucket.clear()

    for p in parameters:
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            bucket.append(p)
            if sum(x.numel() for x in bucket) >= BUCKET:
                reduce()
    reduce()
