"""Attention over chosen chunks of a memory: first over their summaries, then in detail inside of the best."""

import math

import torch
from torch import Tensor

from .. import check
from ..op import register
from . import operator, reference
from .cost import cost, select_cost
from .layout import ChunkLayout

__all__ = ["ChunkLayout", "chunk_attention", "select_chunks"]

ATTEND = register(
    "chunk_attention",
    cost=cost,
    reference=reference.chunk_attention,
    torch=operator.chunk_attention,
    triton=operator.chunk_attention_triton,
)
SELECT = register(
    "select_chunks",
    cost=select_cost,
    reference=reference.select,
    torch=operator.select,
    triton=operator.select_triton,
)

READS = ("two_level", "union")
WIDEST, MOST = 128, 64  # widths of heads and summaries, and chunks of a choice, that fit the Triton kernels' registers


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_q: Tensor,
    summary_k: Tensor,
    *,
    top_k: int,
    chunk_size: int | None = None,
    cu_chunks: Tensor | None = None,
    layout: ChunkLayout | None = None,
    cu_seqlens: Tensor | None = None,
    read: str = "two_level",
    share: int = 1,
    scale: float | None = None,
    summary_scale: float | None = None,
    selection: Tensor | None = None,
    return_selection: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query over the chunks that it finds most relevant among those completed before its own.

        r_i = summary_scale * summary_q . summary_k_i       over the candidates, see :class:`ChunkLayout`
        S = the top_k largest r of the query's leader       of equal ones the lower chunk
        two_level:  o = sum_i w_i sum_j softmax_j(scale * q . k_ij) v_ij       w = softmax of the query's own r over S
        union:      o = sum_j softmax_j(scale * q . k_j) v_j       over the tokens of all of S and the local ones

    Two-level is the memory of Lampinen et al. 2021 (Hierarchical Chunk Attention Memory): its weights w are
    differentiable, so that the summaries learn from the loss. Union is the read of MoBA and NSA, in which S has no
    gradient: neither have the summaries. A query with nothing to attend gives 0, and gradients of 0. The backward keeps
    a log-sum-exp per query, head and chosen chunk, the weights and the choice; it adds up gradients of a chunk in the
    order of the queries.

    It wins over :func:`palimpsest.kernels.window_attention` without a window from about 1024 tokens on, a union from
    2048. On one core of a CPU beside other work, forward and backward, float32, 4 heads of 64, and 4 chunks of 32,
    which 64 queries choose together, it was so many times as fast (one round each):

        tokens        1024   2048   4096
        two_level      1.5    1.3    2.3
        union          0.7    1.5    2.5

        python -m palimpsest.kernels.profile bench --device cpu --rounds 1 \\
            --only chunk_attention window_attention/causal --sweep T=1k..4k

    Where each query chooses for itself (share = 1) it is slower than window_attention at such lengths: what is gathered
    is used once.

    Args:
        q: [B, T, H, D], float16, bfloat16, float32 or float64.
        k, v: the memory [N, S, Hkv, D] in q's dtype; H is a multiple of Hkv, query head h reads key head
            h // (H / Hkv).
        summary_q: [B, T, Hs, E] in q's dtype; H is a multiple of Hs, head h reads what h // (H / Hs) chose.
        summary_k: [N, Nc, Hs, E], a summary of each chunk; those of empty chunks are not read.
        top_k: chunks that are chosen, at least 1.
        chunk_size: tokens of a chunk: rows of the memory are those of the queries (S = T), Nc = ceil(T / chunk_size);
            with ``cu_seqlens`` Nc = T // chunk_size + documents.
        cu_chunks: int32 [Nc + 1] instead, borders of chunks of any lengths in one row (B = N = 1).
        layout: a :class:`ChunkLayout` instead, for all else. Exactly one of the three is given.
        cu_seqlens: int32 [documents + 1], borders of documents packed into one row (B = 1), with ``chunk_size`` or
            ``cu_chunks``.
        read: "two_level" or "union".
        share: queries, from a multiple of it on, that read what the first of them chooses; that of the layout, if one
            is given. Each reads only what was complete at the start of the chunk in which the first one lies.
        scale: of the scores of tokens; None: D ** -0.5.
        summary_scale: of those of chunks; None: E ** -0.5.
        selection: int32 [B, T, Hs, K], chunks to read instead of the best, -1 after the last; of a leader's queries the
            leader's own row counts, and it must hold candidates, none of them twice.
        return_selection: also return what was read, [B, T, Hs, top_k].
        backend: "reference", "torch" or "triton" (not float64; D, E <= 128, K <= 64); None: see
            :func:`palimpsest.kernels.backend.resolve`.

    Returns: o [B, T, H, D], or o and the selection.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    _check_memory(q, k, v, summary_q, summary_k)
    check.require(read in READS, "read", repr(read), f"be one of {READS}")
    layout = _layout(q, k, chunk_size, cu_chunks, layout, cu_seqlens, share)
    _check_layout(layout, q, k, summary_k)
    scale = _scale("scale", scale, q.shape[3])
    if selection is None:
        selection = select_chunks(
            summary_q, summary_k, layout, top_k, summary_scale=summary_scale, backend=backend
        )  # fmt: skip
    else:
        _positive("top_k", top_k)
        check.shape("selection", selection, (*summary_q.shape[:3], None), "[B, T, Hs, K]")
        check.dtype("selection", selection, (torch.int32,))
        check.device("selection", selection, q.device)
        check.require(selection.shape[3] > 0, "selection.shape", tuple(selection.shape), "have at least one choice")
    run = ATTEND.choose(q.device, backend, _unfit(q, summary_q, selection.shape[3]))
    chosen = selection[..., : summary_k.shape[1]]  # more cannot have been chosen
    summary_scale = _scale("summary_scale", summary_scale, summary_q.shape[3])
    o = run(q, k, v, summary_q, summary_k, chosen, layout, read == "union", scale, summary_scale)
    return (o, selection) if return_selection else o


