"""Attention over the best chunks of the past and the token's own, in one softmax."""

import torch
from torch import Tensor

from ..config import ModelConfig
from ..layers import Linear, split_rotary
from ..mixer_config import BlockUnion
from .mixer import LayerState, Mixer
from .stores import make_store


class BlockUnionAttention(Mixer):
    """Each token attends to the tokens of its own chunk up to itself and of the ``top_k`` best completed chunks, all in
    one softmax (MoBA, Lu et al., 2025; the selected branch of NSA, Yuan et al., 2025):

        r_i = q̄_t · s_i,  s_i the summary of chunk i's keys, q̄ the mean of a group's queries
        y_t = softmax(q_t · K_Sᵀ / √D) V_S W_o,  S the tokens of the best chunks by r, and of the token's own

    One choice per head of keys. Queries and keys are rotated by their position for attending, and not for choosing, so
    that a chunk is not found by how far it lies back. Choosing has no gradient: what is chosen by learns by attending.

    State: that of :class:`ChunkStore`.
    """

    def __init__(self, model: ModelConfig, mixer: BlockUnion) -> None:
        super().__init__()
        self.mixer = mixer
        self.heads, self.kv_heads = mixer.heads, mixer.kv_heads or mixer.heads
        self.width, self.base = model.dim // mixer.heads, model.rope_base
        self.qkv = Linear(model.dim, (self.heads + 2 * self.kv_heads) * self.width, model.init_std)
        pair = (self.kv_heads, self.width)
        self.store = make_store(model, mixer, "union", pair, pair)
        self.out = Linear(model.dim, model.dim, model.residual_std)

    def _streams(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k, v, and what chooses and is chosen by, each [B, T, Hkv, D]."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.width))
        plain_q, plain_k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 2)
        choosing = plain_q.detach().unflatten(2, (self.kv_heads, -1)).mean(3)
        q, k = plain_q, plain_k
        if self.mixer.rope:
            start = None if state is None else state["position"]
            q, k, v = split_rotary(qkv, self.heads, self.kv_heads, self.base, start, cu_seqlens)
        return q, k, v, choosing, plain_k.detach()

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`Mixer`."""
        y, state = self.store(*self._streams(x, state, cu_seqlens), state, cu_seqlens, return_state)
        return self.out(y.flatten(2)), state

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Nothing seen."""
        return self.store.init_state(batch, device, dtype)

    @torch.no_grad()
    def _probe(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Shares of the chunks [B, T, Nc], and numbers of every token [B, T]."""
        shares = self.store.shares(*self._streams(x, None, None)[1:])
        return shares, self.store.numbers(shares)

    @torch.no_grad()
    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """Means over the tokens of x [B, T, dim] that had a chunk to choose: ``entropy`` of the shares of the chunks
        among those that its heads chose, in nats; ``distance`` in tokens to them."""
        shares, numbers = self._probe(x)
        reads = shares.sum(-1) > 0
        return {name: (value * reads).sum() / reads.sum().clamp(min=1) for name, value in numbers.items()}

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, Tensor]:
        """See :class:`Mixer`: ``chunks`` [B, T, Nc], the share of each chunk among those chosen, and the numbers of
        :meth:`diagnose`."""
        shares, numbers = self._probe(x)
        return {"chunks": shares, **numbers}
