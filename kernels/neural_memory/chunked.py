"""One chunk of neural memory, forward and backward, as matrix products in plain torch.

No weight per token is formed. With X_i the input of layer i for the chunk's keys at the anchor, Δ_i the inner loss's
error at that layer's output (every inner gradient is rank one, x_jᵀ δ_j), and Λ, A, f, P, E of ``gates.py``:

    x W_t = A_t (x W) + f_t (x S) − [Λ ⊙ (x Xᵀ)]_t Δ          layer by layer along the query's own forward pass
    W' = A_c W + f_c S − Xᵀ diag(Λ_c) Δ      S' = E_c S − Xᵀ diag(P_c) Δ          at the chunk's end

W and S of a layer are held as one matrix [W; S], [M, 2·in, out], so that each pair of products is one.
M counts memories: rows × heads. The derivation of the backward is in docs/neural_memory.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gates import GateGradients, Gates
from .spec import LAYER_NORM_EPS, MemorySpec

# gelu in its tanh form is x σ(w), w = SLOPE x + CUBE x³; a sigmoid costs less than a tanh on a CPU.
SLOPE = 2.0 * (2.0 / torch.pi) ** 0.5
CUBE = SLOPE * 0.044715


@dataclass
class Gelu:
    """What gelu′ and gelu″ at x share: with w′ = SLOPE + 3 CUBE x², ``turn`` is x w′ / 3 and ``bell`` is σ(1 − σ).

    Each line below is one pass over memory, which is what these functions cost.
    """

    x: Tensor
    sigma: Tensor
    turn: Tensor  # w until slope() is asked for
    bell: Tensor | None = None

    def slope(self) -> Tensor:
        """gelu′(x) = σ + x σ(1 − σ) w′; once only."""
        self.turn = self.turn.sub_(self.x, alpha=2.0 * SLOPE / 3.0)  # x w′ = 3 w − 2 SLOPE x
        self.bell = torch.addcmul(self.sigma, self.sigma, self.sigma, value=-1.0)
        return torch.addcmul(self.sigma, self.bell, self.turn, value=3.0)

    def curve(self) -> Tensor:
        """gelu″(x) = σ(1 − σ) (2 w′ + x w″ + (1 − 2σ) x w′²), after :meth:`slope`; 2 w′ + x w″ is 4 w′ − 2 SLOPE."""
        assert self.bell is not None
        square = self.x * self.x
        out = torch.rsub(square, 2.0 * SLOPE, alpha=-12.0 * CUBE)
        rate = torch.rsub(square, SLOPE, alpha=-3.0 * CUBE)
        bend = torch.rsub(self.sigma, 1.0, alpha=2.0).mul_(self.turn)
        return out.addcmul_(bend, rate, value=3.0).mul_(self.bell)


def gelu(x: Tensor) -> tuple[Tensor, Gelu]:
    """gelu(x) = x σ(w), and what its derivatives are made of."""
    w = torch.rsub(x * x, SLOPE, alpha=-CUBE).mul_(x)
    sigma = torch.sigmoid(w)
    return x * sigma, Gelu(x, sigma, w)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x − mean) / std over the last dim, and 1 / std."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = centred.square().mean(-1, keepdim=True).add_(LAYER_NORM_EPS).rsqrt_()
    return centred.mul_(rstd), rstd


def _project(x: Tensor, unit: Tensor) -> Tensor:
    """x − mean(x) − ẑ mean(x ⊙ ẑ), the symmetric map in LayerNorm's backward."""
    out = x - x.mean(-1, keepdim=True)
    return out.addcmul_(unit, (x * unit).mean(-1, keepdim=True), value=-1.0)


def _pair(x: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """[first ⊙ x ‖ second ⊙ x] along the last dim; first ⊙ x alone without a second."""
    if second is None:
        return x * first
    width = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], 2 * width)
    torch.mul(x, first, out=out[..., :width])
    torch.mul(x, second, out=out[..., width:])
    return out


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each memory, [M, ·, ·] → [M]; a product and a sum, cheaper than a bmm with one row."""
    return (a * b).sum((-1, -2))


@dataclass
class Errors:
    """The inner pass over the chunk's keys at the anchor. Index i is the layer; gelus follow all layers but the last,
    at Z_i = X_i U_i."""

    inputs: list[Tensor]  # X_i [M, c, in]
    gelus: list[Gelu]
    slope: list[Tensor]  # gelu′(Z_i)
    back: list[Tensor]  # Δ_{i+1} U_{i+1}ᵀ
    deltas: list[Tensor]  # Δ_i [M, c, out]
    unit: Tensor | None  # ẑ, 1/std of the last layer, and the error at the network's output
    rstd: Tensor | None
    error: Tensor


@dataclass
class Read:
    """The queries' pass."""

    hidden: list[Tensor]  # the input of layer i, [M, c, in]
    scaled: list[Tensor]  # [A ⊙ h ‖ f ⊙ h], [M, c, 2·in]
    products: list[Tensor]  # h Xᵀ [M, c, c]
    scores: list[Tensor]  # Λ ⊙ h Xᵀ
    gelus: list[Gelu]
    unit: Tensor | None
    rstd: Tensor | None


