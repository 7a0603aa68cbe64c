"""Causal softmax attention over a sliding window and an always-visible prefix."""

import math

import torch
from torch import Tensor

from .. import check
from ..op import register
from ..packing import tail
from . import chunked, flash, fused, reference
from .cost import cost

__all__ = ["window_attention"]

OPERATION = register(
    "window_attention",
    cost=cost,
    reference=reference.window_attention,
    torch=chunked.window_attention,
    triton=fused.window_attention,
)

WIDEST = 128  # heads whose tiles fit the registers of the Triton kernels


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    state: dict[str, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Causal attention in which token t sees tokens t - window + 1 .. t and all of a prefix.

        o_t = sum_j softmax_j(scale * q_t . k_j) v_j     over j in prefix + {t - window + 1 .. t}

    Rotary embeddings are applied outside. The sliding window is that of Titans' MAG and MAL, the prefix its
    persistent tokens (Behrouz et al. 2025, section 4.2).

    Args:
        q: [B, T, H, D], float16, bfloat16, float32 or float64.
        k, v: [B, T, Hkv, D] in q's dtype; H is a multiple of Hkv, and query head h reads key head h // (H / Hkv).
        window: tokens seen, the current one among them; None: all.
        prefix: keys and values, each [P, Hkv, D], the same for every row and document.
        scale: of the scores; None: D ** -0.5.
        state: what went before, N = B or the number of packed documents. ``k``, ``v`` [N, S, Hkv, D]: the last S
            tokens, right-aligned; ``count`` int32 [N]: how many of them each row really has, 0 for a fresh row. With a
            window, entries beyond the last window - 1 are not read.
        cu_seqlens: int32 [N + 1], borders of documents packed into one row (B = 1).
        return_state: also return the state after the last token, min(S + T, window - 1) entries per row.
        backend: "reference", "torch" or "triton" (not float64, D <= 128); None: on a GPU flash-attn or torch's own
            attention where one of them has the call, else see :func:`palimpsest.kernels.backend.resolve`.

    Returns: o [B, T, H, D] and the state, or None.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    _check(q, k, v, window, prefix, scale, state, cu_seqlens)
    if prefix is not None and prefix[0].shape[0] == 0:
        prefix = None
    if state is not None and state["k"].shape[1] == 0:
        state = None
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    run = OPERATION.choose(q.device, backend, _unfit(q))
    if backend is None and run is fused.window_attention and prefix is None and state is None:
        everything = window is None and cu_seqlens is None
        if flash.choose(q.device, q.dtype, q.shape[3], everything) is not None:
            run = chunked.window_attention
    o = run(q, k, v, prefix, state, cu_seqlens, window, scale)
    return o, _next_state(k, v, window, state, cu_seqlens) if return_state else None


def _unfit(q: Tensor) -> tuple[str, object, str] | None:
    """Why the Triton kernels do not cover a call."""
    if q.shape[3] > WIDEST:
        return "D of q", q.shape[3], f"be at most {WIDEST}"
    return check.no_float64("q", q)


def _next_state(
    k: Tensor, v: Tensor, window: int | None, state: dict[str, Tensor] | None, cu_seqlens: Tensor | None
) -> dict[str, Tensor]:
    """The last tokens of every row or document. Sizes follow from shapes alone: a packed document may be all of T."""
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    past = 0 if state is None else state["k"].shape[1]
    size = past + k.shape[1] if window is None else min(past + k.shape[1], window - 1)
    fresh = k.new_empty(rows, 0, *k.shape[2:])
    count = torch.zeros(rows, dtype=torch.int32, device=k.device) if state is None else state["count"]
    seen = k.shape[1] if cu_seqlens is None else cu_seqlens.diff()
    return {
        "k": tail(k, fresh if state is None else state["k"], size, cu_seqlens),
        "v": tail(v, fresh if state is None else state["v"], size, cu_seqlens),
        "count": (count + seen).clamp(max=size),
    }


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    prefix: tuple[Tensor, Tensor] | None,
    scale: float | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> None:
    check.shape("q", q, (None, None, None, None), "[B, T, H, D]")
    check.dtype("q", q, check.FLOATS)
    batch, length, heads, width = q.shape
    check.require(length > 0 and width > 0, "q.shape", tuple(q.shape), "have at least one token and one channel")
    check.shape("k", k, (batch, length, None, width), "[B, T, Hkv, D]")
    shared = k.shape[2]
    check.require(shared > 0 and heads % shared == 0, "H of q", heads, f"be a multiple of Hkv = {shared}")
    check.shape("v", v, (batch, length, shared, width), "[B, T, Hkv, D]")
    like_q = {"k": k, "v": v}
    if window is not None:
        check.require(isinstance(window, int) and window >= 1, "window", window, "be None or an integer >= 1")
    if scale is not None:
        check.require(math.isfinite(scale), "scale", scale, "be None or finite")
    if prefix is not None:
        check.require(
            isinstance(prefix, tuple | list) and len(prefix) == 2, "prefix", type(prefix).__name__, "be (k, v)"
        )
        check.shape("prefix[0]", prefix[0], (None, shared, width), "[P, Hkv, D]")
        check.shape("prefix[1]", prefix[1], (prefix[0].shape[0], shared, width), "[P, Hkv, D]")
        like_q |= {"prefix[0]": prefix[0], "prefix[1]": prefix[1]}
    check.sequence_borders(cu_seqlens, batch, length, q.device)
    if state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        missing = [name for name in ("k", "v", "count") if name not in state]
        check.require(not missing, "state", sorted(state), "hold k, v and count")
        check.shape("state['k']", state["k"], (rows, None, shared, width), "[N, S, Hkv, D]")
        cached = state["k"].shape[1]
        check.shape("state['v']", state["v"], (rows, cached, shared, width), "[N, S, Hkv, D]")
        check.shape("state['count']", state["count"], (rows,), "[N]")
        check.dtype("state['count']", state["count"], (torch.int32,))
        check.device("state['count']", state["count"], q.device)
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            counts = state["count"].tolist()
            check.require(all(0 <= n <= cached for n in counts), "state['count']", counts, f"lie in 0 .. S = {cached}")
        like_q |= {"state['k']": state["k"], "state['v']": state["v"]}
    for name, tensor in like_q.items():
        check.dtype(name, tensor, (q.dtype,))
        check.device(name, tensor, q.device)
