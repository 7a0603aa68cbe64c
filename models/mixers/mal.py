"""Titans MAL: the memory is a layer below sliding-window attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import ModelConfig
from ..layers import PersistentTokens, RMSNorm
from ..mixer_config import TitansMAL
from .attention import Attention
from .mixer import LayerState, Mixer
from .neural_memory import MemoryLayer


class MemoryAsLayer(Mixer):
    """y = M([P ‖ x]); o = window attention over norm(y) (Titans, eqs. 29-31).

    The persistent tokens are the first tokens of every sequence, for the memory and for the attention above it, which
    loses them from its window as it moves on. So they are run once per forward, at batch 1, and what they leave behind
    is the state that every row and document begins with; :meth:`init_state` is that state, with its graph when
    gradients are recorded. The norm between the two layers is chosen here (the paper has none): the memory's output
    projection starts small, and attention needs an input of order 1.

    State: ``memory`` and ``attention``, those of the two layers.
    """

    def __init__(self, model: ModelConfig, mixer: TitansMAL) -> None:
        super().__init__()
        self.persistent = PersistentTokens(mixer.persistent, model.dim) if mixer.persistent else None
        self.memory = MemoryLayer(model, mixer.memory)
        self.norm = RMSNorm(model.dim, model.norm_eps)
        self.attention = Attention(model, mixer, mixer.window)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`Mixer`."""
        if state is None and self.persistent is not None:
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = self.init_state(rows, x.device, x.dtype)
        return self._run(x, state, cu_seqlens, return_state)

    def _run(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, LayerState | None]:
        held = state or {"memory": None, "attention": None}
        y, memory = self.memory(x, held["memory"], cu_seqlens, return_state)
        o, attention = self.attention(self.norm(y), held["attention"], cu_seqlens, return_state)
        return o, {"memory": memory, "attention": attention} if return_state else None

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """What the persistent tokens leave behind; without any, both layers' own."""
        if self.persistent is None:
            return {
                "memory": self.memory.init_state(batch, device, dtype),
                "attention": self.attention.init_state(batch, device, dtype),
            }
        _, state = self._run(self.persistent().to(dtype)[None], None, None, True)
        assert state is not None
        return _expand(state, batch)

    @torch.no_grad()
    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """The memory's; see :meth:`MemoryLayer.diagnose`."""
        return self.memory.diagnose(x)

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, Tensor]:
        """The memory's; see :meth:`MemoryLayer.observe`."""
        return self.memory.observe(x)

    @torch.no_grad()
    def recall(self, x: Tensor, marks: Sequence[int]) -> Tensor:
        """The memory's; see :meth:`MemoryLayer.recall`."""
        return self.memory.recall(x, marks)


def _expand(state: LayerState, batch: int) -> LayerState:
    """A state of one row, for ``batch`` rows."""
    return {
        name: _expand(x, batch) if isinstance(x, dict) else x.expand(batch, *x.shape[1:]) for name, x in state.items()
    }
