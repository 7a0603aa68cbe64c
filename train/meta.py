"""Building a model that no process could hold whole beside its work: on the meta device, sharded, then filled.

A seed's weights are one sequence of draws, parameter after parameter, so a process cannot draw its shards alone without
drawing all that stands before them. They are drawn once, by the first process, in main memory, and every process gets
its shards of them: the weights are those that the seed gives on one process, bit for bit. On devices nobody ever holds
more than its shards; in main memory the first process holds the whole model, and only until it is handed out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ..models import MemoryLM, build
from .config import ConfigError, RunConfig
from .parallel import World


def on_meta(config: RunConfig) -> MemoryLM:
    """The model of a config with parameters that have shapes and no values.

    Raises:
        ConfigError: for a model with values that are not in its state, so that nothing would fill them.
    """
    if config.model.huggingface is not None:
        raise ConfigError("train.meta_init was true; it must be false for a model of Hugging Face, which has buffers")
    with torch.device("meta"):
        return build(config.plain())


def fill(model: nn.Module, config: RunConfig, world: World, prepare: Callable[[MemoryLM], Any]) -> None:
    """Give a sharded model on meta the weights of the config's seed.

    Args:
        model: as ``fully_shard`` left it; every process calls this.
        prepare: what is done to the whole model's fresh weights before they are handed out, in the first process.
    """
    model.to_empty(device=world.device)
    weights: dict[str, Any] = {}
    if world.first:
        torch.manual_seed(config.seed)
        whole = build(config.plain())
        prepare(whole)
        weights = whole.state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
