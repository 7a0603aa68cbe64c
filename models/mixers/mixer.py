"""What every token mixer is."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: A layer's state: tensors by name, nested; every tensor has one leading row per sequence.
LayerState = dict[str, Any]


class Mixer(nn.Module):
    """Mixes tokens along time. One path serves training, prefill and decoding.

    For any split of a sequence, ``forward(whole)`` equals ``forward(first part)`` then ``forward(rest, state)``.
    With ``cu_seqlens`` (int32 [N + 1], B = 1) the documents of a packed row never see each other, and the state has
    N rows. A state that is handed in is never changed.
    """

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """x [B, T, dim] → y [B, T, dim], and the state after T tokens (None unless ``return_state``)."""
        raise NotImplementedError

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """The state of ``batch`` sequences before their first token; ``dtype`` is that of x."""
        raise NotImplementedError

    @property
    def inner_chunk(self) -> int | None:
        """After how many tokens its neural memory moves to the weights at which gradients are taken; None without."""
        return None

    def rechunk(self, size: int) -> None:
        """Make :attr:`inner_chunk` ``size``, the gates staying as they are.

        Raises:
            ValueError: for a mixer without a neural memory, or a size that its memory cannot have.
        """
        raise ValueError(f"{type(self).__name__} was to take chunks of {size}; it must have a neural memory for that")

    def idle_parameters(self) -> int:
        """How many of its parameters a token does not meet: those of memories that it is not routed to."""
        return 0

    @torch.no_grad()
    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """Numbers worth watching on input x [B, T, dim], each a float scalar; nothing for a mixer without a memory."""
        return {}

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, Tensor]:
        """What happens at each token of x [B, T, dim]: numbers [B, T], or shares of several places [B, T, M]."""
        return {}

    @torch.no_grad()
    def recall(self, x: Tensor, marks: Sequence[int]) -> Tensor | None:
        """What the memory returns for the key of each token of x [1, T, dim] when the first n tokens have been written,
        for each n of ``marks`` (ascending, 0 … T): its cosine with that token's value, a mean over heads, float32
        [marks, T]. None for a mixer without a memory that answers a key with a value."""
        return None
