"""Documents of a packed row that is divided among processes: where a part begins and ends among them.

A document whose border lies between two parts needs nothing of the part before, and one that began in an earlier part
goes on with what that part left behind. So a part is run in up to three pieces: a document that goes on, those that lie
wholly in it, and one that the next part goes on with. Chunks, segments and positions count from a document's beginning,
in whichever part that is: what is handed on says how far a document has come.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Tokens of a part that are run together.

    ``tokens`` and ``rows``: which of the part's tokens and documents (of rows without documents: all). ``cu_seqlens``
    int32, borders among these tokens; None where they are of one document, or of rows without. ``takes``: they go on
    with what the process before leaves behind; ``gives``: the next process goes on with what they leave.
    """

    tokens: slice
    rows: slice
    cu_seqlens: Tensor | None
    takes: bool
    gives: bool


def clipped(borders: Sequence[int], begin: int, end: int) -> list[int]:
    """The borders of documents in the part that holds tokens begin .. end − 1, counted from its first token on; its own
    beginning and end are among them. Documents without tokens are left out."""
    inside = sorted({border for border in borders if begin < border < end})
    return [0, *(border - begin for border in inside), end - begin]


def opened(borders: Sequence[int], token: int) -> int:
    """The first token of the document that a token lies in."""
    return borders[bisect_right(borders, token) - 1]


def pieces(borders: Sequence[int], begin: int, end: int, device: torch.device) -> list[Piece]:
    """The pieces of the part that holds tokens begin .. end − 1, in the order in which they are run: first the one that
    another process waits for, last the one that waits for another, unless they are the same."""
    inside = clipped(borders, begin, end)
    count = len(inside) - 1
    takes, gives = opened(borders, begin) < begin, opened(borders, end) < end
    if count == 1:
        return [Piece(slice(None), slice(None), None, takes, gives)]
    first, last = int(takes), count - int(gives)

    def documents(start: int, stop: int, **ends: bool) -> Piece:
        cuts = inside[start : stop + 1]
        own = None
        if stop - start > 1:
            own = torch.tensor([cut - cuts[0] for cut in cuts], dtype=torch.int32, device=device)
        return Piece(slice(cuts[0], cuts[-1]), slice(start, stop), own, **ends)

    found = [documents(last, count, takes=False, gives=True)] if gives else []
    if first < last:
        found.append(documents(first, last, takes=False, gives=False))
    return found + ([documents(0, 1, takes=True, gives=False)] if takes else [])
