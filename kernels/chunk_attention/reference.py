"""Attention over chosen chunks, one query and head at a time."""

import torch
from torch import Tensor

from .layout import ChunkLayout


def select(
    summary_q: Tensor, summary_k: Tensor, layout: ChunkLayout, top_k: int, scale: float, branching: int | None
) -> Tensor:
    """Chosen chunks [B, T, Hs, K] by Python's sort; for every query those of its leader."""
    batch, length, choosers, _ = summary_q.shape
    queries, chunks = summary_q.detach().flatten(0, 1), summary_k.detach().flatten(0, 1)
    full = (layout.end > layout.start).tolist()
    first, last, leader = (x.tolist() for x in (layout.first, layout.last, layout.leader))
    chosen: list[list[list[int]]] = []
    for t in range(batch * length):
        if leader[t] != t:
            chosen.append(chosen[leader[t]])
            continue
        row = []
        for s in range(choosers):
            if branching is None:
                kept = [(c, 1) for c in range(first[t], last[t]) if full[c]]
                kept = _best(queries[t, s], chunks[:, s], full, kept, top_k, scale)
            else:
                kept = _descend(queries[t, s], chunks[:, s], full, first[t], last[t], top_k, scale, branching)
            row.append([c for c, _ in kept] + [-1] * (top_k - len(kept)))
        chosen.append(row)
    found = torch.tensor(chosen, dtype=torch.int32, device=summary_q.device)
    return found.view(batch, length, choosers, top_k)


def _best(
    query: Tensor, chunks: Tensor, full: list[bool], nodes: list[tuple[int, int]], top_k: int, scale: float
) -> list[tuple[int, int]]:
    """The ``top_k`` best of nodes (first chunk, size), by the mean of their chunks that are not empty."""
    scored = []
    for begin, size in nodes:
        members = [c for c in range(begin, min(begin + size, len(full))) if full[c]]
        if members:
            value = (scale * (query @ chunks[members].mean(0))).nan_to_num(float("-inf"), float("inf"), float("-inf"))
            scored.append((-value.item(), begin, size))
    return [(begin, size) for _, begin, size in sorted(scored)[:top_k]]


def _descend(
    query: Tensor, chunks: Tensor, full: list[bool], first: int, last: int, top_k: int, scale: float, b: int
) -> list[tuple[int, int]]:
    """From the root of the tree down: of a level the children of what was kept, and the whole nodes that are new."""
    size = 1
    while size < len(full):
        size *= b
    kept: list[tuple[int, int]] = []
    while size:
        count = last - first
        above = first + count // (size * b) * (size * b)
        nodes = [(begin + i * size, size) for begin, _ in kept for i in range(b)]
        nodes += [(above + i * size, size) for i in range(count // size % b)]
        kept = _best(query, chunks, full, nodes, top_k, scale)
        size //= b
    return kept


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_q: Tensor,
    summary_k: Tensor,
    selection: Tensor,
    layout: ChunkLayout,
    union: bool,
    scale: float,
    summary_scale: float,
) -> Tensor:
    """o [B, T, H, D]; the chosen chunks of a query are those of its leader, and none is below 0."""
    batch, length, heads, _ = q.shape
    queries, keys, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    choosing, chunks = summary_q.flatten(0, 1), summary_k.flatten(0, 1)
    start, end, local, own, leader = (
        x.tolist() for x in (layout.start, layout.end, layout.local, layout.own, layout.leader)
    )
    chosen = selection.flatten(0, 1).tolist()
    outputs = []
    for t in range(batch * length):
        for h in range(heads):
            s, g = h * summary_q.shape[2] // heads, h * k.shape[2] // heads
            ids = [c for c in chosen[leader[t]][s] if c >= 0 and end[c] > start[c]]
            parts = [list(range(start[c], end[c])) for c in ids]
            o = queries[t, h] * 0
            if union:
                parts = [sum(parts, list(range(local[t], own[t])))]
            elif ids:
                share = torch.softmax(summary_scale * (chunks[ids, s] @ choosing[t, s]), 0)
            for i, tokens in enumerate(parts):
                if tokens:
                    weights = torch.softmax(scale * (keys[tokens, g] @ queries[t, h]), 0)
                    mixed = weights @ values[tokens, g]
                    o = o + (mixed if union else share[i] * mixed)
            outputs.append(o)
    return torch.stack(outputs).view(q.shape)
