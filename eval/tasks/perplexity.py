"""Loss by position: how well the model predicts held-out text far beyond the length it was trained at.

Each row is one stretch of held-out text, read from its beginning in pieces of one training context with a carried
state, so that memory does not grow with the length. Beside it, the same text read with a fresh state at every piece:
what is gained over that is what the state carries from one context to the next. What a model must not be judged by (NaN
among its losses, see ``MemoryLM.counted``) is left out, nats and bytes.

A worked example (training context 4, factor 2, bytes)::

    input  "the cat " read as "the " then "cat ", the second with the state of the first
    label  "he cat i", the byte that follows each; position 4 is the first beyond the training context
    result mean nats by position 0 … 7, in buckets 0-0, 1-1, 2-3, 4-7
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("palimpsest.eval")


@dataclass(frozen=True)
class Settings:
    """``context``: the training context; rows are ``factor`` times as long; ``batch`` rows are read side by side."""

    context: int
    factor: int = 8
    batch: int = 8
    fresh: bool = True

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.context * self.factor


@torch.no_grad()
def losses(model: Any, tokens: Tensor, targets: Tensor, *, context: int, carry: bool) -> Tensor:
    """Nats by position, float64 [N, T] on the CPU: ``tokens``, ``targets`` int64 [N, T] read ``context`` at a time.

    ``carry``: whether a piece starts from the state of the one before it, or from a fresh state.
    """
    state, pieces = None, []
    for piece, following in zip(tokens.split(context, dim=1), targets.split(context, dim=1), strict=True):
        nats, after = model.per_token_loss(piece, following, state=state)
        state = after if carry else None
        pieces.append(nats.double().cpu())
    return torch.cat(pieces, dim=1)


def buckets(context: int, factor: int, finest: int = 16) -> list[tuple[int, int]]:
    """Half-open intervals of positions that double up to the training context and from it on: a border lies on it.

    ``buckets(64, 4) == [(0, 16), (16, 32), (32, 64), (64, 128), (128, 256)]``.
    """
    edges = [context]
    while edges[0] >= 2 * finest and edges[0] % 2 == 0:
        edges.insert(0, edges[0] // 2)
    while edges[-1] < context * factor:
        edges.append(min(2 * edges[-1], context * factor))
    return list(zip([0, *edges[:-1]], edges, strict=True))


def summary(carried: Tensor, fresh: Tensor | None, size: Tensor, start: int, stop: int) -> dict[str, Any]:
    """Mean loss and bits per byte at positions ``start`` … ``stop - 1``. ``size`` [N, T]: bytes of each target.

    ``by_row`` are the bits per byte of each row, for paired comparisons; ``stderr`` the standard error of their mean,
    None with fewer than two rows.
    """
    carried, size, rows = carried[:, start:stop], size[:, start:stop], carried.shape[0]
    by_row = _bits(carried, size, 1)
    return {
        "start": start,
        "stop": stop,
        "tokens": int((~carried.isnan()).sum()),
        "loss": carried.nanmean().item(),
        "bits_per_byte": _bits(carried, size).item(),
        "stderr": (by_row.std() / rows**0.5).item() if rows > 1 else None,
        "fresh_bits_per_byte": None if fresh is None else _bits(fresh[:, start:stop], size).item(),
        "by_row": by_row.tolist(),
    }


def _bits(nats: Tensor, size: Tensor, dim: int | None = None) -> Tensor:
    """Bits per byte of what counts."""
    return nats.nansum(dim) / math.log(2) / size.masked_fill(nats.isnan(), 0).sum(dim).clamp(min=1)


def run(model: Any, rows: Tensor, byte_counts: Callable[[Tensor], Tensor], settings: Settings) -> dict[str, Any]:
    """The loss by position on ``rows`` int64 [N, T + 1], T = ``settings.length`` or less when the text is shorter.

    ``byte_counts`` gives the bytes that each token stands for, in the shape of its argument.

    Raises:
        ValueError: when the rows do not reach beyond one training context.
    """
    length, context = rows.shape[1] - 1, settings.context
    if length < context:
        raise ValueError(f"held-out rows were {length} tokens long; they must hold one training context of {context}")
    device = next(model.parameters()).device
    carried, fresh = [], []
    for part in rows.split(settings.batch):
        tokens, targets = part[:, :-1].to(device), part[:, 1:].to(device)
        carried.append(losses(model, tokens, targets, context=context, carry=True))
        if settings.fresh:
            first = carried[-1][:, :context]  # read from a fresh state either way
            if length > context:
                rest = losses(model, tokens[:, context:], targets[:, context:], context=context, carry=False)
                first = torch.cat([first, rest], dim=1)
            fresh.append(first)
    size = byte_counts(rows[:, 1:]).double()
    nats, baseline = torch.cat(carried), torch.cat(fresh) if fresh else None
    spans = [(start, min(stop, length)) for start, stop in buckets(context, settings.factor) if start < length]
    spans = [(start, stop) for start, stop in spans if not nats[:, start:stop].isnan().all()]
    return {
        "context": context,
        "length": length,
        "rows": rows.shape[0],
        "buckets": [summary(nats, baseline, size, start, stop) for start, stop in spans],
        "within": summary(nats, baseline, size, 0, context),
        "beyond": summary(nats, baseline, size, context, length) if length > context else None,
        "overall": summary(nats, baseline, size, 0, length),
    }
