"""Which blocks are run again in the backward pass instead of keeping their activations."""

import logging
from collections.abc import Sequence

from .config import ConfigError, RunConfig
from .memory_estimate import Activations, activations

logger = logging.getLogger("palimpsest")


def chosen(config: RunConfig, blocks: int, rows: int, *, gpu: bool) -> tuple[int, ...]:
    """The numbers of the blocks that ``train.activation_checkpointing`` is done with, ascending; () where it is false.

    With ``train.activation_budget`` blocks are taken in the order of what they keep, the one that keeps the most first
    and of equals the earlier, until what is held at most fits (:func:`by_budget`).

    Args:
        blocks: of the model.
        rows: sequences of a micro batch in one process.
        gpu: count what a GPU's kernels keep.

    Raises:
        ConfigError: naming ``train.activation_budget`` where all blocks recomputed take more.
    """
    settings = config.train
    if not settings.activation_checkpointing:
        return ()
    if settings.activation_budget is None:
        return tuple(range(0, blocks, settings.recompute_every))
    if config.model.huggingface is not None:
        was = f"train.activation_budget was {settings.activation_budget}"
        raise ConfigError(f"{was}; it must be null with model.huggingface, whose blocks are not counted")
    found = by_budget(config, rows, round(settings.activation_budget * 2**30), gpu=gpu)
    logger.info(
        "activation checkpointing: %d of %d blocks (%s) are run again; counted on shapes, forward and backward hold "
        "%.3f of at most %g GiB",
        len(found.again),
        blocks,
        named(found.again),
        found.peak / 2**30,
        settings.activation_budget,
    )
    return found.again


def by_budget(config: RunConfig, rows: int, budget: int, *, gpu: bool) -> Activations:
    """The activations with as few blocks run again as hold no more than ``budget`` bytes at a time.

    What is held falls with every block more, so their number is found by halving: each step counts a forward and
    backward on shapes, a second or two for hundreds of millions of parameters.

    Raises:
        ConfigError: where all blocks recomputed take more.
    """

    def count(blocks: int) -> Activations:
        return activations(config.model, config.train, rows, gpu=gpu, again=order[:blocks])

    order: list[int] = []
    whole = count(0)
    if whole.peak <= budget:
        return whole
    order = sorted(range(len(whole.blocks)), key=lambda block: (-whole.blocks[block], block))
    low, found = 0, count(len(order))
    if found.peak > budget:
        raise ConfigError(
            f"train.activation_budget was {budget / 2**30:g}; it must be at least {found.peak / 2**30:.3g} GiB, which "
            f"{rows} x {config.train.seq_len} tokens take with every block recomputed, or train.micro_batch_size less"
        )
    while len(found.again) - low > 1:
        middle = count((low + len(found.again)) // 2)
        if middle.peak <= budget:
            found = middle
        else:
            low = len(middle.again)
    return found


def named(again: Sequence[int]) -> str:
    """Ascending numbers in few words: ``0 to 3, 6``; ``none``."""
    told: list[str] = []
    for number in again:
        if number - 1 not in again:
            told.append(str(number))
        elif number + 1 not in again:
            told[-1] += f" to {number}"
    return ", ".join(told) or "none"
