"""Window attention, a block of queries at a time, over views of the keys that the block can see.

Time is O(T * (window + prefix)) and memory O(T); without a window, O(T^2) and O(T). Packed documents are taken one by
one. On a CPU the block kernel is ATen's flash attention, elsewhere the products themselves; the backward goes on from
the log-sum-exp. What :mod:`.flash` can express on a GPU runs there instead, and training on a CPU with few keys in
:mod:`.kept`.
"""

import torch
from torch import Tensor

from ..check import compute_dtype
from ..op import flop_formula
from ..operator import absent, operator, present
from . import flash, kept
from .blocks import Piece, block_backward, block_forward, blocks, heads_first, pieces
from .cost import cost

Pair = tuple[Tensor, Tensor]


def pair(first: Tensor | None, second: Tensor | None) -> Pair | None:
    """Two optional arguments of an operator that come together or not at all."""
    return None if first is None or second is None else (first, second)


def with_prefix(prefix: Tensor | None, x: Tensor) -> Tensor:
    """[P, H, D] before every row of x [B, T, H, D], as the kernels read them: [B, H, P + T, D]."""
    if prefix is not None:
        x = torch.cat([prefix.expand(x.shape[0], *prefix.shape), x], 1)
    return heads_first(x)


def piece_forward(
    q: Tensor, piece: Piece, prefix: Pair | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, T, H, D] of one piece and its log-sum-exp [B, H, T]."""
    extra = 0 if prefix is None else prefix[0].shape[0]
    parts = [
        block_forward(
            heads_first(q[:, block.rows]),
            with_prefix(prefix and prefix[0], piece.k[:, block.columns]),
            with_prefix(prefix and prefix[1], piece.v[:, block.columns]),
            block.mask,
            block.causal,
            scale,
        )
        for block in blocks(q, piece.k.shape[1], window, extra, piece.valid)
    ]
    outputs = [out.transpose(1, 2) for out, _ in parts]
    if len(parts) == 1:
        return outputs[0], parts[0][1]
    return torch.cat(outputs, 1), torch.cat([log_sum for _, log_sum in parts], 2)


def piece_backward(
    grad: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    piece: Piece,
    prefix: Pair | None,
    window: int | None,
    scale: float,
) -> list[Tensor]:
    """Gradients of one piece: q [B, T, H, D], k, v [B, past + T, Hkv, D], and with a prefix its [P, Hkv, D] twice."""
    extra = 0 if prefix is None else prefix[0].shape[0]
    d_queries: list[Tensor] = []
    sums: list[Tensor] = []
    for block in blocks(q, piece.k.shape[1], window, extra, piece.valid):
        d_q, *d_kv = (
            x.transpose(1, 2)
            for x in block_backward(
                heads_first(grad[:, block.rows]),
                heads_first(q[:, block.rows]),
                with_prefix(prefix and prefix[0], piece.k[:, block.columns]),
                with_prefix(prefix and prefix[1], piece.v[:, block.columns]),
                heads_first(o[:, block.rows]),
                lse[:, :, block.rows],
                block.mask,
                block.causal,
                scale,
            )
        )
        if block.causal:  # the only block of its piece
            return [d_q, *d_kv]
        d_queries.append(d_q)
        if not sums:  # blocks add into the same keys, in float32 where those are of half precision
            sums = [x.new_zeros(x.shape, dtype=compute_dtype(q)) for x in (piece.k, piece.v, *(prefix or ()))]
        for i, d_x in enumerate(d_kv):
            sums[i][:, block.columns] += d_x[:, extra:]
            if extra:
                sums[2 + i] += d_x[:, :extra].sum(0)
    return [torch.cat(d_queries, 1), *sums]


@operator("window_attention")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention o [B, T, H, D] and its log-sum-exp [B, H, T]."""
    cache, prefix = pair(cache_k, cache_v), pair(prefix_k, prefix_v)
    parts = [
        piece_forward(q[:, piece.tokens], piece, prefix, window, scale)
        for piece in pieces(k, v, cache, count, cu_seqlens)
        if piece.tokens.stop > piece.tokens.start
    ]
    if len(parts) == 1:
        return parts[0][0].contiguous(), parts[0][1].contiguous()
    return torch.cat([o for o, _ in parts], 1), torch.cat([log_sum for _, log_sum in parts], 2)