@dataclass
class Chunk:
    """What a chunk's backward needs of its forward."""

    errors: Errors
    read: Read
    states: list[Tensor]  # [W; S] before the chunk, [M, 2·in, out]
    anchor: Sequence[Tensor]
    gates: Gates


def inner_pass(k: Tensor, v: Tensor, anchor: Sequence[Tensor], norm: Tensor | None, spec: MemorySpec) -> Errors:
    """X_i and Δ_i for k, v [M, c, ·] at the anchor; norm [M, 1, out]."""
    inputs, gelus, slopes, back = [k], [], [], []
    last = torch.bmm(k, anchor[0])
    for weight in anchor[1:]:
        hidden, at = gelu(last)
        inputs.append(hidden)
        gelus.append(at)
        slopes.append(at.slope())
        last = torch.bmm(hidden, weight)
    unit = rstd = None
    if norm is not None:
        unit, rstd = _unit(last)
    if spec.bias == "dot":
        error = -v
    else:
        error = (last if norm is None or unit is None else unit * norm) - v
        if spec.residual:
            error += k
    delta = error
    if norm is not None and unit is not None and rstd is not None:
        delta = _project(error * norm, unit).mul_(rstd)
    deltas = [delta]
    for i in range(len(anchor) - 1, 0, -1):
        back.append(torch.bmm(deltas[-1], anchor[i].mT))
        deltas.append(back[-1] * slopes[i - 1])
    return Errors(inputs, gelus, slopes, back[::-1], deltas[::-1], unit, rstd, error)


