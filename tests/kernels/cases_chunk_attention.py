"""Conformance cases of attention over chunks: both reads, choices shared or not, all candidates or a tree."""

from functools import partial
from typing import Any

import torch
from harness import Draw, OperationCase, register_case
from torch import Tensor

from palimpsest.kernels import ChunkLayout, chunk_attention, select_chunks
from palimpsest.kernels.chunk_attention.cost import cost, select_cost
from palimpsest.kernels.op import Cost


def layout_of(q: Tensor, chunk_size: int, share: int, cu_seqlens: Tensor | None) -> ChunkLayout:
    """Chunks of rows or of documents."""
    if cu_seqlens is not None:
        return ChunkLayout.packed(cu_seqlens, q.shape[1], chunk_size, share)
    return ChunkLayout.regular(*q.shape[:2], chunk_size, share, q.device)


def summaries(x: Tensor, layout: ChunkLayout) -> Tensor:
    """[N, Nc, Hs, E], each chunk's last token: exact in every dtype."""
    last = layout.end.long() - 1
    return x.flatten(0, 1)[last.clamp(min=0)].view(x.shape[0], -1, *x.shape[2:])


def make(
    draw: Draw, batch: int, length: int, *, heads: int, shared: int, choosers: int, top_k: int, chunk_size: int,
    share: int,
) -> dict[str, Any]:  # fmt: skip
    """Heads of width 8, summaries of width 4, whose keys are given token by token."""
    return {
        "q": draw.normal(batch, length, heads, 8),
        "k": draw.normal(batch, length, shared, 8),
        "v": draw.normal(batch, length, shared, 8),
        "summary_q": draw.normal(batch, length, choosers, 4),
        "summary": draw.normal(batch, length, choosers, 4),
        "top_k": top_k,
        "chunk_size": chunk_size,
        "share": share,
    }


def call(
    q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, summary: Tensor, top_k: int, chunk_size: int, share: int, *,
    read: str, cu_seqlens: Tensor | None = None, backend: str,
) -> Tensor:  # fmt: skip
    """Attention over chunks."""
    layout = layout_of(q, chunk_size, share, cu_seqlens)
    summary_k = summaries(summary, layout)
    return chunk_attention(q, k, v, summary_q, summary_k, top_k=top_k, layout=layout, read=read, backend=backend)


def call_select(
    q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, summary: Tensor, top_k: int, chunk_size: int, share: int, *,
    branching: int | None = None, cu_seqlens: Tensor | None = None, backend: str,
) -> Tensor:  # fmt: skip
    """Relevance of what is chosen, which alone has gradients, and the choice, counted from a document's first chunk."""
    layout = layout_of(q, chunk_size, share, cu_seqlens)
    summary_k = summaries(summary, layout)
    chosen = select_chunks(summary_q, summary_k, layout, top_k, branching=branching, backend=backend).long()
    head = torch.arange(summary_q.shape[2], device=q.device)[:, None]
    read = summary_k.flatten(0, 1)[chosen.clamp(min=0), head]
    score = torch.where(chosen < 0, 0.0, (read * summary_q[..., None, :]).sum(-1))
    first = layout.first.view(*chosen.shape[:2], 1, 1)
    return torch.cat([score, torch.where(chosen < 0, -1, chosen - first).to(score.dtype)], -1)


def costs(arguments: dict[str, Any], read: str) -> tuple[Cost, Cost]:
    """Of forward and backward, the choice with the first."""
    q, k, summary_q = (arguments[name].shape for name in ("q", "k", "summary_q"))
    chunk_size, share, top_k = (arguments[name] for name in ("chunk_size", "share", "top_k"))
    summary_k = (q[0], -(-q[1] // chunk_size), *summary_q[2:])
    kept = min(top_k, summary_k[1])
    of = partial(cost, q, k, summary_q, summary_k, kept, chunk_size=chunk_size, union=read == "union")
    return of() + select_cost(summary_q, summary_k, top_k, share=share), of(backward=True)


PLAIN = ("reference", "torch")
SHAPES = {
    "heads": {"heads": 2, "shared": 2, "choosers": 1, "top_k": 2, "chunk_size": 2, "share": 1},
    # So many rows read the same that plain torch gathers, where there are chunks enough.
    "gathered": {"heads": 16, "shared": 1, "choosers": 1, "top_k": 2, "chunk_size": 2, "share": 2},
    "triton": {"heads": 2, "shared": 1, "choosers": 1, "top_k": 2, "chunk_size": 3, "share": 3},
}

for read in ("two_level", "union"):
    for name, shape in SHAPES.items():
        register_case(
            OperationCase(
                name=f"chunk_attention/{read}_{name}",
                operation="chunk_attention",
                call=partial(call, read=read),
                make=partial(make, **shape),
                tokens=("q", "k", "v", "summary_q", "summary"),
                packed=True,
                block=shape["chunk_size"] + 1,
                cost=partial(costs, read=read),
                backends=("triton",) if name == "triton" else PLAIN,
            )
        )

for name, branching in {"all": None, "tree": 2}.items():
    register_case(
        OperationCase(
            name=f"select_chunks/{name}",
            operation="select_chunks",
            call=partial(call_select, branching=branching),
            make=partial(make, **SHAPES["heads"]),
            tokens=("q", "k", "v", "summary_q", "summary"),
            packed=True,
            block=3,
            backends=PLAIN if branching else (*PLAIN, "triton"),
            half=False,  # rounded summaries may choose otherwise
        )
    )
