"""Further losses of a model's layers: whoever wants them opens a place, and the layers put theirs there."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_open: list[dict[str, list[Tensor]]] = []


@contextmanager
def collected() -> Iterator[dict[str, list[Tensor]]]:
    """The losses that layers add while this is open, by name, one per layer. Of nested ones the innermost gets them."""
    found: dict[str, list[Tensor]] = {}
    _open.append(found)
    try:
        yield found
    finally:
        _open.pop()


def add_loss(name: str, value: Tensor) -> None:
    """A scalar to be minimised beside the model's own loss, weighted as it is to count. Nobody may be asking: a layer
    that is called by itself, or again by activation checkpointing."""
    if _open:
        _open[-1].setdefault(name, []).append(value)