def inner_pass_backward(
    e: Errors,
    d_inputs: list[Tensor],
    d_deltas: list[Tensor],
    anchor: Sequence[Tensor],
    norm: Tensor | None,
    spec: MemorySpec,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """Gradients of k, v, the anchor and norm [M, 1, out]. Overwrites ``d_inputs`` and ``d_deltas``."""
    d_anchor: list[Tensor] = []
    d_before = []
    for i in range(len(anchor) - 1):  # δ_i = (δ_{i+1} Uᵀ) ⊙ gelu′(Z_i), from the first layer upwards
        d_back = d_deltas[i] * e.slope[i]
        d_before.append(e.gelus[i].curve().mul_(e.back[i]).mul_(d_deltas[i]))
        d_deltas[i + 1].baddbmm_(d_back, anchor[i + 1])
        d_anchor.append(torch.bmm(d_back.mT, e.deltas[i + 1]))
    d_last = d_norm = None
    d_error = d_deltas[-1]
    if norm is not None:
        assert e.unit is not None and e.rstd is not None
        d_delta, scaled = d_deltas[-1], e.error * norm
        d_scaled = _project(d_delta, e.unit).mul_(e.rstd)
        both = (scaled * e.unit).mean(-1, keepdim=True)
        d_unit = (d_delta * both).addcmul_(scaled, (d_delta * e.unit).mean(-1, keepdim=True)).mul_(-e.rstd)
        # 1/std enters δ as a factor: d(1/std) = ⟨dδ, δ⟩ std, and 1/std falls as −ẑ/(D std²) with Z.
        d_rstd = (d_delta * e.deltas[-1]).mean(-1, keepdim=True).mul_(-e.rstd)
        d_error = d_scaled * norm
        d_norm = (d_scaled * e.error).sum(-2, keepdim=True)
        if spec.bias == "l2":
            d_unit.addcmul_(d_error, norm.expand_as(d_error))
            d_norm += (d_error * e.unit).sum(-2, keepdim=True)
        d_last = _project(d_unit, e.unit).mul_(e.rstd).addcmul_(e.unit, d_rstd)
    elif spec.bias == "l2":
        d_last = d_error
    if spec.bias == "l2" and spec.residual:
        d_inputs[0] += d_error
    for i in range(len(anchor) - 1, -1, -1):  # Z_i = X_i U_i
        if i < len(anchor) - 1:
            d_last = d_before[i].addcmul_(d_inputs[i + 1], e.slope[i])
        if d_last is None:  # dot bias without a norm: the error does not see the last layer's output
            if i == 0:
                d_anchor.append(torch.zeros_like(anchor[0]))
            continue
        d_inputs[i].baddbmm_(d_last, anchor[i].mT)
        if i == 0:
            d_anchor.insert(0, torch.bmm(e.inputs[0].mT, d_last))
        else:
            d_anchor[i - 1].baddbmm_(e.inputs[i].mT, d_last)
    return d_inputs[0], -d_error, d_anchor, d_norm


def _read_columns(gates: Gates) -> tuple[Tensor, Tensor | None, Tensor]:
    """A and f as columns [M, c, 1], and Λ [M, c, c], as reads use them."""
    carry = gates.read_carry
    return gates.read_retain.unsqueeze(-1), None if carry is None else carry.unsqueeze(-1), gates.read_write


def read_pass(
    q: Tensor, states: Sequence[Tensor], e: Errors, norm: Tensor | None, gates: Gates, spec: MemorySpec
) -> tuple[Tensor, Read]:
    """M(q_t; W_t) for every token, [M, c, out]."""
    retain, carry, write = _read_columns(gates)
    r = Read([], [], [], [], [], None, None)
    hidden = out = q
    for i, state in enumerate(states):
        if i:
            hidden, at = gelu(out)
            r.gelus.append(at)
        scaled = _pair(hidden, retain, carry)
        product = torch.bmm(hidden, e.inputs[i].mT)
        scores = product * write
        out = torch.bmm(scaled, state).baddbmm_(scores, e.deltas[i], alpha=-1.0)
        for kept_list, x in ((r.hidden, hidden), (r.scaled, scaled), (r.products, product), (r.scores, scores)):
            kept_list.append(x)
    if norm is not None:
        r.unit, r.rstd = _unit(out)
        out = r.unit * norm
    return (out + q if spec.residual else out), r


def read_pass_backward(
    d_out: Tensor,
    q: Tensor,
    states: Sequence[Tensor],
    e: Errors,
    r: Read,
    norm: Tensor | None,
    gates: Gates,
    d_states: list[Tensor],
    spec: MemorySpec,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, tuple[Tensor, Tensor, Tensor | None]]:
    """Gradients of q, X, Δ, norm and (Λ, A, f) as the reads use them; adds to ``d_states``, those of [W; S]."""
    retain, carry, write = _read_columns(gates)
    d_norm = None
    d_now = d_out
    if norm is not None:
        assert r.unit is not None and r.rstd is not None
        d_norm = (d_out * r.unit).sum(-2, keepdim=True)
        d_now = _project(d_out * norm, r.unit).mul_(r.rstd)
    d_inputs: list[Tensor] = []
    d_deltas: list[Tensor] = []
    d_write, d_retain = torch.zeros_like(write), torch.zeros_like(gates.retain)
    d_carry = None if carry is None else torch.zeros_like(gates.retain)
    for i in range(len(states) - 1, -1, -1):
        hidden, width = r.hidden[i], r.hidden[i].shape[-1]
        d_scaled = torch.bmm(d_now, states[i].mT)
        d_states[i].baddbmm_(r.scaled[i].mT, d_now)
        d_kept = d_scaled[..., :width]
        d_retain += (hidden * d_kept).sum(-1)
        d_hidden = d_kept * retain
        if carry is not None and d_carry is not None:
            d_carry += (hidden * d_scaled[..., width:]).sum(-1)
            d_hidden.addcmul_(d_scaled[..., width:], carry)
        d_scores = torch.bmm(d_now, e.deltas[i].mT).neg_()
        d_deltas.append(torch.bmm(r.scores[i].mT, d_now).neg_())
        d_write.addcmul_(d_scores, r.products[i])
        d_product = d_scores.mul_(write)
        d_hidden.baddbmm_(d_product, e.inputs[i])
        d_inputs.append(torch.bmm(d_product.mT, hidden))
        if i:
            d_now = d_hidden.mul_(r.gelus[i - 1].slope())
    d_q = d_hidden + d_out if spec.residual else d_hidden
    return d_q, d_inputs[::-1], d_deltas[::-1], d_norm, (d_write, d_retain, d_carry)


def _columns(gates: Gates) -> tuple[Tensor, Tensor | None]:
    """Λ_c and P_c, the last rows, as columns [M, c, 1]."""
    last = gates.write[:, -1].unsqueeze(-1)
    return last, None if gates.momentum_write is None else gates.momentum_write[:, -1].unsqueeze(-1)


def _decayed(state: Tensor, gates: Gates, backward: bool = False) -> Tensor:
    """[A W + f S; E S] of a layer's [W; S], with the coefficients of the last row; ``backward`` its transpose."""
    retain = gates.retain[:, -1, None, None]
    if gates.carry is None or gates.inertia is None:
        return state * retain
    carry, inertia = gates.carry[:, -1, None, None], gates.inertia[:, -1, None, None]
    out = torch.empty_like(state)
    (weights, momentum), (new_weights, new_momentum) = state.chunk(2, 1), out.chunk(2, 1)
    torch.mul(weights, retain, out=new_weights)
    torch.mul(momentum, inertia, out=new_momentum)
    if backward:
        new_momentum.addcmul_(weights, carry)
    else:
        new_weights.addcmul_(momentum, carry)
    return out


def update(states: Sequence[Tensor], e: Errors, gates: Gates) -> list[Tensor]:
    """[W; S] after the chunk's last token."""
    write, momentum_write = _columns(gates)
    return [
        _decayed(state, gates).baddbmm_(_pair(x, write, momentum_write).mT, delta, alpha=-1.0)
        for state, x, delta in zip(states, e.inputs, e.deltas, strict=True)
    ]


def update_backward(
    d_new: Sequence[Tensor], c: Chunk
) -> tuple[list[Tensor], list[Tensor], list[Tensor], dict[str, Tensor | None]]:
    """Gradients of [W; S], X and Δ, and of the last rows of the gates' matrices."""
    gates, e = c.gates, c.errors
    write, momentum_write = _columns(gates)
    d_states, d_inputs, d_deltas = [], [], []
    d: dict[str, Tensor | None] = {}

    def add(name: str, value: Tensor) -> None:
        held = d.get(name)
        d[name] = value if held is None else held.add_(value)

    for state, x, delta, d_out in zip(c.states, e.inputs, e.deltas, d_new, strict=True):
        width = x.shape[-1]
        d_scaled = torch.bmm(delta, d_out.mT).neg_()
        d_x = d_scaled[..., :width] * write
        d_weights, weights = d_out[:, :width], state[:, :width]
        add("last_write", (x * d_scaled[..., :width]).sum(-1))
        add("last_retain", _inner(weights, d_weights))
        if momentum_write is not None:
            momentum = state[:, width:]
            d_x.addcmul_(d_scaled[..., width:], momentum_write)
            add("last_momentum_write", (x * d_scaled[..., width:]).sum(-1))
            add("last_carry", _inner(momentum, d_weights))
            add("last_inertia", _inner(momentum, d_out[:, width:]))
        d_states.append(_decayed(d_out, gates, backward=True))
        d_inputs.append(d_x)
        d_deltas.append(torch.bmm(_pair(x, write, momentum_write), d_out).neg_())
    return d_states, d_inputs, d_deltas, d


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    states: Sequence[Tensor],
    anchor: Sequence[Tensor],
    norm: Tensor | None,
    spec: MemorySpec,
) -> tuple[Tensor, list[Tensor], Chunk]:
    """One chunk of M memories: q, k, v [M, c, ·], [W; S] and anchor of each layer, norm [M, 1, out] → reads, [W; S].

    The third result is what :func:`chunk_backward` needs.
    """
    errors = inner_pass(k, v, anchor, norm, spec)
    out, read = read_pass(q, states, errors, norm, gates, spec)
    return out, update(states, errors, gates), Chunk(errors, read, list(states), anchor, gates)


