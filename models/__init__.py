"""Models: build one from a configuration, load a trained one, and the state it keeps between calls."""

from .config import ConfigError, ModelConfig
from .lm import MemoryLM, Output, build, load, stream
from .state import State, load_state

__all__ = ["ConfigError", "MemoryLM", "ModelConfig", "Output", "State", "build", "load", "load_state", "stream"]
