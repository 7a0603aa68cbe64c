"""Routing, one token at a time."""

from itertools import pairwise

import torch
from torch import Tensor


def route(
    logits: Tensor, top_k: int, shared: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight, probability, memory, token, slot and borders; memories by Python's sort, slots by search."""
    batch, length, routed = logits.shape
    probability = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    values = logits.detach().nan_to_num(float("-inf"), float("inf"), float("-inf")).flatten(0, 1).tolist()
    chosen = [[m for _, m in sorted((-value, m) for m, value in enumerate(row))[:top_k]] for row in values]
    memory = torch.tensor(chosen, device=logits.device).view(batch, length, top_k)
    kept = probability.gather(-1, memory)
    weight = kept / kept.sum(-1, keepdim=True)
    if shared:
        memory = torch.cat([memory, torch.full_like(memory[..., :1], routed)], -1)
        weight = torch.cat([weight, torch.ones_like(weight[..., :1])], -1)
    edges = range(0, batch * length + 1, length) if cu_seqlens is None else cu_seqlens.tolist()
    choices = memory.flatten(0, 1).tolist()
    pairs, borders = [], [0]
    for first, last in pairwise(edges):
        for m in range(routed + shared):
            pairs += [(t, choices[t].index(m)) for t in range(first, last) if m in choices[t]]
            borders.append(len(pairs))
    slot = torch.empty(batch * length, top_k + shared, dtype=torch.int64)
    for s, (t, k) in enumerate(pairs):
        slot[t, k] = s
    token = torch.tensor([t for t, _ in pairs], device=logits.device)
    where = torch.tensor(borders, dtype=torch.int32, device=logits.device)
    return weight, probability, memory, token, slot.view(memory.shape).to(logits.device), where


def dispatch(x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """Every slot takes its token."""
    tokens = x.flatten(0, 1)
    return torch.stack([tokens[t] for t in token.tolist()])[None]


def combine(y: Tensor, weight: Tensor, slot: Tensor) -> Tensor:
    """Every token adds up what its slots hold."""
    outputs = []
    for weights, slots in zip(weight.flatten(0, 1), slot.flatten(0, 1).tolist(), strict=True):
        outputs.append(sum(w.to(y.dtype) * y[0, s] for w, s in zip(weights, slots, strict=True)))
    return torch.stack(outputs).view(*slot.shape[:2], -1)
