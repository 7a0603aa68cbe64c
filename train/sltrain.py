"""SLTrain: weights trained as low rank plus sparse (Han et al., 2024, arXiv 2406.02214), put onto a model from outside.

W = α/r · B A + S for W [m, n], B [m, r], A [r, n], S with round(δ m n) entries at places that are drawn once. Only B, A
and the entries are parameters, and so only they have gradients that stay, and optimizer state. W itself is formed each
time that it is read, in float32, and lives as long as a forward and its backward need it.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.config import ConfigError
from ..models.layers import full_precision
from .optim_config import SLTrainConfig
from .optimizers.subspace import key_of

logger = logging.getLogger("palimpsest.train")


class SparseLowRank(nn.Module):
    """A linear map x Wᵀ (+ b) whose ``weight`` is α/r · B A + S.

    Drawn as in the paper's section 3: A Kaiming-uniform, B zero, S's entries uniform within ±1/√n, their places uniform
    without repetition; from a generator of ``key``, on the CPU. The places are no part of a checkpoint: the key has
    them.
    """

    support: Tensor

    def __init__(self, linear: nn.Linear, rank: int, density: float, alpha: float, key: int):
        super().__init__()
        rows, columns = linear.weight.shape
        draw, like = torch.Generator().manual_seed(key), linear.weight
        bound, count = 1 / math.sqrt(columns), max(1, round(density * rows * columns))
        places = torch.randperm(rows * columns, generator=draw)[:count].sort().values
        self.in_features, self.out_features, self.scale = columns, rows, alpha / rank
        self.register_buffer("support", places.to(like.device), persistent=False)
        self.B = nn.Parameter(like.new_zeros(rows, rank))
        self.A = nn.Parameter(_uniform((rank, columns), bound, draw, like))
        self.values = nn.Parameter(_uniform((count,), bound, draw, like))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """W [m, n]."""
        return self.dense(self.B, self.A, self.values)

    def dense(self, left: Tensor, right: Tensor, values: Tensor) -> Tensor:
        """W of any B, A and entries, on their device."""
        with full_precision(left.device):
            product = (left @ right).mul(self.scale)
        return product.flatten().index_add(0, self.support.to(values.device), values).view_as(product)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] → [..., m]."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        rank, count = self.A.shape[0], self.values.numel()
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={rank}, entries={count}"


def _uniform(shape: tuple[int, ...], bound: float, draw: torch.Generator, like: Tensor) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=draw).to(like)


def apply(model: nn.Module, matrices: Mapping[str, Any], settings: SLTrainConfig, seed: int) -> None:
    """Put :class:`SparseLowRank` in the place of linear modules, before the model is spread over processes.

    Args:
        matrices: names of the weights (``blocks.0.mlp.down.weight``) to be replaced; of these, the ones that would have
            no fewer numbers to train stay.

    Raises:
        ConfigError: when none is left to be replaced.
    """
    replaced, before, after = 0, 0, 0
    for name in matrices:
        path = name.removesuffix(".weight")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        rows, columns = linear.weight.shape
        count = settings.rank * (rows + columns) + max(1, round(settings.density * rows * columns))
        if count >= rows * columns:
            continue
        module = SparseLowRank(linear, settings.rank, settings.density, settings.alpha, key_of(seed, 0, path))
        above, _, last = path.rpartition(".")
        setattr(model.get_submodule(above), last, module)
        replaced, before, after = replaced + 1, before + rows * columns, after + count
    if not replaced:
        raise ConfigError(
            f"train.sltrain.rank was {settings.rank} with density {settings.density}; they must be small enough for "
            f"rank (m + n) + density m n to be less than m n of one of the {len(matrices)} hidden matrices"
        )
    left = len(matrices) - replaced
    line = (
        "sltrain: %d matrices as low rank plus sparse, %d numbers instead of %d; %d too small for that stay as they are"
    )
    logger.info(line, replaced, after, before, left)


def dense(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Whole weights by name (of a model with or without SLTrain) as those of the ordinary model: W for B, A and S."""
    merged = dict(weights)
    for path, module in model.named_modules():
        if isinstance(module, SparseLowRank) and f"{path}.B" in merged:  # only the first process has whole weights
            parts = [merged.pop(f"{path}.{part}") for part in ("B", "A", "values")]
            merged[f"{path}.weight"] = module.dense(*parts)
    return merged