@forward.register_fake
def _(q, k, v, prefix_k, prefix_v, cache_k, cache_v, count, cu_seqlens, window, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=compute_dtype(q))


@operator("window_attention_backward")
def backward(
    grad: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, prefix_k, prefix_v, cache_k, cache_v; empty for those that were None."""
    cache, prefix = pair(cache_k, cache_v), pair(prefix_k, prefix_v)
    parts = []
    for piece in pieces(k, v, cache, count, cu_seqlens):
        mine = piece.tokens
        if mine.stop > mine.start:
            known = grad[:, mine], o[:, mine], lse[:, :, mine], q[:, mine]
            parts.append((piece, piece_backward(*known, piece, prefix, window, scale)))
    if len(parts) == 1 and prefix is None and cache is None:
        total = [*parts[0][1], *(absent(q) for _ in range(4))]
    else:
        inputs = (q, k, v, prefix_k, prefix_v, cache_k, cache_v)
        total = [absent(q) if x is None else x.new_zeros(x.shape, dtype=compute_dtype(q)) for x in inputs]
        for piece, gradients in parts:
            add(total, piece, *gradients)
    return [x.to(q.dtype).contiguous() for x in total]


def add(total: list[Tensor], piece: Piece, d_q: Tensor, *rest: Tensor) -> None:
    """Put one piece's gradients where they belong: its tokens, its cached entries, the prefix that all pieces share."""
    total[0][:, piece.tokens] = d_q
    for i, d_x in enumerate(rest[:2]):
        total[1 + i][:, piece.tokens] = d_x[:, piece.past :]
        if piece.past:
            cached = total[5 + i][piece.rows]
            cached[:, cached.shape[1] - piece.past :] = d_x[:, : piece.past]
    for i, d_x in enumerate(rest[2:]):
        total[3 + i] += d_x


@backward.register_fake
def _(grad, o, lse, q, k, v, prefix_k, prefix_v, cache_k, cache_v, count, cu_seqlens, window, scale):
    inputs = (q, k, v, prefix_k, prefix_v, cache_k, cache_v)
    return [absent(q) if x is None else q.new_empty(x.shape) for x in inputs]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(True)


def _differentiate(ctx, grad, _):
    o, lse, *tensors = ctx.saved_tensors
    gradients = backward(grad.contiguous(), o, lse, *tensors, ctx.window, ctx.scale)
    return *present(gradients, tensors[:7]), None, None, None, None


forward.register_autograd(_differentiate, setup_context=_keep)


def flops_of_call(
    q, k, v, prefix_k, prefix_v, cache_k, cache_v, count, cu_seqlens, window, scale, *, out_shape, backward=False
) -> int:
    """FLOPs of the operator on tensors of these shapes."""
    prefix = 0 if prefix_k is None else prefix_k[0]
    cached = 0 if cache_k is None else cache_k[1]
    return cost(q, k, window=window, prefix=prefix, cached=cached, backward=backward).flops


flop_formula(torch.ops.palimpsest.window_attention, flops_of_call)
flop_formula(
    torch.ops.palimpsest.window_attention_backward,
    lambda grad, o, lse, *args, **kw: flops_of_call(*args, **kw, backward=True),
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Pair | None,
    state: dict[str, Tensor] | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """The registered operator on the tensors of ``prefix`` and ``state``, or what :mod:`.flash` or :mod:`.kept` have
    for the call."""
    if prefix is None and state is None:
        run = flash.choose(q.device, q.dtype, q.shape[3], everything=window is None and cu_seqlens is None)
        if run is not None:
            return run(q, k, v, cu_seqlens, window, scale)
    if state is None and cu_seqlens is None and kept.fits(q, k, v, prefix, window):
        return kept.window_attention(q, k, v, prefix, window, scale)
    past = (None, None, None) if state is None else (state["k"], state["v"], state["count"])
    o, _ = forward(q, k, v, *(prefix or (None, None)), *past, cu_seqlens, window, scale)
    return o
