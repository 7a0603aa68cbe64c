"""The stores of chunks, by configuration."""

from typing import Literal

from ..config import ModelConfig
from ..mixer_config import ChunkMemory
from .bank_store import BankedStore
from .chunk_store import ChunkStore
from .cut_store import CutStore


def make_store(
    model: ModelConfig,
    mixer: ChunkMemory,
    read: Literal["two_level", "union"],
    kv: tuple[int, int],
    choosing: tuple[int, int],
) -> ChunkStore:
    """A store: with a bank, with chunks that are cut at surprises, or with all chunks of one length; see
    :class:`ChunkStore` for the arguments."""
    if mixer.bank is not None:
        return BankedStore(model, mixer, read, kv, choosing, mixer.bank)
    if mixer.cut is not None:
        return CutStore(model, mixer, read, kv, choosing, mixer.cut)
    return ChunkStore(model, mixer, read, kv, choosing)
