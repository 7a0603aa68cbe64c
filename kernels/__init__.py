"""Operations on tensors: pure functions, each with a reference, a plain-torch path and its cost."""

# By the name "kernels" transformers, started in a checkout, finds this folder, and takes it for another package.
if __name__ != "kernels":
    from .chunk_attention import ChunkLayout, chunk_attention, select_chunks
    from .cross_entropy import linear_cross_entropy
    from .delta_rule import delta_rule
    from .grouped_linear import grouped_linear
    from .linear_attention import linear_attention
    from .neural_memory import MemorySpec, neural_memory, neural_memory_read, neural_memory_state
    from .newton_schulz import newton_schulz
    from .norm import l2_norm, rms_norm
    from .routing import Routing, balance_loss, combine, dispatch, route, router_z_loss
    from .short_conv import short_conv
    from .window_attention import window_attention

__all__ = [
    "ChunkLayout",
    "MemorySpec",
    "Routing",
    "balance_loss",
    "chunk_attention",
    "combine",
    "delta_rule",
    "dispatch",
    "grouped_linear",
    "l2_norm",
    "linear_attention",
    "linear_cross_entropy",
    "neural_memory",
    "neural_memory_read",
    "neural_memory_state",
    "newton_schulz",
    "rms_norm",
    "route",
    "router_z_loss",
    "select_chunks",
    "short_conv",
    "window_attention",
]
