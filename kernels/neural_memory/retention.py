"""What a retention makes of D, the matrix in which writes accumulate, once a chunk: W from it, and where it goes on.

All but ``at_start`` take matrices [..., in, out] of D where the chunk began (``start``). The definitions are those of
:class:`MemorySpec`: lq scales D by a factor of the chunk's start, kl reads W = in · softmax(D) plus how far D has moved
since, and the other retentions read D itself.
"""

from math import log

from torch import Tensor

from .spec import RETENTION_EPS, MemorySpec


def _powers(x: Tensor, spec: MemorySpec) -> Tensor:
    """Σ |x|^q of each matrix, [..., 1, 1]."""
    return x.abs().pow(spec.lq_power).sum((-2, -1), keepdim=True) + RETENTION_EPS


def at_start(weights: Tensor, spec: MemorySpec) -> Tensor:
    """D at a sequence's start, from W_0 as it is given."""
    return settle(weights, weights, spec) if spec.retention == "kl" else weights


def weights_of(start: Tensor, spec: MemorySpec) -> Tensor:
    """W where a chunk begins: where gradients are taken."""
    if spec.retention == "lq":
        return start * factor_of(start, spec)
    return start.softmax(-2) * start.shape[-2] if spec.retention == "kl" else start


def factor_of(start: Tensor, spec: MemorySpec) -> Tensor:
    """lq's r = ‖D‖_q^(2−q), [..., 1, 1]."""
    return _powers(start, spec).pow((2.0 - spec.lq_power) / spec.lq_power)


def settle(dual: Tensor, start: Tensor, spec: MemorySpec) -> Tensor:
    """D with which the next chunk begins, from D at the end of this one."""
    if spec.retention == "kl":
        return dual.log_softmax(-2) + log(dual.shape[-2])
    if spec.retention == "norm":
        now, first = (x.square().sum(-2, keepdim=True) + RETENTION_EPS for x in (dual, start))
        return dual * (first / now).sqrt()
    return dual
