"""What a chunk of tokens is known by: one summary key per chunk, by which queries choose among chunks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from ..layers import Linear
from ..mixer_config import Scorer as ScorerConfig


class Scorer(nn.Module):
    """From the keys of a chunk's tokens to the chunk's own key.

    A summary depends on the tokens of its chunk alone, and for ``count`` tokens is what it would be of those alone.
    """

    asks = False  # whether it looks at queries

    def forward(self, keys: Tensor, queries: Tensor, count: Tensor | None = None) -> Tensor:
        """The summary of every chunk.

        Args:
            keys: [..., C, H, E], what the chunk's tokens are found by.
            queries: like keys, what they look for themselves; read by a scorer that ``asks`` alone.
            count: int [...], so many tokens of the C are there, the first ones; None: all. A chunk without tokens has
                a summary of zeros.

        Returns: [..., H, E].
        """
        there = torch.ones((), dtype=torch.bool, device=keys.device)
        if count is not None:
            there = torch.arange(keys.shape[-3], device=keys.device) < count[..., None]
        return self.summarise(keys, queries, there.expand(keys.shape[:-2]))

    def summarise(self, keys: Tensor, queries: Tensor, there: Tensor) -> Tensor:
        """:meth:`forward` with ``there``, bool [..., C], for ``count``."""
        raise NotImplementedError


def _mean(keys: Tensor, weight: Tensor) -> Tensor:
    """Σ_j w_j k_j / Σ_j w_j of keys [..., C, H, E] by weight [..., C, 1 or H]; zeros where no weight is."""
    weight = weight.to(keys.dtype)
    return (keys * weight[..., None]).sum(-3) / weight.sum(-2).clamp(min=1)[..., None]


class Mean(Scorer):
    """s = mean of the chunk's keys (HCAM). As projections commute with means, also the key of the mean token."""

    def summarise(self, keys: Tensor, queries: Tensor, there: Tensor) -> Tensor:
        """See :class:`Scorer`."""
        return _mean(keys, there[..., None])


class Representative(Scorer):
    """s = mean of the few keys that received most attention (InfLLM, Xiao et al., 2024, section 3.2).

        received_m = mean of q_j · k_m over the tokens j ≥ m of the chunk

    The query times s is the mean of its products with the representatives, which is how InfLLM scores a unit, up to a
    factor. There the attention comes from a window of tokens that follow, whatever chunk they lie in; here from the
    chunk's own, so that a summary is final when its chunk is. Equal ones: the earlier.
    """

    asks = True

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def summarise(self, keys: Tensor, queries: Tensor, there: Tensor) -> Tensor:
        """See :class:`Scorer`."""
        length = keys.shape[-3]
        products = torch.einsum("...jhe,...mhe->...hmj", queries.detach(), keys.detach())
        asked = torch.ones(length, length, dtype=torch.bool, device=keys.device).triu()  # j ≥ m
        asked = (asked & there[..., None, :])[..., None, :, :]
        received = (products * asked).sum(-1) / asked.sum(-1).clamp(min=1)
        received = received.masked_fill(~there[..., None, :], -torch.inf)
        order = received.sort(dim=-1, descending=True, stable=True).indices[..., : self.tokens]
        chosen = torch.zeros_like(received, dtype=torch.bool).scatter(-1, order, True)
        return _mean(keys, chosen.transpose(-1, -2) & there[..., None])


class StridedMLP(Scorer):
    """s = mean over windows of φ(window), for windows of ``width`` tokens at every ``stride``, those that lie wholly in
    the chunk (NSA, Yuan et al., 2025, eq. 7; φ an MLP with positions inside the window).

        φ(k_1 … k_w) = mean_j k_j + W_2 silu(W_1 [k_1 + p_1 ‖ … ‖ k_w + p_w])

    Each head's keys alone, the same φ for all. The mean is added here, so that φ begins as one. A chunk shorter than a
    window is a window filled up with zeros.
    """

    def __init__(self, width: int, stride: int, channels: int, std: float) -> None:
        super().__init__()
        self.width, self.stride, self.std = width, stride, std
        self.positions = nn.Parameter(torch.empty(width, channels))
        self.enter = Linear(width * channels, 2 * channels, std)
        self.leave = Linear(2 * channels, channels, std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """p ~ N(0, std)."""
        nn.init.normal_(self.positions, std=self.std)

    def summarise(self, keys: Tensor, queries: Tensor, there: Tensor) -> Tensor:
        """See :class:`Scorer`."""
        keys = keys * there[..., None, None]
        filled = there.unfold(-1, self.width, self.stride)  # [..., n, w]
        windows = keys.unfold(-3, self.width, self.stride).movedim(-1, -2)  # [..., n, H, w, E]
        placed = (windows + self.positions.to(keys.dtype)) * filled[..., None, :, None]
        inner = self.leave(F.silu(self.enter(placed.flatten(-2))))
        size = filled.sum(-1).clamp(min=1)[..., None, None]
        value = windows.sum(-2) / size.to(keys.dtype) + inner
        whole = filled.all(-1)
        first = torch.arange(whole.shape[-1], device=keys.device) == 0
        return _mean(value, (whole | (first & filled.any(-1) & ~whole.any(-1, keepdim=True)))[..., None])


class Landmark(Scorer):
    """s = Σ_j softmax_j(l · k_j / √E) k_j with l a learnt token of each head that attends to the chunk.

    After the landmark tokens of Mohtashami and Jaggi (2023), one of which stands behind every block and whose key is
    the block's. Theirs lie in the sequence and see all of the past; this one sees its chunk alone, so that the
    sequence stays as it is.
    """

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(heads, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """l ~ N(0, 1)."""
        nn.init.normal_(self.token)

    def summarise(self, keys: Tensor, queries: Tensor, there: Tensor) -> Tensor:
        """See :class:`Scorer`."""
        logits = (keys * self.token.to(keys.dtype)).sum(-1) * keys.shape[-1] ** -0.5
        lowest = torch.finfo(logits.dtype).min  # and not −∞: a chunk without tokens must not become NaN
        weight = logits.masked_fill(~there[..., None], lowest).softmax(-2) * there[..., None]
        return (keys * weight[..., None]).sum(-3)


def make_scorer(model: ModelConfig, scorer: ScorerConfig, heads: int, channels: int) -> Scorer:
    """The scorer of a configuration, for keys of ``heads`` heads of ``channels`` channels."""
    if scorer.kind == "representative":
        return Representative(scorer.tokens)
    if scorer.kind == "strided_mlp":
        return StridedMLP(scorer.width, scorer.stride, channels, model.init_std)
    return Landmark(heads, channels) if scorer.kind == "landmark" else Mean()
