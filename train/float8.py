"""Matrix products of linear layers in 8-bit floating point, by torchao, on GPUs that multiply them.

The inputs, weights and output gradients of each linear layer are scaled and rounded to float8 just before a product
(Micikevicius et al., FP8 Formats for Deep Learning, 2022, section 3); parameters and optimizer state stay float32, and
everything else is as with bf16.
"""

import logging

import torch
from torch import nn

from ..models.config import ConfigError

logger = logging.getLogger("palimpsest.train")

CAPABILITY = (8, 9)
"""The first with float8 tensor cores: Ada; Hopper is (9, 0)."""
MULTIPLE = 16
"""What both sizes of a float8 product must be multiples of (cuBLAS)."""


def fits(module: nn.Module) -> bool:
    """Whether a layer's products can be done in float8."""
    return isinstance(module, nn.Linear) and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)


def use_float8(blocks: nn.ModuleList, device: torch.device) -> int:
    """Have every linear layer in ``blocks`` that :func:`fits` compute in float8. Returns how many.

    Raises:
        ConfigError: without such a GPU, without torchao, or for blocks without such a layer; names what is missing.
    """
    wants = "train.precision was 'fp8'; it needs"
    if device.type != "cuda":
        raise ConfigError(f"{wants} a GPU of compute capability 8.9 or more, and this run is on {device.type}")
    if (there := torch.cuda.get_device_capability(device)) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"{wants} a GPU of compute capability 8.9 or more, and {name} has {there[0]}.{there[1]}")
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise ConfigError(f"{wants} torchao: pip install 'palimpsest[fp8]' ({error})") from None
    count = sum(fits(module) for module in blocks.modules())
    if not count:
        raise ConfigError(f"{wants} a linear layer whose sizes are multiples of {MULTIPLE}, and this model has none")
    convert_to_float8_training(blocks, module_filter_fn=lambda module, name: fits(module))
    logger.info("%d linear layers compute in float8", count)
    return count
