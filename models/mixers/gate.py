"""How a memory gates attention in MAC and MAG."""

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..layers import Linear, RMSNorm


class MemoryGate(nn.Module):
    """o = (norm(y) ⊙ σ(norm(m))) W_o with a learnt scale in each norm (Titans, eqs. 25 and 28).

    The paper says that both sides are normalised with learnable vectors and leaves the nonlinearity to the reader;
    the sigmoid, and the output projection after the product, are chosen here.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.norm_y = RMSNorm(model.dim, model.norm_eps)
        self.norm_memory = RMSNorm(model.dim, model.norm_eps)
        self.out = Linear(model.dim, model.dim, model.residual_std)

    def forward(self, y: Tensor, memory: Tensor) -> Tensor:
        """``y``, already through ``norm_y``, gated by ``memory``; both [B, T, dim]."""
        return self.out(y * torch.sigmoid(self.norm_memory(memory)))
