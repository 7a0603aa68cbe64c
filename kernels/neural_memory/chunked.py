"""Chunk-parallel neural memory in plain torch: the CPU path, and the fallback on a GPU.

Inside a chunk everything is matrix multiplication (no weight per token is formed), with the decays as ratios of
cumulative products taken in log space. With a the retention, η the momentum, θ the step, products over the chunk:

    L_a[t,j] = Π_{l=j+1..t} a_l     A_t = Π_{l≤t} a_l     Λ = L_a L_η diag(θ)     f = L_a E     (L_η, E likewise)
    x W_t = A_t (x W) + f_t (x S) − [Λ ⊙ (x Xᵀ)]_t Δ

where row i of X is a layer's input for key i at the anchor, and row i of Δ the inner loss's error at its output.

Memory: the forward keeps W and S every G chunks; the backward replays G chunks under autograd at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from ..check import compute_dtype
from .schedule import Step
from .spec import LAYER_NORM_EPS, MemorySpec

gelu_backward = torch.ops.aten.gelu_backward

#: W, S (empty without momentum) and anchor, a tensor [M, in, out] per layer each.
Carry = tuple[list[Tensor], list[Tensor], list[Tensor]]


class Gates:
    """The decays of one chunk from its gates [M, c] (M = rows × heads), ``valid`` [M, c] or None.

    A slot that holds no token comes with θ = 0 and a = η = 1, and must not add S to W.
    """

    def __init__(
        self, step: Tensor, log_retain: Tensor | None, log_momentum: Tensor | None, valid: Tensor | None, shift: bool
    ) -> None:
        decay, self.retain = _decay(log_retain, step)
        self.carry = None
        if log_momentum is None:
            self.write = decay * step.unsqueeze(-2)
            self.momentum_write = None
        else:
            adds = decay if valid is None else decay * valid.unsqueeze(-2)
            inertia, self.momentum = _decay(log_momentum, step)
            self.momentum_write = inertia * step.unsqueeze(-2)
            self.write = adds @ self.momentum_write
            self.carry = (adds @ self.momentum.unsqueeze(-1)).squeeze(-1)
        self.read_write, self.read_retain, self.read_carry = self.write, self.retain, self.carry
        if shift:  # token t reads W_{t-1}: the coefficients of the row above
            self.read_write = torch.nn.functional.pad(self.write[:, :-1], (0, 0, 1, 0))
            self.read_retain = torch.nn.functional.pad(self.retain[:, :-1], (1, 0), value=1.0)
            self.read_carry = None if self.carry is None else torch.nn.functional.pad(self.carry[:, :-1], (1, 0))


def _decay(log_gate: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """L [M, c, c] (lower triangular, ones on the diagonal) and the products from the chunk's start [M, c]."""
    c = like.shape[-1]
    lower = torch.ones(c, c, dtype=torch.bool, device=like.device).tril()
    if log_gate is None:
        return lower.to(like.dtype).expand(len(like), c, c), torch.ones_like(like)
    total = log_gate.cumsum(-1)
    # Masked before exp: above the diagonal the difference is positive and exp could overflow.
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~lower, -torch.inf).exp(), total.exp()


def _inner_errors(
    k: Tensor, v: Tensor, anchor: Sequence[Tensor], norm: Tensor | None, spec: MemorySpec
) -> tuple[list[Tensor], list[Tensor]]:
    """X_i, the input of every layer for the keys, and Δ_i, the inner loss's error at its output; [M, c, ·] each."""
    inputs, before = [k], []
    for i, weight in enumerate(anchor):
        before.append(torch.bmm(inputs[-1], weight))
        if i + 1 < len(anchor):
            inputs.append(gelu(before[-1], approximate="tanh"))
    last = before[-1]
    if norm is not None:
        width = last.shape[-1]
        mean = last.mean(-1, keepdim=True)
        centred = last - mean
        rstd = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
        unit = centred * rstd
    if spec.bias == "dot":
        error = -v
    else:
        out = last if norm is None else unit * norm
        error = (out + k - v) if spec.residual else out - v
    if norm is not None:
        error = error * norm
        error = rstd * (error - error.mean(-1, keepdim=True) - unit * ((error * unit).sum(-1, keepdim=True) / width))
    errors = [error]
    for i in range(len(anchor) - 1, 0, -1):
        errors.append(gelu_backward(torch.bmm(errors[-1], anchor[i].mT), before[i - 1], approximate="tanh"))
    return inputs, errors[::-1]


def _read(
    q: Tensor,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    norm: Tensor | None,
    gates: Gates,
    spec: MemorySpec,
) -> Tensor:
    """M(q_t; W_t) for every token of the chunk, [M, c, out], layer by layer along q's own forward pass."""
    retain = gates.read_retain.unsqueeze(-1)
    hidden = q
    for i, weight in enumerate(weights):
        if i:
            hidden = gelu(hidden, approximate="tanh")
        scores = gates.read_write * torch.bmm(hidden, inputs[i].mT)
        now = torch.bmm(hidden * retain, weight)
        if momentum:
            assert gates.read_carry is not None
            now = torch.baddbmm(now, hidden * gates.read_carry.unsqueeze(-1), momentum[i])
        hidden = torch.baddbmm(now, scores, errors[i], alpha=-1.0)
    if norm is not None:
        hidden = layer_norm(hidden, hidden.shape[-1:], eps=LAYER_NORM_EPS) * norm
    return q + hidden if spec.residual else hidden


