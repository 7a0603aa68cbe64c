"""Titans MAG: the memory gates sliding-window attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import ModelConfig
from ..mixer_config import TitansMAG
from .attention import AttentionCore
from .gate import MemoryGate
from .mixer import LayerState, Mixer
from .neural_memory import MemoryLayer


class MemoryAsGate(Mixer):
    """y = window attention over [P ‖ x], P in every window; o = (norm(y) ⊙ σ(norm(M(x)))) W_o (Titans, eqs. 26-28).

    The memory reads and writes x, the attention is not told of it: two branches on one input.
    State: ``attention`` and ``memory``, those of the two branches.
    """

    def __init__(self, model: ModelConfig, mixer: TitansMAG) -> None:
        super().__init__()
        self.attention = AttentionCore(model, mixer, mixer.window, mixer.persistent)
        self.memory = MemoryLayer(model, mixer.memory)
        self.gate = MemoryGate(model, mixer.gate)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`Mixer`."""
        held = state or {"attention": None, "memory": None}
        y, attention = self.attention(x, held["attention"], cu_seqlens, return_state)
        m, memory = self.memory(x, held["memory"], cu_seqlens, return_state)
        o = self.gate(self.gate.norm_y(y), m)
        return o, {"attention": attention, "memory": memory} if return_state else None

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Both branches' own."""
        return {
            "attention": self.attention.init_state(batch, device, dtype),
            "memory": self.memory.init_state(batch, device, dtype),
        }

    @torch.no_grad()
    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """The memory's, see :meth:`MemoryLayer.diagnose`, and the mean of ``gate``."""
        return self.memory.diagnose(x) | {"gate": self._opened(x).mean()}

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, Tensor]:
        """The memory's, see :meth:`MemoryLayer.observe`, and ``gate``: what the memory multiplies the attention by, a
        mean over channels."""
        return self.memory.observe(x) | {"gate": self._opened(x)}

    def _opened(self, x: Tensor) -> Tensor:
        return self.gate.factor(self.memory(x, None, None, False)[0]).mean(-1)

    @torch.no_grad()
    def recall(self, x: Tensor, marks: Sequence[int]) -> Tensor:
        """The memory's; see :meth:`MemoryLayer.recall`."""
        return self.memory.recall(x, marks)
