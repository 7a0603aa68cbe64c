"""Token by token, as the equations read; the inner gradient comes from autograd and from nothing else here.

This is the judge of every other implementation. It is slow, differentiable to any order, and works in the dtype of its
input's accumulations (float64 in, float64 throughout).
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..check import compute_dtype
from .spec import LAYER_NORM_EPS, MemorySpec
from .state import fresh_state, pack_state


def network(x: Tensor, weights: list[Tensor], norm: Tensor | None, spec: MemorySpec) -> Tensor:
    """M(x; W): x [..., H, in], weights of [..., H, in, out], norm [H, out] → [..., H, out]."""
    hidden = x
    for i, weight in enumerate(weights):
        if i:
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        hidden = (hidden.unsqueeze(-2) @ weight).squeeze(-2)
    if norm is not None:
        hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=LAYER_NORM_EPS) * norm
    return x + hidden if spec.residual else hidden


def inner_loss(k: Tensor, v: Tensor, weights: list[Tensor], norm: Tensor | None, spec: MemorySpec) -> Tensor:
    """ℓ per row and head: ½‖M(k) − v‖² (l2) or −⟨M(k), v⟩ (dot); k, v [N, H, D] → [N, H]."""
    out = network(k, weights, norm, spec)
    return 0.5 * (out - v).square().sum(-1) if spec.bias == "l2" else -(out * v).sum(-1)


def _inner_gradient(k: Tensor, v: Tensor, anchor: list[Tensor], norm: Tensor | None, spec: MemorySpec) -> list[Tensor]:
    """∇_W ℓ(M(k; W), v) at the anchor; second-order terms stay in the graph when the caller records one."""
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        at = [w if recording and w.requires_grad else w.detach().requires_grad_() for w in anchor]
        loss = inner_loss(k, v, at, norm, spec).sum()
        return list(torch.autograd.grad(loss, at, create_graph=recording))


def _run(
    tokens: tuple[Tensor, ...], norm: Tensor | None, state: dict[str, Tensor], spec: MemorySpec
) -> tuple[Tensor, dict[str, Tensor]]:
    """The recurrence over dense rows: q, k, v [N, T, H, D]; step, a, η [N, T, H]."""
    q, k, v, step, retain, momentum = tokens
    n = spec.layers
    weights = [state[f"weights.{i}"] for i in range(n)]
    velocity = [state[f"momentum.{i}"] if spec.has_momentum else torch.zeros_like(weights[i]) for i in range(n)]
    anchor = [state[f"anchor.{i}"] for i in range(n)]
    position = state["position"]
    outputs = []
    for t in range(q.shape[1]):
        before = weights
        gradient = _inner_gradient(k[:, t], v[:, t], anchor, norm, spec)
        eta, theta, a = (x[:, t, :, None, None] for x in (momentum, step, retain))
        velocity = [eta * s - theta * g for s, g in zip(velocity, gradient, strict=True)]
        weights = [a * w + s for w, s in zip(weights, velocity, strict=True)]
        outputs.append(network(q[:, t], weights if spec.read_after_write else before, norm, spec))
        position = (position + 1) % spec.chunk_size
        ended = (position == 0)[:, None, None, None]
        anchor = [torch.where(ended, w, x) for w, x in zip(weights, anchor, strict=True)]
    final = pack_state(weights, velocity if spec.has_momentum else [], anchor, position)
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), final


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_retain: Tensor | None,
    log_momentum: Tensor | None,
    *,
    weights: list[Tensor],
    spec: MemorySpec,
    norm: Tensor | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See :func:`palimpsest.kernels.neural_memory`."""
    kind = compute_dtype(q)
    retain = torch.ones_like(step) if log_retain is None else log_retain.exp()
    momentum = torch.zeros_like(step) if log_momentum is None else log_momentum.exp()
    tokens = tuple(x.to(kind) for x in (q, k, v, step, retain, momentum))
    scale = None if norm is None else norm.to(kind)
    borders = None if cu_seqlens is None else cu_seqlens.tolist()
    rows = q.shape[0] if borders is None else len(borders) - 1
    if state is None:
        state = fresh_state([w.to(kind) for w in weights], rows, spec)
    if borders is None:
        o, final = _run(tokens, scale, state, spec)
        return o.to(v.dtype), final
    parts = []
    for n, (start, end) in enumerate(pairwise(borders)):
        own = {key: x[n : n + 1] for key, x in state.items()}
        parts.append(_run(tuple(x[:, start:end] for x in tokens), scale, own, spec))
    final = {key: torch.cat([part[key] for _, part in parts]) for key in state}
    return torch.cat([o for o, _ in parts], 1).to(v.dtype), final
