"""One step of any memory of the space, in plain differentiable torch: what ``chunked.py`` is to those it covers.

D is what writes accumulate in (``retention.py``), U is D where the chunk began, F(U) the weights there; x_i and δ_i of
``networks.py``, for the keys of the step and, with a window of c, the c − 1 before it, all at F(U). What these add to
D_t and S_t is ``coefficients.py``'s; with muon D_t = A_t D, and after the step's last token D += NS(S). Reads are
linear in D_t, so none needs it per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import networks
from .channels import ChannelCoefficients
from .coefficients import Coefficients, HeadCoefficients
from .retention import factor_of, settle, weights_of
from .spec import MemorySpec

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315, 1e-7  # a, b, c and ε of ``kernels.newton_schulz``


@dataclass
class Tokens:
    """The tokens of one step of M memories, n slots each: q, k, v [M, n, ·], gates [M, n] (None where there are none).

    Of channels θ, log a and log η are [M, n, out].
    ``valid`` [M, n] is false in slots that hold no token; all else is zero there. ``turned`` and ``ended``: whether the
    step, and the chunk, are complete; for all memories at once, or bool [M, 1, 1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    step: Tensor
    log_retain: Tensor | None
    log_momentum: Tensor | None
    gamma: Tensor | None
    delta: Tensor | None
    valid: Tensor | None
    turned: bool | Tensor
    ended: bool | Tensor


@dataclass
class Carry:
    """What goes from step to step: W as it is read, S, U of every matrix [M, in, out], and the window's last tokens
    (k, v [M, c − 1, ·], γ, δ [M, c − 1]; as ``halo_names`` has them)."""

    weights: list[Tensor]
    momentum: list[Tensor]
    anchor: list[Tensor]
    halo: list[Tensor]

    def flat(self) -> list[Tensor]:
        """All tensors, in the order of ``state_names``."""
        return [*self.weights, *self.momentum, *self.anchor, *self.halo]

    @classmethod
    def of(cls, flat: Sequence[Tensor], spec: MemorySpec) -> "Carry":
        """The inverse of :meth:`flat`."""
        n = spec.layers
        rest = list(flat[n:])
        momentum = [rest.pop(0) for _ in range(n)] if spec.has_momentum else []
        return cls(list(flat[:n]), momentum, rest[:n], rest[n:])


def _choose(condition: bool | Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where the condition holds, for all memories or by memory."""
    if isinstance(condition, Tensor):
        return torch.where(condition, new, old)
    return new if condition else old


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """NS of x [M, in, out] in its own dtype; see :func:`palimpsest.kernels.newton_schulz`."""
    a, b, c, eps = NEWTON_SCHULZ
    y = x.mT if x.shape[1] > x.shape[2] else x
    y = y * torch.rsqrt(y.square().sum((1, 2), keepdim=True) + eps**2)
    for _ in range(steps):
        square = torch.bmm(y, y.mT)
        y = a * y + torch.bmm(b * square + c * torch.bmm(square, square), y)
    return y.mT if x.shape[1] > x.shape[2] else y


def _coefficients(t: Tokens, gamma: Tensor | None, spec: MemorySpec) -> list[Coefficients]:
    """Of every matrix; γ of the keys [M, c − 1 + n]."""
    gates = t.step, t.log_retain, t.log_momentum
    if spec.gates == "head":
        return [HeadCoefficients.of(*gates, gamma, t.valid, spec)] * spec.layers
    last = ChannelCoefficients.of(*gates, gamma, t.valid, spec)
    if spec.layers == 1:
        return [last]
    retain, momentum = (None if gate is None else gate.mean(-1) for gate in gates[1:])
    before = HeadCoefficients.of(t.step.mean(-1), retain, momentum, gamma, t.valid, spec)
    return [last if i == spec.last else before for i in range(spec.layers)]


def _read(
    t: Tokens, dual: list[Tensor], c: Carry, by: list[Coefficients], x: list[Tensor], d: list[Tensor],
    norm: Tensor | None, start: list[Tensor], spec: MemorySpec,
) -> Tensor:  # fmt: skip
    """M(q_t; W_t) for every token."""

    def product(i: int, hidden: Tensor) -> Tensor:
        out = by[i].read(hidden, dual[i], c.momentum[i] if c.momentum else None, x[i], d[i])
        if spec.retention == "lq":
            return out * factor_of(c.anchor[i], spec)
        return torch.baddbmm(out, hidden, start[i] - c.anchor[i]) if spec.retention == "kl" else out

    return networks.forward(t.q, product, norm, spec)


def _write(
    t: Tokens, dual: list[Tensor], c: Carry, by: list[Coefficients], x: list[Tensor], d: list[Tensor], spec: MemorySpec
) -> tuple[list[Tensor], list[Tensor]]:
    """D and S after the step's last token, orthogonalised where it completes the step."""
    duals, momentum = [], []
    for i, held in enumerate(dual):
        new, s = by[i].update(held, c.momentum[i] if c.momentum else None, x[i], d[i])
        if s is not None:
            if spec.orthogonal and t.turned is not False:
                new = _choose(t.turned, new + newton_schulz(s, spec.ns_steps), new)
                s = _choose(t.turned, torch.zeros_like(s), s) if spec.rule == "muon_gd" else s
            momentum.append(s)
        duals.append(new)
    return duals, momentum


def _joined(halo: Tensor, slots: Tensor, valid: Tensor | None) -> Tensor:
    """[halo ‖ slots], [M, c − 1 + n, ...]; slots without a token before the first one come before the halo, so that a
    window's tokens lie side by side."""
    x = torch.cat([halo, slots], 1)
    if valid is None:
        return x
    empty, place = _empty(valid), torch.arange(x.shape[1], device=x.device)
    place = torch.where(place < empty, place + halo.shape[1], place - empty * (place < empty + halo.shape[1]))
    return x[torch.arange(len(x), device=x.device)[:, None], place]


def _empty(valid: Tensor) -> Tensor:
    """How many slots hold no token before the first that does, [M, 1]: none do so between two that do."""
    return (~valid).cumprod(-1).sum(-1, keepdim=True)


def _last(joined: Tensor, halo: int, valid: Tensor | None) -> Tensor:
    """The last ``halo`` tokens of :func:`_joined`."""
    if valid is None:
        return joined[:, joined.shape[1] - halo :]
    place = _empty(valid) + valid.sum(-1, keepdim=True) + torch.arange(halo, device=joined.device)
    return joined[torch.arange(len(joined), device=joined.device)[:, None], place]


def step_forward(t: Tokens, c: Carry, norm: Tensor | None, spec: MemorySpec) -> tuple[Tensor, Carry]:
    """Reads [M, n, out] of a step's tokens, and what goes on after it; norm [M, 1, out]."""
    joined = [t.k, t.v, *(g for g in (t.gamma, t.delta) if g is not None)]
    halo = list(c.halo)
    if spec.window > 1:
        joined = [_joined(old, new, t.valid) for old, new in zip(c.halo, joined, strict=True)]
        halo = [_last(x, spec.window - 1, t.valid) for x in joined]
    k, v = joined[:2]
    start = [weights_of(u, spec) for u in c.anchor]
    x, d = networks.inner_pass(k, v, joined[-1] if spec.bias == "huber" else None, start, norm, spec)
    by = _coefficients(t, joined[2] if spec.window > 1 else None, spec)
    dual = c.weights
    if spec.retention == "lq":
        dual = [w / factor_of(u, spec) for w, u in zip(dual, c.anchor, strict=True)]
    elif spec.retention == "kl":
        dual = [w - f + u for w, f, u in zip(dual, start, c.anchor, strict=True)]
    out = _read(t, dual, c, by, x, d, norm, start, spec)
    dual, momentum = _write(t, dual, c, by, x, d, spec)
    if t.ended is True:
        anchor = [settle(new, u, spec) for new, u in zip(dual, c.anchor, strict=True)]
        return out, Carry([weights_of(u, spec) for u in anchor], momentum, anchor, halo)
    weights = dual
    if spec.retention == "lq":
        weights = [new * factor_of(u, spec) for new, u in zip(dual, c.anchor, strict=True)]
    elif spec.retention == "kl":
        weights = [new + f - u for new, f, u in zip(dual, start, c.anchor, strict=True)]
    if t.ended is False:
        return out, Carry(weights, momentum, c.anchor, halo)
    anchor = [torch.where(t.ended, settle(new, u, spec), u) for new, u in zip(dual, c.anchor, strict=True)]
    weights = [torch.where(t.ended, weights_of(u, spec), w) for u, w in zip(anchor, weights, strict=True)]
    return out, Carry(weights, momentum, anchor, halo)
