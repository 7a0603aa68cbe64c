"""How a memory gates attention in MAC and MAG."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from ..layers import Linear, RMSNorm

GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}


class MemoryGate(nn.Module):
    """o = (norm(y) ⊙ g(norm(m))) W_o with a learnt scale in each norm (Titans, eqs. 25 and 28), g = σ or silu.

    The paper says that both sides are normalised with learnable vectors and leaves the nonlinearity to the reader;
    it, and the output projection after the product, are chosen here. σ is the reading of "gate" by the letter. silu
    passes the memory's sign and size on, and learns much faster at small scale (docs/LOG.md, 2026-11-21).
    """

    def __init__(self, model: ModelConfig, gate: str) -> None:
        super().__init__()
        self.nonlinearity = GATES[gate]
        self.norm_y = RMSNorm(model.dim, model.norm_eps)
        self.norm_memory = RMSNorm(model.dim, model.norm_eps)
        self.out = Linear(model.dim, model.dim, model.residual_std)

    def forward(self, y: Tensor, memory: Tensor) -> Tensor:
        """``y``, already through ``norm_y``, gated by ``memory``; both [B, T, dim]."""
        return self.out(y * self.factor(memory))

    def factor(self, memory: Tensor) -> Tensor:
        """g(norm(m)), what multiplies the other branch, of ``memory`` [B, T, dim]."""
        return self.nonlinearity(self.norm_memory(memory))
