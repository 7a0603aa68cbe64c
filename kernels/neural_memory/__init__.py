"""Neural memory: a network per head whose weights are written, token by token, by gradient descent at test time.

    g_t = ∇_W ℓ(M(k_t; W_anchor), v_t)      anchor: the weights at the start of t's chunk
    S_t = η_t S_{t-1} − θ_t g_t
    W_t = a_t W_{t-1} + S_t
    o_t = M(q_t; W_t)                       (or W_{t-1}: ``spec.read_after_write``)

Network, inner loss ℓ, retention, rule and window are choices of :class:`MemorySpec`, which says what each puts in the
place of a line above.

Source: Titans (Behrouz et al., 2024), eqs. 8-15; the chunked form after TTT (Sun et al., 2024).
"""

from functools import partial

import torch
from torch import Tensor

from .. import check
from ..op import register
from . import networks, reference
from .cost import cost
from .coverage import spilling_on, uncovered
from .operator import neural_memory_op
from .spec import LAYER_NORM_EPS, MemorySpec
from .state import fresh_state, halo_shapes, state_names

__all__ = ["LAYER_NORM_EPS", "MemorySpec", "neural_memory", "neural_memory_read", "neural_memory_state"]


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_retain: Tensor | None = None,
    log_momentum: Tensor | None = None,
    *,
    weights: list[Tensor],
    spec: MemorySpec,
    norm: Tensor | None = None,
    gamma: Tensor | None = None,
    delta: Tensor | None = None,
    state: dict[str, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Write (k_t → v_t) and read with q_t, causally, for every token; the recurrence at the top of this module.

    The scale of ℓ (½‖·‖² for l2) is part of θ. Everything is differentiable, second-order terms included.

    Args:
        q: queries [B, T, H, D], float16, bfloat16, float32 or float64.
        k: keys [B, T, H, D], dtype of q.
        v: values [B, T, H, D_v], dtype of q; D_v = D where the network has a residual.
        step: θ ≥ 0, the step size, [B, T, H], float32 (float64 with float64 q). With ``spec.gates`` "channel" this gate
            and the two below are [B, T, H, D_v].
        log_retain: log a ≤ 0, [B, T, H]; None exactly when ``spec.retention`` is "none" or "norm". Finite.
        log_momentum: log η ≤ 0, [B, T, H]; None exactly when ``spec.rule`` is "gd" or "muon_gd". Finite.
        weights: W_0 of each layer, [H, in, out] (``spec.weight_shapes``), shared by all rows; for the retentions lq and
            kl the start of D, from which W_0 follows. With a ``state`` only their shapes matter.
        spec: the network, inner loss and learning rule.
        norm: the LayerNorm's scale [H, D_v] when ``spec.norm``, else None.
        gamma: γ ≥ 0, how much a token's write counts while it is in the window, [B, T, H] in step's dtype; None exactly
            when ``spec.window`` is 1.
        delta: δ > 0, huber's threshold of ‖M(k) − v‖, [B, T, H] in step's dtype; None exactly without huber.
        state: where an earlier call ended (``return_state``), N rows; N = B, or the number of packed sequences.
            Its chunk, if unfinished, goes on.
        cu_seqlens: int32 [N + 1] borders of packed sequences, B = 1. Each starts afresh or from its row of ``state``.
        return_state: also return the state after the last token.
        backend: "reference", "torch" or "triton"; see :mod:`palimpsest.kernels.backend`. What the Triton kernels do not
            cover (:func:`.coverage.uncovered`) runs plain torch.

    Returns:
        o [B, T, H, D_v] in v's dtype, and the state (``weights.i``, ``momentum.i``, ``anchor.i`` [N, H, in, out] in
        float32, ``position`` int32 [N], with a window ``halo.*``; see :func:`.state.pack_state`) or None.

    Raises:
        ValueError: for a wrong shape, dtype, device or combination, naming the argument.
    """
    gates = {"step": step, "log_retain": log_retain, "log_momentum": log_momentum, "gamma": gamma, "delta": delta}
    _check(q, k, v, gates, weights, spec, norm, state, cu_seqlens)
    width = q.shape[-1]
    unfit = uncovered(q.dtype, width, v.shape[-1], spec)
    run = OPERATION.choose(q.device, backend, unfit, spilling_on(width, spec))
    o, final = run(
        q,
        k,
        v,
        step,
        log_retain,
        log_momentum,
        gamma=gamma,
        delta=delta,
        weights=weights,
        spec=spec,
        norm=norm,
        state=state,
        cu_seqlens=cu_seqlens,
    )
    return o, final if return_state else None


def neural_memory_state(weights: list[Tensor], rows: int, spec: MemorySpec) -> dict[str, Tensor]:
    """The state of ``rows`` rows before their first token: W = W_0, S = 0, position 0, nothing in the window.

    Args:
        weights: W_0 of each layer [H, in, out], or what it follows from, as :func:`neural_memory` takes them.
        rows: N.
        spec: the memory; ``momentum.i`` is there for all rules but "gd", ``halo.*`` with a window.
    """
    kind = check.compute_dtype(weights[0])
    return fresh_state([w.to(kind) for w in weights], rows, spec)


def neural_memory_read(
    q: Tensor, *, weights: list[Tensor] | dict[str, Tensor], spec: MemorySpec, norm: Tensor | None = None
) -> Tensor:
    """M(q; W) without a write.

    Args:
        q: queries [B, T, H, D].
        weights: W of each layer, [H, in, out] or one per row [B, H, in, out]; or a state, to read its running weights.
            What W_0 is for the retentions lq and kl, :func:`neural_memory_state` says.
        spec: the memory.
        norm: the LayerNorm's scale [H, D_v] when ``spec.norm``, else None.

    Returns:
        [B, T, H, D_v] in q's dtype.
    """
    if isinstance(weights, dict):
        weights = [weights[f"weights.{i}"] for i in range(spec.layers)]
    check.require((norm is not None) == spec.norm, "norm", _presence(norm), f"be {'given' if spec.norm else 'None'}")
    kind = check.compute_dtype(q)
    matrices = [w.to(kind) for w in weights]
    scale = None if norm is None else norm.to(kind).unsqueeze(-2)
    x = q.to(kind).movedim(2, 1)
    return networks.forward(x, lambda i, hidden: hidden @ matrices[i], scale, spec).movedim(1, 2).to(q.dtype)


def _presence(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"a tensor {tuple(tensor.shape)}"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor | None],
    weights: list[Tensor],
    spec: MemorySpec,
    norm: Tensor | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> None:
    check.require(isinstance(spec, MemorySpec), "spec", type(spec).__name__, "be a MemorySpec")
    check.shape("q", q, [None] * 4, "[B, T, H, D]")
    check.dtype("q", q, check.FLOATS)
    b, t, h, d = q.shape
    kind = check.compute_dtype(q)
    check.shape("k", k, [b, t, h, d], "[B, T, H, D]")
    step = gates["step"]
    check.require(isinstance(step, Tensor), "step", type(step).__name__, "be a tensor [B, T, H]")
    check.shape("v", v, [b, t, h, d if spec.residual else None], "[B, T, H, D_v]")
    _check_gates(gates, [b, t, h, v.shape[-1]], kind, spec)
    for name, x in (("k", k), ("v", v)):
        check.dtype(name, x, (q.dtype,))
    _check_weights(weights, norm, spec, h, d, v.shape[-1])
    check.sequence_borders(cu_seqlens, b, t, q.device)
    if state is not None:
        _check_state(state, weights, spec, b if cu_seqlens is None else cu_seqlens.numel() - 1, kind)
    for name, other in {
        "k": k,
        "v": v,
        **gates,
        "norm": norm,
        **{f"weights[{i}]": w for i, w in enumerate(weights)},
    }.items():
        if other is not None:
            check.device(name, other, q.device)


def _check_gates(gates: dict[str, Tensor | None], shape: list[int], kind: torch.dtype, spec: MemorySpec) -> None:
    for name, wanted, why in (
        ("log_retain", spec.retention_gate, f"retention={spec.retention!r}"),
        ("log_momentum", spec.momentum_gate, f"rule={spec.rule!r}"),
        ("gamma", spec.window > 1, f"window={spec.window}"),
        ("delta", spec.bias == "huber", f"bias={spec.bias!r}"),
    ):
        given = gates[name]
        must = f"be {'given' if wanted else 'None'} for {why}"
        check.require((given is not None) == wanted, name, _presence(given), must)
    for name, gate in gates.items():
        if gate is not None:
            wide = spec.gates == "channel" and name not in ("gamma", "delta")
            check.shape(name, gate, shape if wide else shape[:3], "[B, T, H, D_v]" if wide else "[B, T, H]")
            check.dtype(name, gate, (kind,))


def _check_weights(weights: list[Tensor], norm: Tensor | None, spec: MemorySpec, heads: int, d: int, dv: int) -> None:
    shapes = spec.weight_shapes(heads, d, dv)
    check.require(len(weights) == len(shapes), "weights", f"{len(weights)} tensors", f"be {len(shapes)}, one per layer")
    for i, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        check.shape(f"weights[{i}]", weight, shape, "[H, in, out]")
        check.dtype(f"weights[{i}]", weight, check.FLOATS)
    check.require((norm is not None) == spec.norm, "norm", _presence(norm), f"be {'given' if spec.norm else 'None'}")
    if norm is not None:
        check.shape("norm", norm, [heads, dv], "[H, D_v]")


def _check_state(
    state: dict[str, Tensor], weights: list[Tensor], spec: MemorySpec, rows: int, kind: torch.dtype
) -> None:
    names = [*state_names(spec), "position"]
    check.require(set(state) == set(names), "state", f"keys {sorted(state)}", f"have keys {sorted(names)}")
    halo = halo_shapes(weights, spec)
    for name in names[:-1]:
        part, own = name.split(".")
        shape = halo[own] if part == "halo" else weights[int(own)].shape
        layout = "[N, c - 1, H, ...]" if part == "halo" else "[N, H, in, out]"
        check.shape(f"state[{name!r}]", state[name], [rows, *shape], layout)
        check.dtype(f"state[{name!r}]", state[name], (kind,))
    check.shape("state['position']", state["position"], [rows], "[N]")
    check.dtype("state['position']", state["position"], (torch.int32,))


def _run(q, k, v, step, log_retain, log_momentum, *, gamma, delta, weights, spec, norm, state, cu_seqlens, triton):
    names = state_names(spec)
    held = [] if state is None else [state[name] for name in names]
    inputs = [q, k, v, step, log_retain, log_momentum, gamma, delta, norm, *weights, *held]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out = neural_memory_op(
        q,
        k,
        v,
        step,
        log_retain,
        log_momentum,
        gamma,
        delta,
        weights,
        norm,
        held,
        None if state is None else state["position"],
        cu_seqlens,
        spec.encode(),
        keep,
        triton,
    )
    final = dict(zip([*names, "position"], out[1 : 2 + len(names)], strict=True))
    return out[0], final


OPERATION = register(
    "neural_memory",
    cost=cost,
    reference=reference.neural_memory,
    torch=partial(_run, triton=False),
    triton=partial(_run, triton=True),
)