@dataclass
class ChunkGradients:
    """Of q, k, v, the states before the chunk, the anchor, norm [M, 1, out] and the gates' coefficients."""

    q: Tensor
    k: Tensor
    v: Tensor
    states: list[Tensor]
    anchor: list[Tensor]
    norm: Tensor | None
    gates: GateGradients


def chunk_backward(
    c: Chunk, d_out: Tensor, d_new: Sequence[Tensor], q: Tensor, norm: Tensor | None, spec: MemorySpec
) -> ChunkGradients:
    """Gradients of one chunk from those of its reads [M, c, out] and of the new [W; S]."""
    d_states, d_inputs, d_deltas, last = update_backward(d_new, c)
    d_q, more_inputs, more_deltas, d_norm, of_reads = read_pass_backward(
        d_out, q, c.states, c.errors, c.read, norm, c.gates, d_states, spec
    )
    for held, more in zip(d_inputs + d_deltas, more_inputs + more_deltas, strict=True):
        held += more
    d_k, d_v, d_anchor, more_norm = inner_pass_backward(c.errors, d_inputs, d_deltas, c.anchor, norm, spec)
    if d_norm is not None and more_norm is not None:
        d_norm += more_norm
    names = ("last_write", "last_retain", "last_carry", "last_momentum_write", "last_inertia")
    gates = GateGradients(*of_reads, *(last.get(name) for name in names))  # type: ignore[arg-type]
    return ChunkGradients(d_q, d_k, d_v, d_states, d_anchor, d_norm, gates)
