"""The block: a mixer along time and an MLP along width, each behind a norm."""

from torch import Tensor, nn

from .config import ModelConfig
from .layers import RMSNorm, SwiGLU
from .mixers import LayerState, make_mixer


class Block(nn.Module):
    """x ← x + mixer(norm(x)); x ← x + swiglu(norm(x)) (Llama's block); no MLP when ``ffn_hidden`` is 0."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_mixer = RMSNorm(config.dim, config.norm_eps)
        self.mixer = make_mixer(config, config.mixer_of(layer))
        self.norm_mlp = RMSNorm(config.dim, config.norm_eps) if config.hidden else None
        self.mlp = SwiGLU(config.dim, config.hidden, config.init_std, config.residual_std) if config.hidden else None

    def forward(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, LayerState | None]:
        """x [B, T, dim] → the same, and the mixer's state."""
        y, state = self.mixer(self.norm_mixer(x), state, cu_seqlens, return_state)
        x = x + y
        if self.mlp is not None and self.norm_mlp is not None:
            x = x + self.mlp(self.norm_mlp(x))
        return x, state
