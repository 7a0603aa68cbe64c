"""The optimizer of a run: what decays, groups by rule, which matrices a method takes; and the gradient's norm.

Weight decay pulls a weight towards zero. That is wanted of a matrix that multiplies activations, and of nothing else:
the ``weight`` of ``nn.Linear`` and ``nn.Embedding`` decays (a tied embedding is the head's matrix); norms' scales,
biases, short convolutions, gates' ``A_log`` and offsets, persistent tokens and a memory's initial weights W_0 do not
(zero is no neutral value for any of them: a W_0 at zero is a memory that cannot learn).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.config import ConfigError
from .optim_config import DENSE, GroupRule
from .optimizers.combined import Combined
from .optimizers.fira import Fira
from .optimizers.frugal import Frugal
from .optimizers.galore import GaLore
from .optimizers.spam import Spam
from .sltrain import SparseLowRank

if TYPE_CHECKING:
    from .config import TrainConfig

logger = logging.getLogger("palimpsest.train")

HEADS = ("head.weight", "*lm_head.weight")
GATES = ("*.gates.*", "*.router.*", "*.gate.weight")
"""Names of linear maps whose outputs are not features: the vocabulary's logits; gates, and choices among memories."""


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by the names that they have in the model alone, each shared one once."""
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(decaying, other) trainable parameters by name, each shared parameter once.

    A parameter decays when any module that holds it is an ``nn.Linear`` or ``nn.Embedding`` with it as ``weight``, or
    makes its ``weight`` of it (SLTrain's B, A and S).
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    parts = (part for m in model.modules() if isinstance(m, SparseLowRank) for part in (m.B, m.A, m.values))
    matrices |= {id(part) for part in parts}
    trainable = _trainable(model)
    decaying = {name: p for name, p in trainable.items() if id(p) in matrices}
    return decaying, {name: p for name, p in trainable.items() if name not in decaying}


def outer_matrices(model: nn.Module) -> set[int]:
    """The ids of the parameters between tokens and features: embeddings, and the output head."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return tables | {id(p) for name, p in _trainable(model).items() if _matches(name, HEADS)}


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable matrices that map features to features: weights of ``nn.Linear`` but the head's and the gates'."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - outer_matrices(model)
    return {name: p for name, p in _trainable(model).items() if id(p) in linear and not _matches(name, GATES)}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def rules_of(names: Iterable[str], rules: Sequence[GroupRule]) -> dict[str, GroupRule]:
    """The first rule that matches each name, for names that one matches.

    Raises:
        ConfigError: naming a rule that is not the first match of any name.
    """
    names = list(names)
    found: dict[str, int] = {}
    for number, rule in enumerate(rules):
        fitting = [name for name in names if fnmatchcase(name, rule.match)]
        mine = [name for name in fitting if name not in found]
        if not mine:
            key, earlier = f"train.groups.{number}.match was {rule.match!r}", sorted({found[n] for n in fitting})
            must = f"a name that rule {earlier} before it leaves" if fitting else f"a parameter's name, like {names[0]}"
            raise ConfigError(f"{key}, which matches nothing; it must match {must}")
        found |= dict.fromkeys(mine, number)
    return {name: rules[number] for name, number in found.items()}


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    rules: Sequence[GroupRule] = (),
    apart: Mapping[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(groups of ``apart``, groups of the rest), parameters of one learning rate and weight decay in one group.

    ``lr_scale`` of a group is what :func:`set_learning_rate` multiplies the rate by.
    """
    decaying, others = decay_groups(model)
    ruled = rules_of([*decaying, *others], rules)
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in [*decaying.items(), *others.items()]:
        rule = ruled.get(name, GroupRule(match="*"))
        default = weight_decay if name in decaying else 0.0
        decay = default if rule.weight_decay is None else rule.weight_decay
        groups.setdefault((name in (apart or {}), decay, rule.lr_scale), []).append(parameter)
    made: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for (is_apart, decay, scale), parameters in groups.items():
        group = {"params": parameters, "weight_decay": decay, "lr": lr * scale, "lr_scale": scale}
        made[0 if is_apart else 1].append(group)
    return made


def adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW over :func:`decay_groups`: one pass over each parameter.

    Called after the model is spread over processes, for sharding replaces its parameters.
    """
    _, groups = parameter_groups(model, lr=lr, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def make(model: nn.Module, settings: "TrainConfig", seed: int = 0) -> torch.optim.Optimizer:
    """The optimizer that ``train.optimizer`` names, over the trainable parameters of a model.

    Called after the model is spread over processes, for sharding replaces its parameters.

    Args:
        seed: the run's, for what an optimizer draws.

    Raises:
        ConfigError: for a rule that matches nothing, or a method that finds no matrix it could take.
    """
    chosen = settings.optimizer
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    apart = _taken(model, settings) if chosen in DENSE else {}
    decay = settings.weight_decay
    own, rest = parameter_groups(model, lr=settings.lr, weight_decay=decay, rules=settings.groups, apart=apart)
    if settings.spam is not None:
        return Spam(rest, **common, **settings.spam.model_dump())
    others = torch.optim.AdamW(rest, **common, fused=True) if rest else None
    if not own:
        assert others is not None
        return others
    method = _method(own, settings, common, seed, {p: name for name, p in apart.items()})
    sizes = [sum(p.numel() for group in groups for p in group["params"]) for groups in (own, rest)]
    logger.info("%s updates %d matrices with %d parameters; AdamW the other %d", chosen, len(apart), *sizes)
    return Combined([method] if others is None else [method, others])


def _taken(model: nn.Module, settings: "TrainConfig") -> dict[str, nn.Parameter]:
    """The hidden matrices that the chosen method can take."""
    found = hidden_matrices(model)
    if not found:
        raise ConfigError(f"train.optimizer was {settings.optimizer!r}; it must be adamw or spam without linear maps")
    told = settings.galore or settings.fira
    if told is None:
        return found
    fitting = {name: p for name, p in found.items() if min(p.shape) > told.rank}
    if not fitting:
        most = max(min(p.shape) for p in found.values())
        key = f"train.{settings.optimizer}.rank"
        raise ConfigError(
            f"{key} was {told.rank}; it must be less than the shorter side of some matrix, at most {most - 1}"
        )
    return fitting


def _method(
    groups: list[dict[str, Any]],
    settings: "TrainConfig",
    common: dict[str, Any],
    seed: int,
    names: Mapping[Tensor, str],
) -> torch.optim.Optimizer:
    if settings.muon is not None:
        told = settings.muon.model_dump()
        adjust = told.pop("adjust_lr")
        return torch.optim.Muon(groups, lr=settings.lr, adjust_lr_fn=adjust, **told)
    if settings.galore is not None:
        return GaLore(groups, **common, **settings.galore.model_dump())
    if settings.fira is not None:
        return Fira(groups, **common, **settings.fira.model_dump())
    assert settings.frugal is not None
    told = settings.frugal.model_dump()
    return Frugal(groups, **common, space=told.pop("subspace"), seed=seed, names=names, **told)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state; of sharded ones, this process's part."""
    tensors = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    local = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    return sum(x.numel() * x.element_size() for x in local)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use ``rate`` in every group, times its ``lr_scale`` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


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
