"""One step of any memory of the space, in plain differentiable torch: what ``chunked.py`` is to those it covers.

D is what writes accumulate in (``retention.py``), U is D where the chunk began, F(U) the weights there; x_i and δ_i of
``networks.py``, for the keys of the step and, with a window of c, the c − 1 before it, all at F(U). With L_a, L_η, A, E
of ``gates.py`` and Γ[t,i] = θ_t γ_i for t − c < i ≤ t, else 0:

    P = L_η Γ      Λ = L_a P      f = L_a E
    D_t = A_t D + f_t S − Σ_i Λ[t,i] x_iᵀ δ_i      S_t = E_t S − Σ_i P[t,i] x_iᵀ δ_i

With muon D_t = A_t D, and after the step's last token D += NS(S). Reads are linear in D_t, so none needs it per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import networks
from .retention import factor_of, settle, weights_of
from .spec import MemorySpec

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315, 1e-7  # a, b, c and ε of ``kernels.newton_schulz``


@dataclass
class Tokens:
    """The tokens of one step of M memories, n slots each: q, k, v [M, n, ·], gates [M, n] (None where there are none).

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


def _decay(log_gate: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """L [M, n, n] and the products from the step's start [M, n]."""
    total = log_gate.cumsum(-1)
    # Zero above the diagonal before exp: the difference is positive there and exp could overflow.
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp() * lower, total.exp()


@dataclass
class _Coefficients:
    """A, f, E [M, n] and Λ, P [M, n, c − 1 + n]; f and E are None for the rule gd."""

    retain: Tensor
    carry: Tensor | None
    inertia: Tensor | None
    write: Tensor
    momentum_write: Tensor


def _fit(t: Tokens, gamma: Tensor | None, spec: MemorySpec) -> Tensor:
    """Γ [M, n, c − 1 + n]; γ of the halo and the step [M, c − 1 + n]."""
    if gamma is None:
        return torch.diag_embed(t.step)
    slots, halo = t.step.shape[1], spec.window - 1
    place = torch.arange(-halo, slots, device=t.step.device).expand(len(t.step), -1)
    if t.valid is not None:  # empty slots come first where a sequence goes on inside a step: none lie in between
        place = place + pad((~t.valid).cumprod(-1).sum(-1, keepdim=True).expand(-1, halo), (0, slots))
    distance = place[:, halo:, None] - place[:, None, :]
    near = (distance >= 0) & (distance < spec.window)
    return t.step.unsqueeze(-1) * gamma.unsqueeze(-2) * near


def _coefficients(t: Tokens, gamma: Tensor | None, spec: MemorySpec) -> _Coefficients:
    m, n = t.step.shape
    lower = torch.ones(n, n, dtype=t.step.dtype, device=t.step.device).tril()
    ones = torch.ones_like(t.step)
    decay, retain = (lower.expand(m, n, n), ones) if t.log_retain is None else _decay(t.log_retain, lower)
    fit = _fit(t, gamma, spec)
    if spec.rule == "gd":
        return _Coefficients(retain, None, None, torch.bmm(decay, fit), fit)
    momentum = (lower.expand(m, n, n), ones) if t.log_momentum is None else _decay(t.log_momentum, lower)
    momentum_write = torch.bmm(momentum[0], fit)
    adds = decay if t.valid is None else decay * t.valid.unsqueeze(-2)  # an empty slot does not add S to D
    carry = (adds * momentum[1].unsqueeze(-2)).sum(-1)
    return _Coefficients(retain, carry, momentum[1], torch.bmm(adds, momentum_write), momentum_write)


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """NS of x [M, in, out] in its own dtype; see :func:`palimpsest.kernels.newton_schulz`."""
    a, b, c, eps = NEWTON_SCHULZ
    y = x.mT if x.shape[1] > x.shape[2] else x
    y = y * torch.rsqrt(y.square().sum((1, 2), keepdim=True) + eps**2)
    for _ in range(steps):
        square = torch.bmm(y, y.mT)
        y = a * y + torch.bmm(b * square + c * torch.bmm(square, square), y)
    return y.mT if x.shape[1] > x.shape[2] else y


def _read(
    t: Tokens, dual: list[Tensor], c: Carry, by: _Coefficients, x: list[Tensor], d: list[Tensor], norm: Tensor | None,
    start: list[Tensor], spec: MemorySpec,
) -> Tensor:  # fmt: skip
    """M(q_t; W_t) for every token."""
    retain, carry, write = by.retain.unsqueeze(-1), by.carry, by.write
    if not spec.read_after_write:  # one token late
        retain, write = pad(retain[:, :-1], (0, 0, 1, 0), value=1.0), pad(write[:, :-1], (0, 0, 1, 0))
        carry = None if carry is None else pad(carry[:, :-1], (1, 0))

    def product(i: int, hidden: Tensor) -> Tensor:
        out = torch.bmm(hidden * retain, dual[i])
        if not spec.orthogonal:
            out = torch.baddbmm(out, write * torch.bmm(hidden, x[i].mT), d[i], alpha=-1.0)
            if carry is not None:
                out = torch.baddbmm(out, hidden * carry.unsqueeze(-1), c.momentum[i])
        if spec.retention == "lq":
            return out * factor_of(c.anchor[i], spec)
        return torch.baddbmm(out, hidden, start[i] - c.anchor[i]) if spec.retention == "kl" else out

    return networks.forward(t.q, product, norm, spec)


def _write(
    t: Tokens, dual: list[Tensor], c: Carry, by: _Coefficients, x: list[Tensor], d: list[Tensor], spec: MemorySpec
) -> tuple[list[Tensor], list[Tensor]]:
    """D and S after the step's last token, orthogonalised where it completes the step."""
    duals, momentum = [], []
    write, momentum_write = by.write[:, -1, :, None], by.momentum_write[:, -1, :, None]
    for i, held in enumerate(dual):
        new = held * by.retain[:, -1, None, None]
        if not spec.orthogonal:
            new = torch.baddbmm(new, (x[i] * write).mT, d[i], alpha=-1.0)
        if by.carry is not None and by.inertia is not None:
            s = c.momentum[i]
            if not spec.orthogonal:
                new = new + s * by.carry[:, -1, None, None]
            s = torch.baddbmm(s * by.inertia[:, -1, None, None], (x[i] * momentum_write).mT, d[i], alpha=-1.0)
            if spec.orthogonal and t.turned is not False:
                new = _choose(t.turned, new + newton_schulz(s, spec.ns_steps), new)
                s = _choose(t.turned, torch.zeros_like(s), s) if spec.rule == "muon_gd" else s
            momentum.append(s)
        duals.append(new)
    return duals, momentum


def _last(joined: Tensor, t: Tokens, halo: int) -> Tensor:
    """The last ``halo`` tokens of [halo ‖ slots], [M, halo + n, ...], of which empty slots are none."""
    if t.valid is None:
        return joined[:, joined.shape[1] - halo :]
    empty = (~t.valid).cumprod(-1).sum(-1, keepdim=True)
    place = t.valid.sum(-1, keepdim=True) + torch.arange(halo, device=joined.device)
    place = place + empty * (place >= halo)
    return joined[torch.arange(len(joined), device=joined.device)[:, None], place]


def step_forward(t: Tokens, c: Carry, norm: Tensor | None, spec: MemorySpec) -> tuple[Tensor, Carry]:
    """Reads [M, n, out] of a step's tokens, and what goes on after it; norm [M, 1, out]."""
    joined = [t.k, t.v, *(g for g in (t.gamma, t.delta) if g is not None)]
    halo = list(c.halo)
    if spec.window > 1:
        joined = [torch.cat([old, new], 1) for old, new in zip(c.halo, joined, strict=True)]
        halo = [_last(x, t, spec.window - 1) for x in joined]
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
