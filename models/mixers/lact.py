"""LaCT: a memory written in large chunks beside window attention, from one projection."""

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..mixer_config import LaCT
from .attention import AttentionHeads
from .mixer import LayerState
from .neural_memory import MemoryLayer


class LargeChunkMemory(MemoryLayer):
    """y = (attention(q, k, v) + norm(M(q̃; W)) ⊙ gate) W_o, with one q, k, v for both (LaCT, Zhang et al., 2025).

        q̃, k̃ = φ(s ⊙ q + b), the same s and b per channel for all tokens, learnt; then as in :class:`MemoryLayer`

    The attention sees q and k rotated, the memory does not: order inside a chunk is for the attention, which is also
    why chunks may be long. Their heads may be of different widths. The paper scales the memory's output per head by a
    learnt factor of the token; here by the norm's weight and the gate.

    State: ``attention``, and those of :class:`MemoryLayer`.
    """

    def __init__(self, model: ModelConfig, mixer: LaCT) -> None:
        super().__init__(model, mixer.memory)
        self.attention = AttentionHeads(model, mixer, mixer.window)
        self.stretch = nn.Parameter(torch.ones(2 * self.dim))
        self.shift = nn.Parameter(torch.zeros(2 * self.dim))

    def reset_parameters(self) -> None:
        """See :class:`MemoryLayer`; s = 1, b = 0."""
        super().reset_parameters()
        nn.init.ones_(self.stretch)
        nn.init.zeros_(self.shift)

    def _heads_of(
        self, qkv: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor, Tensor, LayerState | None]:
        qk, v = qkv.split([2 * self.dim, self.dim], dim=-1)
        qk = torch.addcmul(self.shift.to(qk.dtype), qk, self.stretch.to(qk.dtype))
        return super()._heads_of(torch.cat([qk, v], -1), state, cu_seqlens, return_state)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`Mixer`."""
        held = state or {}
        gate, qkv = self.proj(x).split([self.gate_width, 3 * self.dim], dim=-1)
        q, k, v, conv = self._heads_of(qkv, held.get("conv"), cu_seqlens, return_state)
        o, memory = self._remember(x, (q, k, v), held.get("memory"), cu_seqlens, return_state)
        seen, attention = self.attention(qkv, held.get("attention"), cu_seqlens, return_state)
        o = self.out_norm(o, gate.view(o.shape) if self.gate_width else None)
        y = self.out(seen + o.flatten(2))
        if not return_state:
            return y, None
        return y, {"memory": memory, "attention": attention} | ({"conv": conv} if conv else {})

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Nothing seen."""
        return super().init_state(batch, device, dtype) | {"attention": self.attention.init_state(batch, device, dtype)}
