"""What the gates of a step make of its writes, for one matrix: its reads, and D and S after the step.

With L_a, L_η, A, E of ``gates.py`` and Γ[t,i] = θ_t γ_i for t − c < i ≤ t, else 0:

    P = L_η Γ      Λ = L_a P      f = L_a E
    D_t = A_t D + f_t S − Σ_i Λ[t,i] x_iᵀ δ_i      S_t = E_t S − Σ_i P[t,i] x_iᵀ δ_i

x_i and δ_i are of the keys: those of the n slots and, with a window of c, the c − 1 before them in front. With
muon D_t = A_t D. Where every column of a matrix has gates of its own: ``channels.py``.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .spec import MemorySpec


class Coefficients(Protocol):
    """Of one step of M memories."""

    def read(self, hidden: Tensor, dual: Tensor, momentum: Tensor | None, x: Tensor, d: Tensor) -> Tensor:
        """h_t D_t for every slot: h [M, n, in], D and S [M, in, out] before the step, keys' x and δ → [M, n, out]."""

    def update(
        self, dual: Tensor, momentum: Tensor | None, x: Tensor, d: Tensor
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """D and S after the step."""


def _decay(log_gate: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """L [M, n, n] and the products from the step's start [M, n]."""
    total = log_gate.cumsum(-1)
    # Zero above the diagonal before exp: the difference is positive there and exp could overflow.
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp() * lower, total.exp()


def band(slots: int, window: int, like: Tensor) -> Tensor:
    """1 where a slot's window has a key, [n, c − 1 + n]."""
    ones = torch.ones(slots, window - 1 + slots, dtype=like.dtype, device=like.device)
    return ones.tril(window - 1).triu()


@dataclass
class HeadCoefficients:
    """A, f, E [M, n] and Λ, P [M, n, c − 1 + n]; f and E are None for the rule gd. ``late``: token t reads D_{t−1}."""

    retain: Tensor
    carry: Tensor | None
    inertia: Tensor | None
    write: Tensor
    momentum_write: Tensor
    orthogonal: bool
    late: bool

    @classmethod
    def of(
        cls,
        step: Tensor,
        log_retain: Tensor | None,
        log_momentum: Tensor | None,
        gamma: Tensor | None,
        valid: Tensor | None,
        spec: MemorySpec,
    ) -> "HeadCoefficients":
        """From θ, log a, log η [M, n], γ of the keys [M, c − 1 + n], and which slots hold a token, [M, n]."""
        m, n = step.shape
        lower = torch.ones(n, n, dtype=step.dtype, device=step.device).tril()
        ones = torch.ones_like(step)
        decay, retain = (lower.expand(m, n, n), ones) if log_retain is None else _decay(log_retain, lower)
        fit = torch.diag_embed(step)
        if gamma is not None:
            fit = step.unsqueeze(-1) * gamma.unsqueeze(-2) * band(n, spec.window, step)
        flags = spec.orthogonal, not spec.read_after_write
        if not spec.has_momentum:
            return cls(retain, None, None, torch.bmm(decay, fit), fit, *flags)
        momentum = (lower.expand(m, n, n), ones) if log_momentum is None else _decay(log_momentum, lower)
        momentum_write = torch.bmm(momentum[0], fit)
        adds = decay if valid is None else decay * valid.unsqueeze(-2)  # an empty slot does not add S to D
        carry = (adds * momentum[1].unsqueeze(-2)).sum(-1)
        return cls(retain, carry, momentum[1], torch.bmm(adds, momentum_write), momentum_write, *flags)

    def read(self, hidden: Tensor, dual: Tensor, momentum: Tensor | None, x: Tensor, d: Tensor) -> Tensor:
        """See :class:`Coefficients`."""
        retain, carry, write = self.retain.unsqueeze(-1), self.carry, self.write
        if self.late:
            retain, write = pad(retain[:, :-1], (0, 0, 1, 0), value=1.0), pad(write[:, :-1], (0, 0, 1, 0))
            carry = None if carry is None else pad(carry[:, :-1], (1, 0))
        out = torch.bmm(hidden * retain, dual)
        if self.orthogonal:
            return out
        out = torch.baddbmm(out, write * torch.bmm(hidden, x.mT), d, alpha=-1.0)
        if carry is None or momentum is None:
            return out
        return torch.baddbmm(out, hidden * carry.unsqueeze(-1), momentum)

    def update(self, dual: Tensor, momentum: Tensor | None, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :class:`Coefficients`."""
        write, momentum_write = self.write[:, -1, :, None], self.momentum_write[:, -1, :, None]
        new = dual * self.retain[:, -1, None, None]
        if not self.orthogonal:
            new = torch.baddbmm(new, (x * write).mT, d, alpha=-1.0)
        if momentum is None or self.carry is None or self.inertia is None:
            return new, None
        if not self.orthogonal:
            new = new + momentum * self.carry[:, -1, None, None]
        kept = momentum * self.inertia[:, -1, None, None]
        return new, torch.baddbmm(kept, (x * momentum_write).mT, d, alpha=-1.0)
