"""Operations on tensors: pure functions, each with a reference, a plain-torch path and its cost."""

from .neural_memory import MemorySpec, neural_memory, neural_memory_read, neural_memory_state

__all__ = ["MemorySpec", "neural_memory", "neural_memory_read", "neural_memory_state"]
