"""The chunk-parallel form in plain torch: only the memory itself goes from chunk to chunk, all else is batched.

Tensors are laid out as :class:`.slots.Layout` says: tokens [n, M, C, ·], gates [n, M, C]. Names as in the package's
docstring; ``q`` is scaled already.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .slots import Layout


@dataclass(frozen=True)
class Decay:
    """Γ below and on the diagonal [n, M, C, C] (ones [C, C] without decay); exp G, exp(G_C − G) and exp G_C."""

    pair: Tensor
    since_start: Tensor | None
    until_end: Tensor | None
    whole: Tensor | None


@dataclass(frozen=True)
class Chunks:
    """The tokens of a call; ``beta`` None: linear attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    decay: Decay


@dataclass(frozen=True)
class Kept:
    """What the backward takes from the forward: N [n, M, C, C] (delta rule), S [n, M, D, D_v] before each chunk, and
    the errors [n, M, C, D_v] (linear attention: the values)."""

    inverse: Tensor | None
    states: Tensor
    errors: Tensor


def make_decay(log_decay: Tensor | None, like: Tensor) -> Decay:
    """The factors that the cumulative log decay gives; ``like`` is a token tensor, for shape and dtype."""
    width = like.shape[-2]
    above = torch.ones(width, width, dtype=torch.bool, device=like.device).triu(1)
    if log_decay is None:
        return Decay((~above).to(like.dtype), None, None, None)
    total = log_decay.cumsum(-1)
    pair = total.unsqueeze(-1) - total.unsqueeze(-2)
    last = total[..., -1:]
    return Decay(pair.masked_fill_(above, -torch.inf).exp_(), total.exp(), (last - total).exp(), last.exp())


def scaled(x: Tensor, by: Tensor | None) -> Tensor:
    """Rows of x [..., C, D] times ``by`` [..., C]; None is 1."""
    return x if by is None else x * by.unsqueeze(-1)


def flat(x: Tensor, wave: slice) -> Tensor:
    """The chunks of a wave [m, M, ...] of x [n, M, ...] as one batch [m · M, ...]; x is contiguous, this is a view."""
    return x[wave].view(-1, *x.shape[2:])


def below(c: Chunks) -> Tensor:
    """L = tril(K Kᵀ ⊙ Γ, −1)."""
    return (c.k @ c.k.mT).mul_(c.decay.pair).tril_(-1)


def invert(c: Chunks) -> Tensor:
    """N = (I + L diag β)⁻¹, unit lower triangular."""
    assert c.beta is not None
    eye = torch.eye(c.k.shape[-2], dtype=c.k.dtype, device=c.k.device)
    system = below(c).mul_(c.beta.unsqueeze(-2)).add_(eye)
    found = torch.linalg.solve_triangular(system, eye.expand_as(system), upper=False, unitriangular=True)
    return found.contiguous()  # its columns come one after another


def forward(c: Chunks, memory: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Kept]:
    """Reads [n, M, C, D_v], the memory after the last chunk, and what the backward wants."""
    inverse, errors, towards = None, c.v, c.v
    if c.beta is not None:
        inverse = invert(c)
        errors = inverse @ c.v
        towards = inverse @ scaled(c.k, c.decay.since_start)
    states = c.k.new_empty(*c.k.shape[:2], c.k.shape[-1], c.v.shape[-1])
    keys = scaled(c.k, c.decay.until_end)
    for wave in layout.waves:
        state = flat(states, wave).copy_(layout.read(memory, wave))
        if c.beta is not None:
            flat(errors, wave).baddbmm_(flat(towards, wave), state, alpha=-1.0)
        kept = state if c.decay.whole is None else scaled(state, flat(c.decay.whole, wave))
        written = scaled(flat(errors, wave), None if c.beta is None else flat(c.beta, wave))
        memory = layout.write(memory, wave, torch.baddbmm(kept, flat(keys, wave).mT, written))
    scores = (c.q @ c.k.mT).mul_(c.decay.pair)
    out = scores @ scaled(errors, c.beta)
    out += scaled(c.q, c.decay.since_start) @ states
    return out, memory, Kept(inverse, states, errors)


