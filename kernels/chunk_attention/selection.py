"""Which chunks a query reads, in plain torch: all candidates scored, or those that a tree of means leads to.

Shapes are known from those of the arguments, and no value is read by the host.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import compute_dtype

SIZE = 2**22  # scores at a time


def leaders(leader: Tensor, share: int, blocks: int) -> tuple[Tensor, Tensor]:
    """The first query of each of ``blocks`` runs, int64 [blocks + 1], Q where there is none; the run of each query."""
    count = leader.numel()
    query = torch.arange(count, device=leader.device)
    if share == 1:
        return torch.arange(count + 1, device=leader.device), query
    upto = torch.cumsum(leader == query, 0)
    return torch.searchsorted(upto, torch.arange(1, blocks + 2, device=leader.device)), upto - 1


def select(
    summary_q: Tensor,
    summary_k: Tensor,
    start: Tensor,
    end: Tensor,
    first: Tensor,
    last: Tensor,
    leader: Tensor,
    share: int,
    blocks: int,
    top_k: int,
    scale: float,
    branching: int,
) -> Tensor:
    """Chosen chunks [B, T, Hs, K], int32, the best first; ``branching`` 0: of all candidates."""
    rows, batch, kind = summary_k.shape[0], summary_q.shape[0], compute_dtype(summary_q)
    starts, run = leaders(leader, share, blocks)
    starts = starts[:-1].clamp(max=leader.numel() - 1)
    # Rows of queries belong to rows of memory, and their leaders are as many; else all are as one row.
    groups = rows if batch == rows and starts.numel() % rows == 0 and share == 1 else 1
    starts = starts.view(groups, -1)
    chunks = summary_k.flatten(0, 1).view(groups, -1, *summary_k.shape[2:]).movedim(2, 1).to(kind)
    full = end > start
    width = chunks.shape[2] if not branching else top_k * branching
    step = max(1, SIZE // (groups * chunks.shape[1] * width * (1 if not branching else chunks.shape[3])))
    levels = _levels(summary_k.flatten(0, 1).to(kind), full, branching) if branching else []
    found = []
    for at in starts.split(step, 1):
        queries = summary_q.flatten(0, 1)[at].to(kind)
        low, high = first[at].long(), last[at].long()
        if branching:
            found.append(_descend(queries, levels, low, high, top_k, scale, branching))
            continue
        score = scale * (queries.movedim(2, 1) @ chunks.mT)
        chunk = torch.arange(full.numel(), device=at.device).view(groups, 1, 1, -1)
        seen = (chunk >= low[:, None, :, None]) & (chunk < high[:, None, :, None]) & full.view(groups, 1, 1, -1)
        found.append(best(score, chunk, seen, top_k).movedim(2, 1))
    chosen = torch.cat(found, 1).flatten(0, 1)[run]
    return chosen.view(*summary_q.shape[:3], top_k).to(torch.int32)


def best(score: Tensor, number: Tensor, there: Tensor, top_k: int) -> Tensor:
    """The ``top_k`` numbers of the largest scores along the last dimension, the lower one of equals first, then -1.

    No two of the numbers that are ``there`` are the same. A score that is no number is the lowest.
    """
    number, there = number.expand_as(score), there.expand_as(score)
    score = score.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    kept = min(top_k, score.shape[-1])
    if score.dtype == torch.float32:
        # One integer: the score's bits in ascending order, then the number. All differ, so that topk has no ties.
        bits = (score + 0.0).view(torch.int32)
        key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() * 2**32 + (2**31 - number)
        key = torch.where(there, key, torch.iinfo(torch.int64).min)
        taken = torch.topk(key, kept, dim=-1).indices
    else:
        order = torch.where(there, number, 2**31).argsort(dim=-1, stable=True)
        rank = torch.where(there, score, float("-inf")).gather(-1, order)
        missing = (~there).gather(-1, order)
        last = rank.sort(dim=-1, descending=True, stable=True).indices
        last = last.gather(-1, missing.gather(-1, last).to(torch.int8).argsort(dim=-1, stable=True))
        taken = order.gather(-1, last)[..., :kept]
    chosen = torch.where(there, number, -1).gather(-1, taken)
    return F.pad(chosen, (0, top_k - kept), value=-1)


def _levels(chunks: Tensor, full: Tensor, branching: int) -> list[tuple[int, Tensor, Tensor]]:
    """(size, means, there) of a tree's levels, leaves first: at m the mean of the chunks m .. m + size - 1."""
    count = chunks.shape[0]
    total, members, size = torch.where(full[:, None, None], chunks, 0), full.to(chunks.dtype), 1
    levels = []
    while True:
        levels.append((size, total / members.clamp(min=1)[:, None, None], members > 0))
        if size >= count:
            return levels
        far = (branching - 1) * size
        total, members = F.pad(total, (0, 0, 0, 0, 0, far)), F.pad(members, (0, far))
        offsets = range(0, branching * size, size)
        total = torch.stack([total[i : i + count] for i in offsets]).sum(0)
        members = torch.stack([members[i : i + count] for i in offsets]).sum(0)
        size *= branching


def _descend(
    queries: Tensor,
    levels: list[tuple[int, Tensor, Tensor]],
    first: Tensor,
    last: Tensor,
    top_k: int,
    scale: float,
    branching: int,
) -> Tensor:
    """Chosen chunks [1, P, Hs, K] of queries [1, P, Hs, E] with candidates first .. last - 1, from the root down.

    The candidates fall into whole nodes, at most branching - 1 of a level; a level scores those that begin there, and
    the children of what was kept of the level above.
    """
    head = torch.arange(queries.shape[2], device=queries.device)[:, None]
    kept = torch.full((*queries.shape[:3], top_k), -1, device=queries.device)
    child = torch.arange(branching, device=queries.device)
    first, count = first[..., None, None], (last - first)[..., None, None]
    for size, means, there in reversed(levels):
        fresh = count // (size * branching) * (size * branching) + child * size
        fresh = torch.where(fresh + size <= count, first + fresh, -1).expand(*queries.shape[:3], -1)
        below = torch.where(kept[..., None] >= 0, kept[..., None] + child * size, -1).flatten(-2)
        node = torch.cat([below, fresh], -1)
        place = node.clamp(0, there.numel() - 1)
        score = scale * torch.einsum("gphe,gphne->gphn", queries, means[place, head])
        kept = best(score, node, (node >= 0) & (node < there.numel()) & there[place], top_k)
    return kept
