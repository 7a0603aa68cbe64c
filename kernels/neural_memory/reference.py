"""Token by token, as the equations read; the inner gradient comes from autograd and from nothing else here.

This is the judge of every other implementation. It is slow, differentiable to any order, and works in the dtype of its
input's accumulations (float64 in, float64 throughout).

    D_t = a_t D_{t-1} + S_t      S_t = η_t S_{t-1} − θ_t Σ_{t−c<i≤t} γ_i ∇_W ℓ(M(k_i; W), v_i) at the chunk's first W

W is D, or what ``spec.retention`` makes of it. What a state calls its anchor is D at the chunk's start.

Gates of channels are of the columns of the last matrix; those before it take the geometric means of a and η, and the
mean of θ.
"""

from itertools import pairwise
from math import log

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from ..check import compute_dtype
from ..newton_schulz.reference import newton_schulz
from .spec import LAYER_NORM_EPS, RETENTION_EPS, MemorySpec
from .state import fresh_state, halo_names, pack_state


def network(x: Tensor, weights: list[Tensor], norm: Tensor | None, spec: MemorySpec) -> Tensor:
    """M(x; W): x [..., H, in], weights of [..., H, in, out], norm [H, out] → [..., H, out]."""

    def times(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden.unsqueeze(-2) @ weight).squeeze(-2)

    if spec.network == "gated_mlp":
        first, second, third = weights
        hidden = times(silu(times(x, first)) * times(x, third), second)
    else:
        hidden = times(x, weights[0])
        for weight in weights[1:]:
            hidden = times(gelu(hidden, approximate="tanh"), weight)
    if norm is not None:
        hidden = layer_norm(hidden, hidden.shape[-1:], eps=LAYER_NORM_EPS) * norm
    return x + hidden if spec.residual else hidden


def inner_loss(out: Tensor, v: Tensor, delta: Tensor | None, spec: MemorySpec) -> Tensor:
    """ℓ of out = M(k) and v [..., D], δ [...] → [...]; that of lp has no closed form."""
    r = out - v
    square = r.square().sum(-1)
    if spec.bias == "l2":
        return 0.5 * square
    if spec.bias == "dot":
        return -(out * v).sum(-1)
    assert delta is not None
    far = square > delta.square()
    size = torch.where(far, square, torch.ones_like(square)).sqrt()  # the root of 0 has no derivative
    return torch.where(far, delta * (size - 0.5 * delta), 0.5 * square)


def _inner_gradient(
    keys: dict[str, Tensor], anchor: list[Tensor], norm: Tensor | None, spec: MemorySpec
) -> list[Tensor]:
    """Σ γ ∇_W ℓ(M(k; W), v) at the anchor over the window's keys k, v [c, N, H, D], γ, δ [c, N, H]; second-order terms
    stay in the graph when the caller records one."""
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        at = [w if recording and w.requires_grad else w.detach().requires_grad_() for w in anchor]
        out = network(keys["k"], at, norm, spec)
        gamma = keys.get("gamma", torch.ones_like(out[..., 0]))
        if spec.bias == "lp":  # only its gradient in r is given: the chain rule goes on from there
            r = out - keys["v"]
            slope = (spec.lp_sharpness * r).tanh() * (r.square() + spec.lp_smoothing) ** ((spec.lp_power - 1) / 2)
            return list(torch.autograd.grad(out, at, gamma.unsqueeze(-1) * slope, create_graph=recording))
        loss = (gamma * inner_loss(out, keys["v"], keys.get("delta"), spec)).sum()
        return list(torch.autograd.grad(loss, at, create_graph=recording))


def _factor(start: Tensor, spec: MemorySpec) -> Tensor:
    """lq's ‖D‖_q^(2−q) at a chunk's start, [N, H, 1, 1]."""
    total = (start.abs() ** spec.lq_power).sum((-2, -1), keepdim=True) + RETENTION_EPS
    return total ** ((2 - spec.lq_power) / spec.lq_power)


def _weights(start: Tensor, spec: MemorySpec) -> Tensor:
    """The weights that follow from D at a chunk's start."""
    if spec.retention == "lq":
        return start * _factor(start, spec)
    return start.softmax(-2) * start.shape[-2] if spec.retention == "kl" else start


def _running(dual: Tensor, start: Tensor, spec: MemorySpec) -> Tensor:
    """W_t as it is read inside a chunk that began with D at ``start``."""
    if spec.retention == "lq":
        return dual * _factor(start, spec)
    return _weights(start, spec) + dual - start if spec.retention == "kl" else dual


def _accumulated(weights: Tensor, start: Tensor, spec: MemorySpec) -> Tensor:
    """D_t from W_t: the inverse of :func:`_running`."""
    if spec.retention == "lq":
        return weights / _factor(start, spec)
    return weights - _weights(start, spec) + start if spec.retention == "kl" else weights


def _end_of_chunk(dual: Tensor, start: Tensor, spec: MemorySpec) -> Tensor:
    """D with which the next chunk starts, from D at the end and at the start of this one."""
    if spec.retention == "kl":
        return dual.log_softmax(-2) + log(dual.shape[-2])
    if spec.retention == "norm":
        now, first = (x.square().sum(-2, keepdim=True) + RETENTION_EPS for x in (dual, start))
        return dual * (first / now).sqrt()
    return dual


