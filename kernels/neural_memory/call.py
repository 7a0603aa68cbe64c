"""What every implementation in plain torch needs of one call: its schedule, its tokens laid out, its segments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..check import compute_dtype
from .cost import segment_chunks
from .schedule import Step, make_schedule
from .spec import MemorySpec
from .tokens import Tokens


class Call:
    """What forward and backward both need of one call: schedule, laid-out tokens, the states, the segments."""

    def __init__(
        self,
        tokens: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        norm: Tensor | None,
        state: Sequence[Tensor],
        position: Tensor | None,
        cu_seqlens: Tensor | None,
        spec: MemorySpec,
    ) -> None:
        q = tokens[0]
        assert q is not None
        batch, length, self.heads = q.shape[:3]
        self.spec, self.kind = spec, compute_dtype(q)
        self.rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.schedule = make_schedule(batch, length, spec.chunk_size, position, cu_seqlens, q.device, spec.step_size)
        self.layout = Tokens(batch, self.heads, all(step.span is not None for step in self.schedule.steps))
        self.tokens = [self.layout.lay(x, self.kind) for x in tokens]
        self.norm = None if norm is None else norm.to(self.kind).repeat(self.rows, 1).unsqueeze(1)
        self.weights, self.state = weights, state
        every = segment_chunks(spec, [(w.shape[-2], w.shape[-1]) for w in weights])
        steps = self.schedule.steps
        self.segments = [steps[i : i + every] for i in range(0, len(steps), every)]

    def ordered(self, x: Tensor) -> Tensor:
        """[N, H, ·, ·] → [N·H, ·, ·] with rows in the schedule's order."""
        x = x.to(self.kind)
        return (x if self.schedule.order is None else x[self.schedule.order]).flatten(0, 1)

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`ordered`."""
        x = x.unflatten(0, (self.rows, self.heads))
        if self.schedule.order is None:
            return x
        return torch.empty_like(x).index_copy(0, self.schedule.order, x)

    def ended(self, step: Step) -> bool | Tensor:
        """Whether the step completes its chunk: for all rows, or bool [rows·H, 1, 1]."""
        return self._flag(step.ended)

    def turned(self, step: Step) -> bool | Tensor:
        """Whether the step is complete: for all rows, or bool [rows·H, 1, 1]."""
        return self._flag(step.turned)

    def _flag(self, flag: bool | Tensor) -> bool | Tensor:
        return flag if isinstance(flag, bool) else flag.repeat_interleave(self.heads)[:, None, None]
