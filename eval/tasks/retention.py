"""Retention: how much better a passage is predicted when it is read again, by what has been read in between.

Held-out text gives a passage and what follows it. The passage is read from a fresh state, then n tokens of what
follows, then the passage again; ``difference`` is the loss of the second reading minus that of the first, in nats per
token. Below 0 the passage is remembered, or any text at all helps with the next; so ``unread`` is the loss of the
passage behind the same n tokens when it was *not* read before them, and ``remembered`` = second − unread is what is
owed to the first reading alone. Of the passage's tokens all but the first are predicted, each from those before it.

A worked example (passage of 4, gap 3, bytes)::

    text     "the cat sat"
    first    "the "            nats of "he "
    second   "the cat" "the "  nats of the second "he "
    unread   "cat" "the "      nats of "he "

The gaps of a row nest: the text is read once, and at each gap the passage is read from a copy of the state there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Settings:
    """``passage`` and ``gaps`` in tokens; ``chunk``: how many are read at once; ``batch``: rows side by side."""

    gaps: tuple[int, ...]
    passage: int = 64
    chunk: int = 512
    batch: int = 8

    def __post_init__(self) -> None:
        if self.passage < 2:
            raise ValueError(f"retention passage was {self.passage}; it must be at least 2 tokens")
        if not self.gaps or min(self.gaps) < 0:
            raise ValueError(f"retention gaps were {self.gaps}; they must be at least one, none negative")

    @property
    def length(self) -> int:
        """Tokens of a row: the passage and the longest gap."""
        return self.passage + max(self.gaps)


def doubling(context: int, factor: int, first: int = 16) -> tuple[int, ...]:
    """Gaps from ``first``, doubled up to ``factor`` training contexts: ``doubling(64, 2) == (16, 32, 64, 128)``."""
    gaps = [min(first, context * factor)]
    while gaps[-1] < context * factor:
        gaps.append(min(2 * gaps[-1], context * factor))
    return tuple(gaps)


def _advance(model: Any, tokens: Tensor, state: Any, chunk: int) -> Any:
    for piece in tokens.split(chunk, dim=1) if tokens.shape[1] else ():
        state = model.per_token_loss(piece, torch.full_like(piece, IGNORE), state=state)[1]  # no logits are made
    return state


def _passage(model: Any, passage: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Mean nats [N] of the passage's tokens but the first, and the state after all but the last."""
    nats, after = model.per_token_loss(passage[:, :-1], passage[:, 1:], state=state)
    return nats.double().nanmean(1).cpu(), after


@torch.no_grad()
def readings(model: Any, rows: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Mean nats of the first reading [N], and of the second and the unread one at each gap, ascending [N, gaps].

    ``rows`` int64 [N, ``settings.length``].
    """
    passage, following = rows[:, : settings.passage], rows[:, settings.passage :]
    first, state = _passage(model, passage, None)
    seen, unseen, done = _advance(model, passage[:, -1:], state, settings.chunk), None, 0
    second, unread = [], []
    for gap in sorted(set(settings.gaps)):
        between = following[:, done:gap]
        seen, unseen = (_advance(model, between, state, settings.chunk) for state in (seen, unseen))
        done = gap
        second.append(_passage(model, passage, seen)[0])
        unread.append(_passage(model, passage, unseen)[0])
    return first, torch.stack(second, 1), torch.stack(unread, 1)


def _spread(values: Tensor) -> float | None:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None


def run(model: Any, rows: Tensor, settings: Settings) -> dict[str, Any]:
    """The curve over gaps on ``rows`` int64 [N, T]; gaps that T does not hold are left out, and named in the result.

    ``stderr`` is the standard error of the mean of ``difference`` over rows, ``remembered_stderr`` that of
    ``remembered``; None of a single row.

    Raises:
        ValueError: when not one gap fits the rows.
    """
    room = rows.shape[1] - settings.passage
    gaps = tuple(sorted({gap for gap in settings.gaps if gap <= room}))
    if not gaps:
        least = settings.passage + min(settings.gaps)
        raise ValueError(f"held-out rows were {rows.shape[1]} tokens long; they must hold {least}, passage and gap")
    device = next(model.parameters()).device
    fitting = Settings(gaps, settings.passage, settings.chunk, settings.batch)
    parts = [readings(model, part.to(device), fitting) for part in rows.split(settings.batch)]
    first, second, unread = (torch.cat(column) for column in zip(*parts, strict=True))
    difference, remembered = second - first[:, None], second - unread
    return {
        "passage": settings.passage,
        "rows": rows.shape[0],
        "left_out": sorted(set(settings.gaps) - set(gaps)),
        "first": first.mean().item(),
        "gaps": [
            {
                "gap": gap,
                "second": second[:, i].mean().item(),
                "unread": unread[:, i].mean().item(),
                "difference": difference[:, i].mean().item(),
                "stderr": _spread(difference[:, i]),
                "remembered": remembered[:, i].mean().item(),
                "remembered_stderr": _spread(remembered[:, i]),
            }
            for i, gap in enumerate(gaps)
        ],
    }
