"""Short convolution as K shifted multiply-adds over the whole sequence, which on a CPU is faster than conv1d."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import compute_dtype
from ..operator import absent
from ..packing import document_of
from ..routing.chunked import gather


def slots(x: Tensor, width: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Where a packed row lies in a longer one with ``width`` - 1 slots of past before every document.

    Returns: positions of the tokens [T] and of the past [N, width - 1].
    """
    gap = width - 1
    document = document_of(cu_seqlens, x.shape[1])
    tokens = torch.arange(x.shape[1], device=x.device) + (document + 1) * gap
    starts = cu_seqlens[:-1].long() + gap * torch.arange(cu_seqlens.numel() - 1, device=x.device)
    return tokens, starts[:, None] + torch.arange(gap, device=x.device)


def spread(x: Tensor, width: int, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x with its past before it: [B, K - 1 + T, C], or one row in which every document follows its own past."""
    batch, _, channels = x.shape
    if cu_seqlens is None:
        past = x.new_zeros(batch, width - 1, channels) if state is None else state.to(x.dtype)
        return torch.cat([past, x], 1)
    tokens, past = slots(x, width, cu_seqlens)
    row = x.new_zeros(1, x.shape[1] + past.numel(), channels)
    row[0, tokens] = x[0]
    if state is not None:
        row[0, past] = state.to(x.dtype)
    return row


def in_slots(x: Tensor, index: Tensor | None) -> Tensor:
    """The tokens that an index names, [1, S, C]; x itself without one."""
    return x if index is None else x.flatten(0, 1).index_select(0, index)[None]


def convolve(row: Tensor, weight: Tensor) -> Tensor:
    """Valid causal sums of row [B, K - 1 + L, C] with weight [C, K]: [B, L, C]."""
    length = row.shape[1] - weight.shape[1] + 1
    y = row[:, :length] * weight[:, 0]
    for j in range(1, weight.shape[1]):
        y.addcmul_(row[:, j : j + length], weight[:, j])
    return y


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output [B, T, C], [1, S, C] with an index, and, with an activation, what entered it (else empty)."""
    x = in_slots(x, index)
    width = weight.shape[1]
    kind = compute_dtype(x)
    z = convolve(spread(x, width, state, cu_seqlens).to(kind), weight.to(kind))
    if cu_seqlens is not None:
        z = z[:, slots(x, width, cu_seqlens)[0] - (width - 1)]
    if bias is not None:
        z += bias.to(kind)
    if not silu:
        return z.to(x.dtype), absent(x)
    z = z.to(x.dtype)
    return F.silu(z), z


def backward(
    grad: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    index: Tensor | None,
    inverse: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, weight, bias and state; empty for those that were None."""
    x = in_slots(x, index)
    width, kind = weight.shape[1], compute_dtype(x)
    if silu:
        grad = torch.ops.aten.silu_backward(grad.to(kind), z.to(kind))
    grad = grad.to(kind)
    d_bias = absent(x) if bias is None else grad.sum((0, 1)).to(bias.dtype)
    row = spread(x, width, state, cu_seqlens).to(kind)
    length = row.shape[1] - width + 1
    if cu_seqlens is not None:
        tokens, past = slots(x, width, cu_seqlens)
        whole = grad.new_zeros(1, length, x.shape[2])
        whole[:, tokens - (width - 1)] = grad
        grad = whole
    d_weight = torch.stack([(row[:, j : j + length] * grad).sum((0, 1)) for j in range(width)], 1)
    d_row = convolve(F.pad(grad, (0, 0, width - 1, width - 1)), weight.to(kind).flip(1))
    if cu_seqlens is None:
        d_state, d_x = d_row[:, : width - 1], d_row[:, width - 1 :]
    else:
        d_state, d_x = d_row[0, past], d_row[:, tokens]
    if inverse is not None:
        d_x = gather(d_x, None, inverse)
    return [
        d_x.to(x.dtype).contiguous(),
        d_weight.to(weight.dtype),
        d_bias,
        absent(x) if state is None else d_state.to(state.dtype, copy=True),
    ]
