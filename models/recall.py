"""What every memory of a model returns when a token that it has read is asked for again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .lm import MemoryLM


@torch.no_grad()
def recall(model: MemoryLM, tokens: Tensor, marks: Sequence[int]) -> dict[str, Tensor]:
    """For each layer with a memory of keys and values, by ``layer.{i}``: float32 [marks, T], how well the memory, when
    it has been written with the first n of tokens [1, T], answers the key of each token: the cosine of the answer with
    that token's value. Before a token is written, n ≤ t, this is what a memory says that does not know it.

    {} for a model with memory over segments, whose layers read each segment apart.

    Raises:
        ValueError: for more than one row, or marks that are not ascending in [0, T].
    """
    if tokens.shape[0] != 1:
        raise ValueError(f"tokens was of {tokens.shape[0]} rows; it must be one")
    if list(marks) != sorted(marks) or not all(0 <= mark <= tokens.shape[1] for mark in marks):
        raise ValueError(f"marks was {list(marks)}; it must ascend in [0, {tokens.shape[1]}]")
    if model.hmt is not None:
        return {}
    found: dict[str, Tensor] = {}
    handles = []
    for i, block in enumerate(model.blocks):

        def ask(module: nn.Module, args: tuple[Any, ...], layer: int = i) -> None:
            told = module.recall(args[0], marks)  # type: ignore[operator]
            if told is not None:
                found[f"layer.{layer}"] = told

        handles.append(block.mixer.register_forward_pre_hook(ask))  # type: ignore[union-attr]
    try:
        model(tokens, return_state=False, targets=torch.zeros_like(tokens))
    finally:
        for handle in handles:
            handle.remove()
    return found
