"""Softmax attention, full or in a sliding window, with learnt tokens that are always visible."""

import torch
from torch import Tensor

from ...kernels import window_attention
from ..config import ModelConfig
from ..layers import Linear, PersistentTokens, split_rotary
from ..mixer_config import Heads
from .mixer import LayerState, Mixer


class AttentionHeads(Mixer):
    """Multi-head attention on queries, keys and values that somebody else projects: x [B, T, (heads + 2 kv_heads) · D].

    y_t = softmax(q_t · [K_P, K_{t−w+1..t}]ᵀ / √D) [V_P, V_{t−w+1..t}] with q, k rotated by their position; P, if there
    is a :meth:`prefix`, is not rotated and lies in every window.

    Args:
        model: gives dim and rope_base.
        mixer: gives heads, kv_heads, rope.
        window: tokens seen, the present one included; None: all.

    State: ``cache``, of the operation :func:`palimpsest.kernels.window_attention`; ``position`` int32 [N].
    """

    def __init__(self, model: ModelConfig, mixer: Heads, window: int | None) -> None:
        super().__init__()
        self.heads, self.kv_heads = mixer.heads, mixer.kv_heads or mixer.heads
        self.width = model.dim // mixer.heads
        self.window, self.base, self.rope = window, model.rope_base, mixer.rope

    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values [N_p, Hkv, D] that every token sees."""
        return None

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`Mixer`; y [B, T, heads · D] are the heads' outputs side by side."""
        batch, length, _ = x.shape
        position = None if state is None else state["position"]
        qkv = x.view(batch, length, -1, self.width)
        if self.rope:
            q, k, v = split_rotary(qkv, self.heads, self.kv_heads, self.base, position, cu_seqlens)
        else:
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        cache = None if state is None else cache_as(state["cache"], k.dtype)
        y, cache = self.attend(q, k, v, cache, cu_seqlens, return_state)
        y = y.flatten(2)
        if not return_state:
            return y, None
        seen = x.new_full((batch,), length, dtype=torch.int32) if cu_seqlens is None else cu_seqlens.diff()
        return y, {"cache": cache, "position": seen if position is None else position + seen}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerState | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, LayerState | None]:
        """What q [B, T, H, D] sees of k, v [B, T, Hkv, D] and of the tokens in the cache: [B, T, H, D], and the cache
        after them."""
        return window_attention(
            q,
            k,
            v,
            window=self.window,
            prefix=self.prefix(),
            state=cache,
            cu_seqlens=cu_seqlens,
            return_state=return_state,
        )

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """An empty cache."""
        empty = torch.zeros(batch, 0, self.kv_heads, self.width, device=device, dtype=dtype)
        count = torch.zeros(batch, device=device, dtype=torch.int32)
        return {"cache": {"k": empty, "v": empty.clone(), "count": count}, "position": count.clone()}


class AttentionCore(AttentionHeads):
    """:class:`AttentionHeads` with its projections, up to the heads' outputs.

    ``persistent`` learnt tokens P go through the same key and value projections.
    """

    def __init__(self, model: ModelConfig, mixer: Heads, window: int | None, persistent: int) -> None:
        super().__init__(model, mixer, window)
        self.qkv = Linear(model.dim, (self.heads + 2 * self.kv_heads) * self.width, model.init_std)
        self.persistent = PersistentTokens(persistent, model.dim) if persistent else None

    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values [N_p, Hkv, D] of the persistent tokens."""
        if self.persistent is None:
            return None
        weight = self.qkv.weight[self.heads * self.width :]
        pairs = torch.nn.functional.linear(self.persistent(), weight).view(-1, 2 * self.kv_heads, self.width)
        k, v = pairs.split(self.kv_heads, dim=1)
        return k, v

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """The same of x [B, T, dim]."""
        return super().forward(self.qkv(x), state, cu_seqlens, return_state)


def cache_as(cache: LayerState, dtype: torch.dtype) -> LayerState:
    """A cache for keys of ``dtype``: one made outside autocast is used inside, and the other way round."""
    return cache | {name: cache[name].to(dtype) for name in ("k", "v")}


class Attention(Mixer):
    """Attention with its output projection: full (``window`` None) or sliding-window."""

    def __init__(self, model: ModelConfig, mixer: Heads, window: int | None = None, persistent: int = 0) -> None:
        super().__init__()
        self.core = AttentionCore(model, mixer, window, persistent)
        self.out = Linear(model.dim, model.dim, model.residual_std)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`Mixer`."""
        y, state = self.core(x, state, cu_seqlens, return_state)
        return self.out(y), state

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """An empty cache."""
        return self.core.init_state(batch, device, dtype)
