"""Where a sequence is cut into chunks of its own making: at surprises, refined by what belongs together.

Borders are found as the tokens come, and never moved once a chunk is closed: cutting the beginning of a sequence gives
the beginning of the whole one's chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. end - 1, known to be a chunk from token ``closed`` on, end <= closed."""

    start: int
    end: int
    closed: int


@dataclass(frozen=True)
class Cutter:
    """Cuts where a token surprises, then moves the border back to where the tokens before it fall apart best (EM-LLM,
    Fountas et al., 2024, eqs. 1 and 2 and algorithm 1).

    A chunk closes at token t when −log p_t > μ + γ σ, μ and σ over the ``window`` tokens before t, or when it has
    ``most`` tokens. Its border is then b, start + least <= b <= t, of the two-part division of the tokens start .. t
    with the largest modularity; of equals the last. Tokens b .. t begin the next chunk.

    In the paper borders are moved among all tokens of a text. Here a border at t depends on the tokens up to t alone.

    Args:
        gamma: γ.
        window: tokens that are compared with.
        least, most: tokens of a chunk.
    """

    gamma: float
    window: int
    least: int
    most: int

    def cut(
        self, surprise: Sequence[float], keys: Tensor, position: int = 0, start: int = 0, past: Sequence[float] = ()
    ) -> list[Chunk]:
        """The chunks that close at tokens ``position``, ``position`` + 1, …

        Args:
            surprise: −log p of these tokens.
            keys: [P, E] of the tokens from ``start`` on, these among them.
            position: the number of the first of them.
            start: where the chunk under way begins.
            past: the surprises of the ``window`` tokens before, fewer at a sequence's beginning.
        """
        known, found = [*past, *surprise], []
        for i in range(len(surprise)):
            t, now = position + i, len(past) + i
            if t - start < self.least:
                continue
            before = known[max(0, now - self.window) : now]
            if t - start < self.most and surprise[i] <= fmean(before) + self.gamma * pstdev(before):
                continue
            first = start - (position + len(surprise) - len(keys))
            end = start + division(keys[first : first + t - start + 1], self.least)
            found.append(Chunk(start, end, t))
            start = end
        return found


def division(keys: Tensor, least: int = 1) -> int:
    """Where tokens [L, E] fall into two parts best: b, least <= b <= L - 1, of the largest modularity; the last of
    equals.

        Q(b) = Σ_ij (A_ij − d_i d_j / Σ d) [i and j both before b or neither] / Σ d,    d_i = Σ_j A_ij

    A is K Kᵀ of keys of length 1, moved to lie in 0 .. 1 as modularity needs, (1 + cos) / 2, with 0 on its diagonal.
    """
    length = len(keys)
    unit = torch.nn.functional.normalize(keys.detach().double(), dim=-1)
    near = (1 + unit @ unit.mT) / 2
    near.fill_diagonal_(0)
    degree = near.sum(-1)
    excess = near - degree[:, None] * degree / degree.sum().clamp(min=1e-12)
    table = torch.zeros(length + 1, length + 1, dtype=torch.float64, device=keys.device)
    table[1:, 1:] = excess.cumsum(0).cumsum(1)
    corner = table.diagonal()
    inside = corner + table[length, length] - table[length] - table[:, length] + corner
    return length - 1 - int(inside[least:length].flip(0).argmax())


def surprise(keys: Tensor, past: Tensor, position: Tensor) -> Tensor:
    """−log p of each token's key, per channel and up to a constant, under the normal distribution of those before it.

        s_t = ½ (‖k_t − m‖² / (E v) + log v),    m and v the mean and variance of the last W keys, v over all channels

    0 for a sequence's first two tokens, which have nothing to be compared with.

    Args:
        keys: [N, T, E].
        past: [N, W, E], the keys before them, the newest last.
        position: int [N, T], of which a token has min(position, W) before it.

    Returns: [N, T], float32 (float64 for float64 keys), without a gradient.
    """
    kind = torch.float64 if keys.dtype == torch.float64 else torch.float32
    window = past.shape[1]
    known = torch.cat([past.to(keys.dtype), keys], 1).detach().to(kind)
    before = known.unfold(1, window, 1)[:, :-1]  # [N, T, E, W]
    count = position.clamp(max=window)[..., None, None]
    there = torch.arange(window, device=keys.device) >= window - count
    size = count.clamp(min=1).to(kind)
    mean = (before * there).sum(-1, keepdim=True) / size
    variance = ((before - mean).square() * there).sum(-1, keepdim=True) / size
    variance = variance.mean(-2).squeeze(-1) + 1e-6
    distance = (known[:, window:] - mean.squeeze(-1)).square().mean(-1)
    return torch.where(position >= 2, (distance / variance + variance.log()) / 2, 0.0)
