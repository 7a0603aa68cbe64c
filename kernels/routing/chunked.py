"""Routing in plain torch: shapes are known from those of the arguments, and no value is read by the host."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import compute_dtype
from ..packing import document_of


def choose(logits: Tensor, top_k: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """weight, probability and memory. A stable sort, for ``topk`` breaks ties as it likes."""
    probability = torch.softmax(logits.to(compute_dtype(logits)), -1)
    ranked = torch.where(logits.isnan(), float("-inf"), logits)
    memory = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :top_k].contiguous()
    kept = probability.gather(-1, memory)
    weight = kept / kept.sum(-1, keepdim=True)
    if shared:
        weight, memory = F.pad(weight, (0, 1), value=1.0), F.pad(memory, (0, 1), value=logits.shape[-1])
    return weight, probability, memory


def sort(memory: Tensor, memories: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """token, slot and borders: a counting sort by (row or document, memory), stable in time.

    With n_m(t) the choices of memory m before token t, the slot of one is that of its sequence's first one, plus
    n_m(t) - n_m(start of the row).
    """
    batch, length, choices = memory.shape
    tokens = batch * length
    time = torch.arange(tokens, device=memory.device)
    edges = torch.arange(batch + 1, device=memory.device) * length if cu_seqlens is None else cu_seqlens
    row = time // length if cu_seqlens is None else document_of(cu_seqlens, tokens)
    flat = memory.view(tokens, choices)
    before = torch.zeros(tokens + 1, memories, dtype=torch.int32, device=memory.device)
    before[1:].scatter_(1, flat, 1)
    before = before.cumsum(0, dtype=torch.int32)
    starts = before[edges]
    borders = F.pad(starts.diff(dim=0).flatten().cumsum(0, dtype=torch.int32), (1, 0))
    shift = borders[:-1].view(-1, memories) - starts[:-1]
    slot = (before[:-1] + shift[row]).gather(1, flat).long()
    token = torch.empty(tokens * choices, dtype=torch.int64, device=memory.device)
    token[slot.flatten()] = time.repeat_interleave(choices)
    return token, slot.view(memory.shape), borders


def route_backward(
    d_weight: Tensor, d_probability: Tensor, weight: Tensor, probability: Tensor, memory: Tensor, top_k: int
) -> Tensor:
    """Gradient of the logits: that of the softmax over all, and on the kept ones that of the softmax over these."""
    d_logits = probability * (d_probability - (probability * d_probability).sum(-1, keepdim=True))
    w, d_w = weight[..., :top_k], d_weight[..., :top_k]
    kept = w * (d_w - (w * d_w).sum(-1, keepdim=True))
    return d_logits.scatter_add(-1, memory[..., :top_k], kept)  # no two choices of a token are the same memory


def gather(y: Tensor, weight: Tensor | None, slot: Tensor) -> Tensor:
    """[B, T, C]: what lies in a token's slots, [1, S, C], weighted and added in the order of its choices."""
    kind = compute_dtype(y)
    total = y.new_zeros(*slot.shape[:2], y.shape[2], dtype=kind)
    for k in range(slot.shape[2]):
        part = y[0].index_select(0, slot[..., k].flatten()).view(total.shape).to(kind)
        total = total + part if weight is None else total.addcmul_(part, weight[..., k : k + 1].to(kind))
    return total.to(y.dtype)


def spread(x: Tensor, token: Tensor) -> Tensor:
    """[1, S, C]: tokens [B, T, C] in the order of slots."""
    return x.flatten(0, 1).index_select(0, token)[None]


def combine_backward(grad: Tensor, y: Tensor, weight: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and weight."""
    kind = compute_dtype(y)
    wide = grad.to(kind).flatten(0, 1)
    d_y, d_weight = torch.empty_like(y, memory_format=torch.contiguous_format), torch.empty_like(weight)
    for k in range(slot.shape[2]):
        where = slot[..., k].flatten()
        share = weight[..., k].reshape(-1, 1).to(kind)
        d_y[0].index_copy_(0, where, (wide * share).to(y.dtype))
        along = (wide * y[0].index_select(0, where).to(kind)).sum(-1)
        d_weight[..., k] = along.view(slot.shape[:2]).to(weight.dtype)
    return d_y, d_weight
