"""The same as ``coefficients.py`` where every column of a matrix has gates of its own (Miras): by halves.

Λ would be [n, n, out] here. It is never formed: of a block of 2m slots with its middle at p, the second half reads what
the first wrote through D and S at p, whose coefficients are of one token and channel, [2m, out]:

    D_t = A(t|p) D_p + f(t|p) S_p − …      D_p = … − Σ_{j≤p} κ(p|j) θ_j u_j      S_p = … − Σ_{j≤p} E(p|j) θ_j u_j

u_j = Σ γ_i x_iᵀ δ_i over the window of j; A(t|p), f(t|p), E(t|p) are of the slots after p up to t; κ(p|j), what is in
D_p of one added to S at j. What a token reads of its own write is a block of one slot. Going from blocks of m slots to
blocks of 2m composes these numbers,

    A(t|s) = A(t|p) A(p|s)    E(t|s) = E(t|p) E(p|s)    f(t|s) = A(t|p) f(p|s) + f(t|p) E(p|s)
    κ(t|j) = A(t|p) κ(p|j) + f(t|p) E(p|j)

which are sums of products of numbers in 0 .. 1: nothing overflows, nothing is divided, and there is no difference of
logarithms to round. All blocks of one size are one tensor, so a step of n slots takes log2 n rounds and n out log2 n
numbers, and as many products as with gates of heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .coefficients import band
from .spec import MemorySpec


@dataclass
class _Blocks:
    """Blocks of m slots, [M, blocks, m, out]: A, f and E from a block's start to a slot; κ θ and E θ from a slot to the
    block's end. All but A and κ θ are None for the rule gd."""

    retain: Tensor
    carry: Tensor | None
    inertia: Tensor | None
    write: Tensor
    momentum_write: Tensor | None

    def joined(self) -> "_Blocks":
        """Every two blocks as one."""
        (a1, a2), (w1, w2) = _pairs(self.retain), _pairs(self.write)
        retain, last = torch.cat([a1, a2 * a1[:, :, -1:]], 2), a2[:, :, -1:]
        if self.carry is None or self.inertia is None or self.momentum_write is None:
            return _Blocks(retain, None, None, torch.cat([w1 * last, w2], 2), None)
        (f1, f2), (e1, e2), (s1, s2) = map(_pairs, (self.carry, self.inertia, self.momentum_write))
        carry = torch.cat([f1, a2 * f1[:, :, -1:] + f2 * e1[:, :, -1:]], 2)
        inertia = torch.cat([e1, e2 * e1[:, :, -1:]], 2)
        write = torch.cat([w1 * last + s1 * f2[:, :, -1:], w2], 2)
        return _Blocks(retain, carry, inertia, write, torch.cat([s1 * e2[:, :, -1:], s2], 2))


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second of every two blocks."""
    return x[:, 0::2], x[:, 1::2]


def _gate(log_gate: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if log_gate is None else log_gate.exp()


@dataclass
class ChannelCoefficients:
    """``blocks`` of 1, 2, 4 … slots, the last of them one of all, with slots that hold no token at its end; θ
    [M, n, out]; γ of the keys [M, c − 1 + n, 1]. ``late``: token t reads D_{t−1}."""

    blocks: list[_Blocks]
    step: Tensor
    gamma: Tensor | None
    window: int
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
    ) -> "ChannelCoefficients":
        """From θ, log a, log η [M, n, out], γ of the keys [M, c − 1 + n], and which slots hold a token, [M, n]."""
        n = step.shape[1]
        size = 1 << (n - 1).bit_length()

        def whole(x: Tensor, value: float) -> Tensor:
            return pad(x, (0, 0, 0, size - n), value=value).unsqueeze(2)

        write, carry, inertia = whole(step, 0.0), None, None
        if spec.has_momentum:
            moves = _gate(log_momentum, step)
            inertia = whole(moves, 1.0)
            carry = whole(moves if valid is None else moves * valid.unsqueeze(-1), 0.0)  # where there is a token
        blocks = [_Blocks(whole(_gate(log_retain, step), 1.0), carry, inertia, write, None if carry is None else write)]
        while blocks[-1].retain.shape[1] > 1:
            blocks.append(blocks[-1].joined())
        share = None if gamma is None else gamma.unsqueeze(-1)
        return cls(blocks, step, share, spec.window, spec.orthogonal, not spec.read_after_write)

    def read(self, hidden: Tensor, dual: Tensor, momentum: Tensor | None, x: Tensor, d: Tensor) -> Tensor:
        """See :class:`Coefficients`."""
        n, all_slots = hidden.shape[1], self.blocks[-1]
        retain = all_slots.retain[:, 0, :n]
        carry = None if all_slots.carry is None else all_slots.carry[:, 0, :n]
        if self.late:
            retain = pad(retain[:, :-1], (0, 0, 1, 0), value=1.0)
            carry = None if carry is None else pad(carry[:, :-1], (0, 0, 1, 0))
        out = torch.bmm(hidden, dual) * retain
        if self.orthogonal:
            return out
        if carry is not None and momentum is not None:
            out = out + torch.bmm(hidden, momentum) * carry
        if not self.late:
            return out - self._written(hidden, x, d)
        before = self._written(pad(hidden[:, 1:], (0, 0, 0, 1)), x, d)  # slot t − 1 is asked for token t
        return out - pad(before[:, :-1], (0, 0, 1, 0))

    def _written(self, hidden: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """Σ_i Λ[t,i] ⟨h_t, x_i⟩ δ_i, [M, n, out]."""
        n, halo, size = hidden.shape[1], self.window - 1, self.blocks[-1].retain.shape[2]
        d = d if self.gamma is None else d * self.gamma
        if halo:
            total = torch.bmm(torch.bmm(hidden, x.mT) * band(n, self.window, x), d)
        else:
            total = (hidden * x).sum(-1, keepdim=True) * d
        total = total * self.step
        hidden, x, d = (pad(y, (0, 0, 0, size - n)) for y in (hidden, x, d))
        for of in self.blocks[:-1]:
            m = of.retain.shape[2]
            (first, _), (_, retain) = _pairs(of.write), _pairs(of.retain)
            keys, errors = (
                y.unfold(1, m + halo, 2 * m) for y in (x, d)
            )  # of the first halves, [M, blocks, ·, m + halo]
            scores = hidden.unflatten(1, (-1, 2, m))[:, :, 1] @ keys
            seen = (scores @ (self._by_key(first) * errors.mT)) * retain
            if of.momentum_write is not None and of.carry is not None:
                (first, _), (_, carry) = _pairs(of.momentum_write), _pairs(of.carry)
                seen = seen + (scores @ (self._by_key(first) * errors.mT)) * carry
            total = total + pad(seen, (0, 0, m, 0)).flatten(1, 2)[:, :n]
        return total

    def _by_key(self, writes: Tensor) -> Tensor:
        """Coefficients of the writes [..., m, out] as those of the keys in their windows [..., c − 1 + m, out]."""
        return writes if self.window == 1 else band(writes.shape[-2], self.window, writes).mT @ writes

    def update(self, dual: Tensor, momentum: Tensor | None, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :class:`Coefficients`."""
        d = d if self.gamma is None else d * self.gamma
        n, end = self.step.shape[1], self.blocks[-1]
        new = dual * end.retain[:, 0, -1:]
        if not self.orthogonal:
            new = torch.baddbmm(new, x.mT, d * self._by_key(end.write[:, 0, :n]), alpha=-1.0)
        if momentum is None or end.carry is None or end.inertia is None or end.momentum_write is None:
            return new, None
        if not self.orthogonal:
            new = new + momentum * end.carry[:, 0, -1:]
        kept, errors = momentum * end.inertia[:, 0, -1:], d * self._by_key(end.momentum_write[:, 0, :n])
        return new, torch.baddbmm(kept, x.mT, errors, alpha=-1.0)
