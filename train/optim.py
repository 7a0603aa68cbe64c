"""AdamW with its decay groups, the learning-rate schedules, and the gradient's norm.

Weight decay pulls a weight towards zero. That is wanted of a matrix that multiplies activations, and of nothing else:
the ``weight`` of ``nn.Linear`` and ``nn.Embedding`` decays (a tied embedding is the head's matrix); norms' scales,
biases, short convolutions, gates' ``A_log`` and offsets, persistent tokens and a memory's initial weights W_0 do not
(zero is no neutral value for any of them: a W_0 at zero is a memory that cannot learn).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SCHEDULES = ("cosine", "wsd", "constant")


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(decaying, other) trainable parameters by name, each shared parameter once.

    A parameter decays when any module that holds it is an ``nn.Linear`` or ``nn.Embedding`` with it as ``weight``.
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decaying = {name: p for name, p in trainable.items() if id(p) in matrices}
    return decaying, {name: p for name, p in trainable.items() if name not in decaying}


def adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW over :func:`decay_groups`: one pass over each parameter.

    Called after the model is spread over processes, for sharding replaces its parameters.
    """
    decaying, others = decay_groups(model)
    groups = [
        {"params": list(decaying.values()), "weight_decay": weight_decay},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(
    step: int,
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    schedule: str,
    min_ratio: float,
    decay_fraction: float = 0.2,
) -> float:
    """The learning rate of update ``step`` (1 … ``steps``): a pure function, so that resuming needs no scheduler state.

    Linear warm-up reaches ``peak`` at update ``warmup_steps``. Then
    ``cosine``: peak · (r + (1 − r)(1 + cos π x)/2), x from 0 to 1 at the last update, r = ``min_ratio``;
    ``wsd`` (warm-up, stable, decay): peak until the last ``decay_fraction`` of the updates, then linear to r · peak;
    ``constant``: peak.

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule was {schedule!r}; it must be one of {list(SCHEDULES)}")
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "cosine":
        x = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * x)))
    if schedule == "wsd":
        length = max(1, round(decay_fraction * steps))
        x = min(1.0, max(0.0, (step - (steps - length)) / length))
        return peak * (1 - (1 - min_ratio) * x)
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use ``rate`` in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most ``limit`` (None: leave them).

    Returns:
        The norm before clipping, a scalar that is whole and equal in every process also when gradients are sharded.
        It is not finite when any gradient is not; the gradients are then of no use.
    """
    owned = [p for p in parameters if p.grad is not None]
    norm = _whole(torch.nn.utils.get_total_norm([p.grad for p in owned if p.grad is not None]))
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(owned, limit, norm)
    return norm


def all_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether no parameter holds an inf or NaN (or a number whose square is one); the same in every process."""
    norm = torch.nn.utils.get_total_norm([p.detach() for p in parameters])
    return bool(torch.isfinite(_whole(norm)))


def _whole(norm: Tensor) -> Tensor:
    """A norm of sharded tensors, summed over the processes."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