def _orthogonal(momentum: Tensor, spec: MemorySpec) -> Tensor:
    """NS(S) of every matrix [N, H, in, out]."""
    flat = momentum.flatten(0, 1)
    return newton_schulz(flat, spec.ns_steps, 3.4445, -4.7750, 2.0315, 1e-7).unflatten(0, momentum.shape[:2])


def _gates_of_matrix(tokens: dict[str, Tensor], t: int, i: int, spec: MemorySpec) -> list[Tensor]:
    """η, θ and a of token t for the i-th matrix, [N, H, 1, 1]; of channels [N, H, 1, D_v] for the last."""
    names = ["momentum", "step", "retain"]
    if spec.gates == "channel" and i == spec.last:
        return [tokens[name][:, t, :, None, :] for name in names]
    if spec.gates == "channel":
        names = [f"mean_{name}" for name in names]
    return [tokens[name][:, t, :, None, None] for name in names]


def _run(
    tokens: dict[str, Tensor], norm: Tensor | None, state: dict[str, Tensor], spec: MemorySpec
) -> tuple[Tensor, dict[str, Tensor]]:
    """The recurrence over dense rows: q, k, v [N, T, H, D]; step, a, η [N, T, H], of channels [N, T, H, D_v] and their
    means [N, T, H]; γ, δ [N, T, H]."""
    n, names = spec.layers, halo_names(spec)
    anchor = [state[f"anchor.{i}"] for i in range(n)]
    dual = [_accumulated(state[f"weights.{i}"], anchor[i], spec) for i in range(n)]
    velocity = [state[f"momentum.{i}"] if spec.has_momentum else torch.zeros_like(anchor[i]) for i in range(n)]
    # The window before token t and t itself are those at t .. t + c − 1.
    seen = {name: x for name, x in tokens.items() if name in ("k", "v", "gamma", "delta")}
    seen |= {name: torch.cat([state[f"halo.{name}"], seen[name]], 1) for name in names}
    position, outputs = state["position"], []
    for t in range(tokens["q"].shape[1]):
        before = list(dual)
        window = {name: seen[name][:, t : t + spec.window].movedim(1, 0) for name in seen}
        gradient = _inner_gradient(window, [_weights(u, spec) for u in anchor], norm, spec)
        for i in range(n):
            eta, theta, a = _gates_of_matrix(tokens, t, i, spec)
            velocity[i] = eta * velocity[i] - theta * gradient[i]
            dual[i] = a * dual[i] if spec.orthogonal else a * dual[i] + velocity[i]
        now = dual if spec.read_after_write else before
        read = [_running(d, u, spec) for d, u in zip(now, anchor, strict=True)]
        outputs.append(network(tokens["q"][:, t], read, norm, spec))
        position = (position + 1) % spec.chunk_size
        if spec.orthogonal:
            turned = (position % spec.step_size == 0)[:, None, None, None]
            dual = [torch.where(turned, d + _orthogonal(s, spec), d) for d, s in zip(dual, velocity, strict=True)]
            if spec.rule == "muon_gd":
                velocity = [torch.where(turned, torch.zeros_like(s), s) for s in velocity]
        ended = (position == 0)[:, None, None, None]
        dual = [torch.where(ended, _end_of_chunk(d, u, spec), d) for d, u in zip(dual, anchor, strict=True)]
        anchor = [torch.where(ended, d, u) for d, u in zip(dual, anchor, strict=True)]
    halo = {name: seen[name][:, tokens["q"].shape[1] :] for name in names}
    read = [_running(d, u, spec) for d, u in zip(dual, anchor, strict=True)]
    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(tokens["v"])
    held = velocity if spec.has_momentum else []
    return o, pack_state(read, held, anchor, position, halo)


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_retain: Tensor | None,
    log_momentum: Tensor | None,
    *,
    gamma: Tensor | None,
    delta: Tensor | None,
    weights: list[Tensor],
    spec: MemorySpec,
    norm: Tensor | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See :func:`palimpsest.kernels.neural_memory`."""
    kind = compute_dtype(q)
    retain = torch.ones_like(step) if log_retain is None else log_retain.exp()
    still = torch.ones_like(step) if spec.rule == "muon_gd" else torch.zeros_like(step)
    momentum = still if log_momentum is None else log_momentum.exp()
    given = {"q": q, "k": k, "v": v, "step": step, "retain": retain, "momentum": momentum}
    if spec.gates == "channel":
        given["mean_step"] = step.mean(-1)
        given["mean_retain"] = retain.mean(-1) if log_retain is None else log_retain.mean(-1).exp()
        given["mean_momentum"] = momentum.mean(-1) if log_momentum is None else log_momentum.mean(-1).exp()
    given |= {name: x for name, x in (("gamma", gamma), ("delta", delta)) if x is not None}
    tokens = {name: x.to(kind) for name, x in given.items()}
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
        parts.append(_run({name: x[:, start:end] for name, x in tokens.items()}, scale, own, spec))
    final = {key: torch.cat([part[key] for _, part in parts]) for key in state}
    return torch.cat([o for o, _ in parts], 1).to(v.dtype), final
