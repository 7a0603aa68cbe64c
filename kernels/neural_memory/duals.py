"""What the Triton kernels carry instead of W where a retention derives it: D, at the borders of a call, and back.

Of lq W = r(U) D, U the anchor; with ρ(U) = (2 − q) |U|^(q−2) U / ‖U‖_q^q the gradient of r is r ρ. Of kl
W = D + F(U) − U; W_0 is settled before the call, and the kernels take F(U) = exp(U − c) with the ``shifts`` c of a
state's columns beside it. For all other retentions that there are kernels for D is W.
"""

from collections.abc import Sequence
from math import log

from torch import Tensor

from .retention import at_start, factor_of, weights_of
from .spec import RETENTION_EPS, MemorySpec


def derives(spec: MemorySpec) -> bool:
    """Whether D is not W."""
    return spec.retention in ("lq", "kl")


def _parts(flat: Sequence[Tensor], spec: MemorySpec) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """W or D, S, and the anchor of every layer, of a state's tensors."""
    n = spec.layers
    return flat[:n], flat[n:-n], flat[-n:]


def _slope(anchor: Tensor, spec: MemorySpec) -> Tensor:
    """ρ(U)."""
    power = anchor.abs().pow(spec.lq_power - 2.0)
    total = (power * anchor.square()).sum((-2, -1), keepdim=True) + RETENTION_EPS
    return (2.0 - spec.lq_power) * power * anchor / total


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each matrix, [..., 1, 1]."""
    return (a * b).sum((-2, -1), keepdim=True)


def _through_weights(anchor: Tensor, grad: Tensor) -> Tensor:
    """The gradient of U from that of kl's F(U)."""
    share = anchor.softmax(-2)
    return share * (grad - _columns(share * grad)) * anchor.shape[-2]


def _columns(x: Tensor) -> Tensor:
    """Sums of each column, [..., 1, out]."""
    return x.sum(-2, keepdim=True)


def start(weights: Sequence[Tensor], spec: MemorySpec) -> list[Tensor]:
    """What a call without a state begins with."""
    return [at_start(w.float(), spec) for w in weights] if spec.retention == "kl" else list(weights)


def start_backward(grads: Sequence[Tensor], weights: Sequence[Tensor], spec: MemorySpec) -> list[Tensor]:
    """Gradients of W_0 from those of what it starts as."""
    if spec.retention != "kl":
        return list(grads)
    return [g - w.float().softmax(-2) * _columns(g) for g, w in zip(grads, weights, strict=True)]


def shifts(state: Sequence[Tensor], spec: MemorySpec) -> list[Tensor]:
    """c of every layer's anchor, [N, H, out]."""
    return [u.logsumexp(-2) - log(u.shape[-2]) for u in _parts(state, spec)[2]]


def enter(state: Sequence[Tensor], spec: MemorySpec) -> list[Tensor]:
    """A state's tensors with D in place of W."""
    if not derives(spec):
        return list(state)
    weights, momentum, anchor = _parts(state, spec)
    if spec.retention == "kl":
        return [*(w - weights_of(u, spec) + u for w, u in zip(weights, anchor, strict=True)), *momentum, *anchor]
    return [*(w / factor_of(u, spec) for w, u in zip(weights, anchor, strict=True)), *momentum, *anchor]


def leave(flat: Sequence[Tensor], spec: MemorySpec) -> list[Tensor]:
    """The inverse of :func:`enter`."""
    if not derives(spec):
        return list(flat)
    duals, momentum, anchor = _parts(flat, spec)
    if spec.retention == "kl":
        return [*(d + weights_of(u, spec) - u for d, u in zip(duals, anchor, strict=True)), *momentum, *anchor]
    return [*(d * factor_of(u, spec) for d, u in zip(duals, anchor, strict=True)), *momentum, *anchor]


def enter_backward(
    grads: Sequence[Tensor], entered: Sequence[Tensor], of_shifts: Sequence[Tensor], spec: MemorySpec
) -> list[Tensor]:
    """Gradients of a state from those of what it ``entered`` as, and of its shifts."""
    if not derives(spec):
        return list(grads)
    of_dual, of_momentum, of_anchor = _parts(grads, spec)
    duals, _, anchor = _parts(entered, spec)
    if spec.retention == "kl":
        every = zip(of_anchor, of_dual, anchor, of_shifts, strict=True)
        found = (x + g - _through_weights(u, g) + u.softmax(-2) * c.unsqueeze(-2) for x, g, u, c in every)
        return [*of_dual, *of_momentum, *found]
    return [
        *(g / factor_of(u, spec) for g, u in zip(of_dual, anchor, strict=True)),
        *of_momentum,
        *(x - _inner(g, d) * _slope(u, spec) for x, g, d, u in zip(of_anchor, of_dual, duals, anchor, strict=True)),
    ]


def leave_backward(grads: Sequence[Tensor], flat: Sequence[Tensor], spec: MemorySpec) -> list[Tensor]:
    """Gradients of D, S and the anchor from those of what they leave a call as."""
    if not derives(spec):
        return list(grads)
    of_weights, of_momentum, of_anchor = _parts(grads, spec)
    duals, _, anchor = _parts(flat, spec)
    if spec.retention == "kl":
        every = zip(of_anchor, of_weights, anchor, strict=True)
        return [*of_weights, *of_momentum, *(x - g + _through_weights(u, g) for x, g, u in every)]
    return [
        *(g * factor_of(u, spec) for g, u in zip(of_weights, anchor, strict=True)),
        *of_momentum,
        *(
            x + _inner(g, d) * factor_of(u, spec) * _slope(u, spec)
            for x, g, d, u in zip(of_anchor, of_weights, duals, anchor, strict=True)
        ),
    ]
