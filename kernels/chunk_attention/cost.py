"""What attention over chosen chunks must compute and move, from shapes alone."""

from collections.abc import Sequence
from math import prod

from ..op import Cost


def select_cost(
    summary_q: Sequence[int], summary_k: Sequence[int], top_k: int, *, share: int = 1, branching: int | None = None,
    itemsize: int = 4,
) -> Cost:  # fmt: skip
    """Cost of :func:`palimpsest.kernels.select_chunks`: every leader with every chunk of its row, or down a tree."""
    batch, length, heads, width = summary_q
    rows, chunks = summary_k[:2]
    leaders, scored = batch * -(-length // share), chunks if batch == rows else rows * chunks
    if branching is not None:
        levels, size = 1, 1
        while size < rows * chunks:
            levels, size = levels + 1, size * branching
        scored = levels * (top_k + 1) * branching
    moved = itemsize * (leaders * heads * width + prod(summary_k)) + 4 * batch * length * heads * top_k
    return Cost(2 * leaders * scored * heads * width, moved)


def cost(
    q: Sequence[int],
    k: Sequence[int],
    summary_q: Sequence[int],
    summary_k: Sequence[int],
    top_k: int,
    *,
    chunk_size: int = 0,
    share: int = 1,
    union: bool = False,
    itemsize: int = 4,
    backward: bool = False,
) -> Cost:
    """Cost of one call without its selection, every query with full chunks, the first four being shapes.

    Two products forward, five backward, as in attention over a window; a two-level read also scores what was chosen, a
    union also reads half of a chunk beside. ``chunk_size`` 0: as if chunks were of one length.
    """
    batch, length, heads, width = q
    chunks = summary_k[1]
    size = chunk_size or -(-k[1] // chunks)
    kept = min(top_k, chunks)
    pairs = batch * length * heads * (min(kept * size, k[1]) + (size // 2 if union else 0))
    flops = (5 if backward else 2) * 2 * width * pairs
    scored = 0 if union else batch * length * summary_q[2] * kept
    flops += (3 if backward else 1) * 2 * summary_q[3] * scored
    moved = (4 if backward else 2) * prod(q) + (2 if backward else 1) * 2 * prod(k)
    summaries = 0 if union else (2 if backward else 1) * (prod(summary_q) + prod(summary_k))
    kept_numbers = batch * length * (heads * (1 if union else kept) + 2 * summary_q[2] * kept)
    return Cost(flops, (moved + summaries) * itemsize + 4 * kept_numbers)