def select_chunks(
    summary_q: Tensor,
    summary_k: Tensor,
    layout: ChunkLayout,
    top_k: int,
    *,
    summary_scale: float | None = None,
    branching: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The chunks that :func:`chunk_attention` reads: the ``top_k`` most relevant candidates of each query's leader.

    With ``branching`` b they are found in a tree whose nodes are means of the b summaries below, empty chunks left out,
    in O(b top_k log Nc) per leader instead of Nc: from the root down, the best top_k nodes of a level are kept. A
    query's candidates fall into whole nodes, counted from its own first one, at most b - 1 of a level, so that no mean
    holds a chunk that the query may not see. With up to b top_k candidates the choice is the exact one. Every call
    makes its tree, in O(b Nc log Nc): it pays for many queries, not for one.

    Args:
        summary_q: [B, T, Hs, E], float16, bfloat16, float32 or float64; relevance is float32 at least.
        summary_k: [N, Nc, Hs, E] in the same dtype.
        layout: chunks and candidates.
        top_k: chunks to choose, at least 1.
        summary_scale: None: E ** -0.5.
        branching: None, or at least 2.
        backend: see :func:`chunk_attention`; a tree is plain torch alone.

    Returns: int32 [B, T, Hs, top_k], the best first, the lower of equals first, then -1; no gradient.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    _check_summaries(summary_q, summary_k)
    _positive("top_k", top_k)
    if branching is not None:
        check.require(isinstance(branching, int) and branching >= 2, "branching", branching, "be None or at least 2")
    _check_sizes(layout, summary_q, summary_k)
    scale = _scale("summary_scale", summary_scale, summary_q.shape[3])
    unfit = _unfit(summary_q, summary_q, top_k) if branching is None else ("branching", branching, "be None")
    run = SELECT.choose(summary_q.device, backend, unfit)
    return run(summary_q, summary_k, layout, top_k, scale, branching)


def _unfit(q: Tensor, summary_q: Tensor, kept: int) -> tuple[str, object, str] | None:
    """Why the Triton kernels do not cover a call."""
    for name, size, most in (("D of q", q.shape[3], WIDEST), ("E of summary_q", summary_q.shape[3], WIDEST)):
        if size > most:
            return name, size, f"be at most {most}"
    return ("top_k", kept, f"be at most {MOST}") if kept > MOST else check.no_float64("q", q)


def _layout(
    q: Tensor,
    k: Tensor,
    chunk_size: int | None,
    cu_chunks: Tensor | None,
    layout: ChunkLayout | None,
    cu_seqlens: Tensor | None,
    share: int,
) -> ChunkLayout:
    """The layout that one of three arguments describes."""
    given = {"chunk_size": chunk_size, "cu_chunks": cu_chunks, "layout": layout}
    names = [name for name, value in given.items() if value is not None]
    check.require(len(names) == 1, "chunk_size, cu_chunks, layout", names, "be one of the three, and only one")
    batch, length = q.shape[:2]
    if layout is not None:
        check.require(isinstance(layout, ChunkLayout), "layout", type(layout).__name__, "be a ChunkLayout")
        check.require(cu_seqlens is None, "cu_seqlens", "given", "be None with a layout, which holds the documents")
        return layout
    check.require(k.shape[:2] == q.shape[:2], "k.shape", tuple(k.shape), f"begin with q's B, T = {batch}, {length}")
    check.sequence_borders(cu_seqlens, batch, length, q.device)
    if cu_chunks is not None:
        check.require(batch == 1, "batch size with cu_chunks", batch, "be 1: variable chunks lie in one row")
        check.device("cu_chunks", cu_chunks, q.device)
        return ChunkLayout.borders(cu_chunks, length, share, cu_seqlens)
    if cu_seqlens is not None:
        return ChunkLayout.packed(cu_seqlens, length, chunk_size, share)  # type: ignore[arg-type]
    return ChunkLayout.regular(batch, length, chunk_size, share, q.device)  # type: ignore[arg-type]


def _positive(name: str, value: int) -> None:
    check.require(isinstance(value, int) and value >= 1, name, value, "be an integer >= 1")


def _scale(name: str, value: float | None, width: int) -> float:
    check.require(value is None or math.isfinite(value), name, value, "be None or finite")
    return width**-0.5 if value is None else float(value)


def _check_summaries(summary_q: Tensor, summary_k: Tensor) -> None:
    check.shape("summary_q", summary_q, (None, None, None, None), "[B, T, Hs, E]")
    check.dtype("summary_q", summary_q, check.FLOATS)
    check.require(summary_q.numel() > 0, "summary_q.shape", tuple(summary_q.shape), "have no size of 0")
    check.shape("summary_k", summary_k, (None, None, *summary_q.shape[2:]), "[N, Nc, Hs, E]")
    check.require(summary_k.numel() > 0, "summary_k.shape", tuple(summary_k.shape), "have no size of 0")
    check.dtype("summary_k", summary_k, (summary_q.dtype,))
    check.device("summary_k", summary_k, summary_q.device)


def _check_memory(q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, summary_k: Tensor) -> None:
    check.shape("q", q, (None, None, None, None), "[B, T, H, D]")
    check.dtype("q", q, check.FLOATS)
    check.require(q.numel() > 0, "q.shape", tuple(q.shape), "have no size of 0")
    batch, length, heads, width = q.shape
    check.shape("k", k, (None, None, None, width), "[N, S, Hkv, D]")
    check.require(k.numel() > 0, "k.shape", tuple(k.shape), "have no size of 0")
    check.require(heads % k.shape[2] == 0, "H of q", heads, f"be a multiple of Hkv = {k.shape[2]}")
    check.shape("v", v, tuple(k.shape), "[N, S, Hkv, D]")
    check.shape("summary_q", summary_q, (batch, length, None, None), "[B, T, Hs, E]")
    _check_summaries(summary_q, summary_k)
    check.require(heads % summary_q.shape[2] == 0, "H of q", heads, f"be a multiple of Hs = {summary_q.shape[2]}")
    check.require(k.shape[0] == summary_k.shape[0], "summary_k.shape", tuple(summary_k.shape), f"have N = {k.shape[0]}")
    for name, tensor in {"k": k, "v": v, "summary_q": summary_q}.items():
        check.dtype(name, tensor, (q.dtype,))
        check.device(name, tensor, q.device)


def _check_sizes(layout: ChunkLayout, queries: Tensor, summary_k: Tensor) -> None:
    """Check that a layout has as many chunks and queries as there are, in the same place."""
    chunks, count = summary_k.shape[0] * summary_k.shape[1], queries.shape[0] * queries.shape[1]
    found = layout.start.numel()
    check.require(found == chunks, "summary_k.shape", tuple(summary_k.shape), f"have N Nc = {found}, as laid out")
    found = layout.leader.numel()
    check.require(found == count, "layout", f"one of {found} queries", f"be one of B T = {count}")
    check.device("layout", layout.start, queries.device)


def _check_layout(layout: ChunkLayout, q: Tensor, k: Tensor, summary_k: Tensor) -> None:
    _check_sizes(layout, q, summary_k)
