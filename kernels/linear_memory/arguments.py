"""What both linear memories check of their arguments, and how they call an implementation."""

from collections.abc import Callable

from torch import Tensor

from .. import check


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor | None],
    scale: float | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> None:
    """Raise ValueError naming the argument that does not fit; ``gates`` by their argument's name."""
    check.shape("q", q, [None] * 4, "[B, T, H, D]")
    check.dtype("q", q, check.FLOATS)
    b, t, h, d = q.shape
    kind = check.compute_dtype(q)
    check.require(t > 0, "q.shape", tuple(q.shape), "have at least one token")
    check.shape("k", k, [b, t, h, d], "[B, T, H, D]")
    check.shape("v", v, [b, t, h, None], "[B, T, H, D_v]")
    others = {"k": k, "v": v}
    for name, x in others.items():
        check.dtype(name, x, (q.dtype,))
    for name, gate in gates.items():
        if gate is not None:
            check.shape(name, gate, [b, t, h], "[B, T, H]")
            check.dtype(name, gate, (kind,))
            others[name] = gate
    check.require(
        isinstance(chunk_size, int) and chunk_size > 0, "chunk_size", repr(chunk_size), "be a positive integer"
    )
    check.require(scale is None or isinstance(scale, (int, float)), "scale", repr(scale), "be a number or None")
    check.sequence_borders(cu_seqlens, b, t, q.device)
    if state is not None:
        check.require(set(state) == {"memory"}, "state", f"keys {sorted(state)}", "have the key 'memory' alone")
        rows = b if cu_seqlens is None else cu_seqlens.numel() - 1
        check.shape("state['memory']", state["memory"], [rows, h, d, v.shape[3]], "[N, H, D, D_v]")
        check.dtype("state['memory']", state["memory"], (kind,))
        others["state['memory']"] = state["memory"]
    for name, x in others.items():
        check.device(name, x, q.device)


def call(
    run: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    scale: float | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    return_state: bool,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Output and state of an implementation."""
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    memory = None if state is None else state["memory"]
    o, final = run(q, k, v, beta, log_decay, memory, cu_seqlens, factor, chunk_size)
    return o, {"memory": final} if return_state else None
