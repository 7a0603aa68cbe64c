"""The decays of one chunk as matrices, and their backward.

With a the retention, η the momentum, θ the step, products over the chunk, all taken in log space:

    L_a[t,j] = Π_{l=j+1..t} a_l (j ≤ t, else 0)     A_t = Π_{l≤t} a_l     L_η, E likewise
    P = L_η diag(θ)     Λ = L_a P     f = L_a E

so that S_t = E_t S − Σ_i P[t,i] g_i and W_t = A_t W + f_t S − Σ_i Λ[t,i] g_i. Without momentum Λ = L_a diag(θ), f = 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Gates:
    """The coefficients of one chunk for M memories, c slots each; momentum's are None for the rule gd.

    ``write`` Λ and ``momentum_write`` P are [M, c, c]; ``retain`` A, ``carry`` f and ``inertia`` E are [M, c].
    ``read_*`` are those a read at t uses: the same, or one row earlier when token t reads W_{t-1}.
    """

    write: Tensor
    retain: Tensor
    carry: Tensor | None
    momentum_write: Tensor | None
    inertia: Tensor | None
    shift: bool
    _parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None]

    @property
    def read_write(self) -> Tensor:
        """``write`` as the reads see it: one token late where reads come before writes; so the two below."""
        return pad(self.write[:, :-1], (0, 0, 1, 0)) if self.shift else self.write

    @property
    def read_retain(self) -> Tensor:
        """``retain`` at the reads."""
        return pad(self.retain[:, :-1], (1, 0), value=1.0) if self.shift else self.retain

    @property
    def read_carry(self) -> Tensor | None:
        """``carry`` at the reads."""
        return None if self.carry is None else pad(self.carry[:, :-1], (1, 0)) if self.shift else self.carry


def _decay(log_gate: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """L [M, c, c] (lower triangular, ones on the diagonal) and the products from the chunk's start [M, c]."""
    c = like.shape[-1]
    lower = torch.ones(c, c, dtype=like.dtype, device=like.device).tril_()
    if log_gate is None:
        return lower.expand(len(like), c, c), torch.ones_like(like)
    total = log_gate.cumsum(-1)
    # Zero above the diagonal before exp: the difference is positive there and exp could overflow.
    difference = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril_()
    return difference.exp_().mul_(lower), total.exp()


def _decay_backward(decay: Tensor, products: Tensor, d_decay: Tensor, d_products: Tensor) -> Tensor:
    """Gradient of the log gate [M, c]."""
    flow = d_decay * decay
    total = flow.sum(-1) - flow.sum(-2) + d_products * products
    return total.flip(-1).cumsum(-1).flip(-1)


def make_gates(
    step: Tensor, log_retain: Tensor | None, log_momentum: Tensor | None, valid: Tensor | None, shift: bool
) -> Gates:
    """The coefficients from θ, log a and log η [M, c].

    ``valid`` [M, c] is false in slots that hold no token; they come with θ = 0 and log gates 0, and do not add S to W.
    """
    decay, retain = _decay(log_retain, step)
    if log_momentum is None:
        return Gates(decay * step.unsqueeze(-2), retain, None, None, None, shift, (decay, decay, None, valid))
    adds = decay if valid is None else decay * valid.unsqueeze(-2)
    inertia, products = _decay(log_momentum, step)
    momentum_write = inertia * step.unsqueeze(-2)
    carry = (adds * products.unsqueeze(-2)).sum(-1)  # cheaper than a bmm with one column
    write = torch.bmm(adds, momentum_write)
    return Gates(write, retain, carry, momentum_write, products, shift, (decay, adds, inertia, valid))


@dataclass
class GateGradients:
    """Gradients of the coefficients that one chunk's backward accumulates: ``read_*`` for the reads, the others for the
    update of the state, which uses the last row alone."""

    read_write: Tensor
    read_retain: Tensor
    read_carry: Tensor | None
    last_write: Tensor
    last_retain: Tensor
    last_carry: Tensor | None
    last_momentum_write: Tensor | None
    last_inertia: Tensor | None


def gates_backward(
    gates: Gates, d: GateGradients, step: Tensor, log_retain: Tensor | None, log_momentum: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of θ, log a and log η [M, c]."""
    decay, adds, inertia, valid = gates._parts
    d_write, d_retain, d_carry = d.read_write, d.read_retain, d.read_carry
    if gates.shift:
        d_write, d_retain = pad(d_write[:, 1:], (0, 0, 0, 1)), pad(d_retain[:, 1:], (0, 1))
        d_carry = None if d_carry is None else pad(d_carry[:, 1:], (0, 1))
    d_write[:, -1] += d.last_write
    d_retain[:, -1] += d.last_retain
    if log_momentum is None:
        d_decay = d_write * step.unsqueeze(-2)
        d_step, d_log_momentum = (d_write * decay).sum(-2), None
    else:
        assert d_carry is not None and d.last_carry is not None and d.last_momentum_write is not None
        assert d.last_inertia is not None and inertia is not None
        assert gates.momentum_write is not None and gates.inertia is not None
        d_carry[:, -1] += d.last_carry
        d_decay = torch.bmm(d_write, gates.momentum_write.mT)
        d_decay += d_carry.unsqueeze(-1) * gates.inertia.unsqueeze(-2)
        if valid is not None:
            d_decay *= valid.unsqueeze(-2)
        d_momentum_write = torch.bmm(adds.mT, d_write)
        d_momentum_write[:, -1] += d.last_momentum_write
        d_inertia = (adds * d_carry.unsqueeze(-1)).sum(-2)
        d_inertia[:, -1] += d.last_inertia
        d_step = (d_momentum_write * inertia).sum(-2)
        d_log_momentum = _decay_backward(inertia, gates.inertia, d_momentum_write * step.unsqueeze(-2), d_inertia)
    d_log_retain = None if log_retain is None else _decay_backward(decay, gates.retain, d_decay, d_retain)
    return d_step, d_log_retain, d_log_momentum