def chunk_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    anchor: Sequence[Tensor],
    norm: Tensor | None,
    spec: MemorySpec,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One chunk of M memories: q, k, v [M, c, ·] → the reads, and W and S after the chunk's last token."""
    inputs, errors = _inner_errors(k, v, anchor, norm, spec)
    out = _read(q, weights, momentum, inputs, errors, norm, gates, spec)
    last_write, retain = gates.write[:, -1, :, None], gates.retain[:, -1, None, None]
    new_weights, new_momentum = [], []
    for i, weight in enumerate(weights):
        kept = weight * retain
        if momentum:
            assert gates.carry is not None and gates.momentum_write is not None
            kept = torch.addcmul(kept, momentum[i], gates.carry[:, -1, None, None])
            decayed = momentum[i] * gates.momentum[:, -1, None, None]
            last = errors[i] * gates.momentum_write[:, -1, :, None]
            new_momentum.append(torch.baddbmm(decayed, inputs[i].mT, last, alpha=-1.0))
        new_weights.append(torch.baddbmm(kept, inputs[i].mT, errors[i] * last_write, alpha=-1.0))
    return out, new_weights, new_momentum


class Tokens:
    """The token tensors of one call, head-major, from which steps take their chunks and into which they put results.

    Dense: [B·H, T, ·], so that a chunk is a view. Ragged: [B·T, H, ·], and a chunk is gathered.
    """

    def __init__(self, tensors: Sequence[Tensor | None], heads: int, dense: bool) -> None:
        self.heads, self.dense = heads, dense
        kind = compute_dtype(next(x for x in tensors if x is not None))
        self.tensors = [None if x is None else self._lay(x.to(kind)) for x in tensors]

    def _lay(self, x: Tensor) -> Tensor:
        if self.dense:
            return x.movedim(2, 1).flatten(0, 1).contiguous()
        return x.flatten(0, 1)

    def take(self, x: Tensor | None, step: Step) -> Tensor | None:
        """The chunk [rows·H, c, ·] of one laid-out tensor; zero in slots that hold no token, whatever the rest holds."""
        if x is None:
            return None
        if step.span is not None:
            return x[:, step.span[0] : step.span[1]]
        assert step.index is not None and step.valid is not None
        empty = ~step.valid[(...,) + (None,) * (x.dim() - 1)]
        return x[step.index].masked_fill(empty, 0.0).movedim(2, 1).flatten(0, 1)

    def put(self, out: Tensor, chunk: Tensor, step: Step) -> None:
        """Write a chunk [rows·H, c, ·] to its place in ``out``, laid out like the inputs."""
        if step.span is not None:
            out[:, step.span[0] : step.span[1]] = chunk
            return
        assert step.index is not None and step.valid is not None
        own = chunk.unflatten(0, (step.rows, self.heads)).movedim(1, 2)
        out[step.index[step.valid]] = own[step.valid]

    def empty(self, width: int | None, like: Tensor) -> Tensor:
        """An output laid out like the inputs, every element to be written."""
        return like.new_empty(*like.shape[:2], *(() if width is None else (width,)))

    def restore(self, x: Tensor, batch: int) -> Tensor:
        """Back to [B, T, H, ·]."""
        if self.dense:
            return x.unflatten(0, (batch, self.heads)).movedim(1, 2)
        return x.unflatten(0, (batch, -1))


def segment(
    chunks: Sequence[Sequence[Tensor | None]],
    carry: Carry,
    norm: Tensor | None,
    steps: Sequence[Step],
    spec: MemorySpec,
    heads: int,
) -> tuple[list[Tensor], Carry]:
    """Run ``steps`` on their token ``chunks``; returns the reads, and W, S and anchor [rows·H, ·, ·] after them.

    Rows that end inside the segment keep the carry of their own last step.
    """
    weights, momentum, anchor = carry
    scale = None if norm is None else norm.repeat(len(weights[0]) // heads, 1).unsqueeze(1)
    done: list[tuple[list[Tensor], ...]] = []
    outputs = []
    for step, (q, k, v, theta, log_retain, log_momentum) in zip(steps, chunks, strict=True):
        active = step.rows * heads
        if active < len(weights[0]):
            done.append(tuple([x[active:] for x in part] for part in (weights, momentum, anchor)))
            weights, momentum, anchor = ([x[:active] for x in part] for part in (weights, momentum, anchor))
        assert q is not None and k is not None and v is not None and theta is not None
        valid = None if step.valid is None else step.valid.repeat_interleave(heads, 0)
        gates = Gates(theta, log_retain, log_momentum, valid, shift=not spec.read_after_write)
        out, weights, momentum = chunk_step(
            q, k, v, gates, weights, momentum, anchor, None if scale is None else scale[:active], spec
        )
        outputs.append(out)
        if isinstance(step.ended, bool):
            anchor = weights if step.ended else anchor
        else:
            ended = step.ended.repeat_interleave(heads)[:, None, None]
            anchor = [torch.where(ended, w, x) for w, x in zip(weights, anchor, strict=True)]
    parts = [(weights, momentum, anchor), *reversed(done)]
    whole = [
        [torch.cat(xs) if done else xs[0] for xs in zip(*group, strict=True)] for group in zip(*parts, strict=True)
    ]
    return outputs, (whole[0], whole[1], whole[2])