@dataclass(frozen=True)
class Gradients:
    """Of the (scaled) q, of k, v, β and the log decay, in the chunks' layout; of the memory, as it was opened."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    memory: Tensor


def _scan_backward(
    c: Chunks, kept: Kept, d_out: Tensor, d_memory: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what is written [n, M, C, D_v], of the state after each chunk [n, M, D, D_v], and of the memory."""
    scores = (c.q @ c.k.mT).mul_(c.decay.pair)
    d_written = scores.mT @ d_out
    del scores
    queries, keys = scaled(c.q, c.decay.since_start), scaled(c.k, c.decay.until_end)
    towards = None
    if kept.inverse is not None:
        towards = scaled((kept.inverse @ scaled(c.k, c.decay.since_start)), None)
    d_states = torch.empty_like(kept.states)
    for wave in reversed(layout.waves):
        d_state = flat(d_states, wave).copy_(layout.read(d_memory, wave))
        flat(d_written, wave).baddbmm_(flat(keys, wave), d_state)
        d_before = d_state if c.decay.whole is None else scaled(d_state, flat(c.decay.whole, wave))
        d_before = torch.baddbmm(d_before, flat(queries, wave).mT, flat(d_out, wave))
        if towards is not None and c.beta is not None:
            shares = scaled(flat(d_written, wave), flat(c.beta, wave))
            d_before.baddbmm_(flat(towards, wave).mT, shares, alpha=-1.0)
        d_memory = layout.write(d_memory, wave, d_before)
    return d_written, d_states, d_memory


def backward(c: Chunks, kept: Kept, d_out: Tensor, d_memory: Tensor, layout: Layout) -> Gradients:
    """All gradients, from those of the reads and of the memory after the last chunk.

    A query, and a key in the place of one (the delta rule reads before it writes), comes with exp(+G); a key that is
    written comes with exp(−G): dG is q·dq plus or minus k·dk of these places, and ⟨S', dS'⟩ at a chunk's end.
    """
    decay, written = c.decay, scaled(kept.errors, c.beta)
    d_written, d_states, d_memory = _scan_backward(c, kept, d_out, d_memory, layout)
    d_scores = (d_out @ written.mT).mul_(decay.pair)
    d_q = scaled(d_out @ kept.states.mT, decay.since_start).add_(d_scores @ c.k)
    d_across = scaled(written @ d_states.mT, decay.until_end)
    d_k = d_scores.mT @ c.q + d_across
    d_v, d_beta, d_query = d_written, None, None
    if c.beta is not None and kept.inverse is not None:
        d_v = kept.inverse.mT @ scaled(d_written, c.beta)
        crossed = d_v @ kept.errors.mT
        lower = below(c)
        d_beta = (kept.errors * d_written).sum(-1) - (crossed * lower).sum(-2)
        d_lower = crossed.mul_(decay.pair).tril_(-1).mul_(c.beta.unsqueeze(-2)).neg_()
        d_query = (d_lower @ c.k).sub_(scaled(d_v @ kept.states.mT, decay.since_start))
        d_k += d_lower.mT @ c.k
    d_log_decay = None
    if decay.whole is not None:
        d_total = (c.q * d_q).sum(-1) - (c.k * d_k).sum(-1)
        d_total[..., -1] += (kept.states * d_states).sum((-1, -2)) * decay.whole[..., 0]
        d_total[..., -1] += (c.k * d_across).sum((-1, -2))
        if d_query is not None:
            d_total += (c.k * d_query).sum(-1)
        d_log_decay = d_total.flip(-1).cumsum(-1).flip(-1)
    if d_query is not None:
        d_k += d_query
    return Gradients(d_q, d_k, d_v, d_beta, d_log_decay, d_memory)
