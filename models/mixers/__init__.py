"""Token mixers, by the ``kind`` of their configuration."""

from collections.abc import Callable
from typing import Any

from ..config import ModelConfig
from ..mixer_config import MixerConfig
from .attention import Attention
from .block_union import BlockUnionAttention
from .hcam import HierarchicalMemory
from .lact import LargeChunkMemory
from .mac import MemoryAsContext
from .mag import MemoryAsGate
from .mal import MemoryAsLayer
from .mixer import LayerState, Mixer
from .mixture import MixtureOfMemories
from .neural_memory import MemoryLayer
from .tnt import ShardedMemory

__all__ = ["MIXERS", "LayerState", "Mixer", "make_mixer"]

MIXERS: dict[str, Callable[[ModelConfig, Any], Mixer]] = {
    "attention": lambda model, mixer: Attention(model, mixer, None, mixer.persistent),
    "window_attention": lambda model, mixer: Attention(model, mixer, mixer.window, mixer.persistent),
    "neural_memory": lambda model, mixer: MemoryLayer(model, mixer.memory),
    "titans_mac": MemoryAsContext,
    "titans_mag": MemoryAsGate,
    "titans_mal": MemoryAsLayer,
    "lact": LargeChunkMemory,
    "tnt": ShardedMemory,
    "mixture": MixtureOfMemories,
    "hcam": HierarchicalMemory,
    "block_union": BlockUnionAttention,
}


def make_mixer(model: ModelConfig, mixer: MixerConfig) -> Mixer:
    """A mixer with fresh weights."""
    return MIXERS[mixer.kind](model, mixer)
