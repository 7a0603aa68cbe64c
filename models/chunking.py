"""A trained model at other chunk sizes: between two steps of its memory's anchor, what was and what is served."""

import copy
from collections.abc import Iterator

from .lm import MemoryLM
from .mixers.mixer import Mixer


def _memories(model: MemoryLM) -> Iterator[Mixer]:
    for module in model.modules():
        if isinstance(module, Mixer) and module.inner_chunk is not None:
            yield module


def chunk_sizes(model: MemoryLM) -> list[int]:
    """Chunk sizes of the model's neural memories, ascending; empty for a model without."""
    return sorted({memory.inner_chunk for memory in _memories(model) if memory.inner_chunk is not None})


def at_chunk_size(model: MemoryLM, size: int) -> MemoryLM:
    """The same model, parameters shared, whose neural memories take their gradients chunk by chunk of ``size`` tokens.

    The gates stay those of the model: a token's step is as large as before, so that larger chunks move the memory
    further at once. Another size is another function of the tokens: a state says which it belongs to, and one made at
    one size is refused at another. Of a TNT layer it is the local memory that changes.

    Raises:
        ValueError: for a size below 1, one that a memory cannot have, or a model without neural memory.
    """
    if size < 1:
        raise ValueError(f"chunk size was {size}; it must be at least 1")
    if not chunk_sizes(model):
        raise ValueError(f"chunk size was {size}; it must be None for a model without a neural memory")
    shared = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    other = copy.deepcopy(model, shared)
    for memory in _memories(other):
        memory.rechunk(size)
    if chunk_sizes(model) != [size]:
        other.fingerprint = f"{model.fingerprint}@{size}"
    return other
