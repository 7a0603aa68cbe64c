"""HCAM: local attention, then attention over chunks of the past and inside the best of them."""

from functools import lru_cache

import torch
from torch import Tensor

from ..config import ModelConfig
from ..layers import Linear, RMSNorm, token_positions
from ..mixer_config import HCAM
from .attention import AttentionCore
from .mixer import LayerState, Mixer
from .stores import make_store


def ages(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """P [C, width], row j the sinusoids (Vaswani et al., 2017) of age C − 1 − j: sines, then cosines."""
    rate = 10000.0 ** (torch.arange(0, width, 2, device=device, dtype=torch.float64) / -width)
    angle = torch.arange(count - 1, -1, -1, device=device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width].to(dtype)


@lru_cache(maxsize=16)
def _known_ages(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # made for inference it must serve training too
        return ages(count, width, dtype, device)


class HierarchicalMemory(Mixer):
    """Sliding-window attention, then a memory of chunks (HCAM, Lampinen et al., 2021):

        a_t = local attention over the last tokens x and the persistent ones, projected
        z_t = norm(x_t + a_t)                                       what is remembered, and what asks
        r_i = (W_r z_t) · s_i / √E,  s_i from the W_s z of chunk i     relevance of each completed chunk
        m_t = Σ_i softmax_i(r)  MHA(z_t; C_i + P)                   over the top_k chunks, a softmax inside each
        y_t = a_t + m_t W_m                                         combine: residual
        y_t = a_t + (σ(z_t W_g) ⊙ m_t) W_m                          combine: gate, one per head

    C_i are the z of the chunk's tokens and P sinusoids of their age in the chunk, 0 for its newest. A token never reads
    its own unfinished chunk through the memory: the window is there for that, and leaves no gap when it is at least
    ``chunk_size`` + ``share`` − 1. Where no chunk is complete, m = 0.

    The paper's memory holds the inputs of its layer; here z, which has been through the local attention, so that the
    token that follows a name is remembered as such. ``detach`` stops gradients into the z that is remembered, as in the
    paper; W_s and the maps to keys and values still learn.

    State: ``attention``, of the local attention; ``memory``, of :class:`ChunkStore`.
    """

    def __init__(self, model: ModelConfig, mixer: HCAM) -> None:
        super().__init__()
        self.mixer, self.dim = mixer, model.dim
        self.heads, self.kv_heads = mixer.heads, mixer.kv_heads or mixer.heads
        self.width = model.dim // mixer.heads
        choosing = (mixer.selectors, mixer.selection_width or self.width)
        self.local = AttentionCore(model, mixer, mixer.window, mixer.persistent)
        self.local_out = Linear(model.dim, model.dim, model.residual_std)
        self.norm = RMSNorm(model.dim, model.norm_eps)
        self.ask = Linear(model.dim, model.dim + choosing[0] * choosing[1], model.init_std)  # q, what chooses
        self.keep = Linear(model.dim, choosing[0] * choosing[1], model.init_std)
        self.kv = Linear(model.dim, 2 * self.kv_heads * self.width, model.init_std)
        self.store = make_store(model, mixer, "two_level", (self.kv_heads, self.width), choosing)
        self.ages = self._age_pairs if mixer.cut is not None else None
        self.gate = Linear(model.dim, mixer.heads, model.init_std) if mixer.combine == "gate" else None
        self.out = Linear(model.dim, model.dim, model.residual_std)

    def _streams(
        self, z: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k, v [B, T, Hkv, D] and what chooses and is chosen by, [B, T, Hs, E]."""
        selectors, size = self.mixer.selectors, self.mixer.chunk_size
        q, choosing = self.ask(z).split([self.dim, self.keep.out_features], -1)
        past = z.detach() if self.mixer.detach else z
        placed = past
        if self.ages is None:
            start = None if state is None else state["position"]
            position = token_positions(z.shape[1], start, cu_seqlens, z.device)
            table = ages if torch.compiler.is_compiling() else _known_ages
            placed = past + table(size, self.dim, z.dtype, z.device)[position % size]
        k, v = self._pairs(placed)
        keys = self.keep(past).unflatten(-1, (selectors, -1))
        return q.unflatten(-1, (self.heads, self.width)), k, v, choosing.unflatten(-1, (selectors, -1)), keys

    def _pairs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [..., Hkv, D] of z [..., dim]."""
        k, v = self.kv(z).unflatten(-1, (2 * self.kv_heads, self.width)).split(self.kv_heads, -2)
        return k, v

    def _age_pairs(self) -> tuple[Tensor, Tensor]:
        """k and v [C, Hkv, D] of P, for a store that knows a token's age only when its chunk closes."""
        weight = self.kv.weight
        return self._pairs(_known_ages(self.mixer.chunk_size, self.dim, weight.dtype, weight.device))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`Mixer`."""
        held = state or {"attention": None, "memory": None}
        a, attention = self.local(x, held["attention"], cu_seqlens, return_state)
        a = self.local_out(a)
        z = self.norm(x + a)
        streams = self._streams(z, held["memory"], cu_seqlens)
        m, memory = self.store(*streams, held["memory"], cu_seqlens, return_state, self.ages)
        y = a + self._combined(m, z)
        return y, {"attention": attention, "memory": memory} if return_state else None

    def _combined(self, m: Tensor, z: Tensor) -> Tensor:
        """What is added to the local attention's answer, of m [B, T, H, D]."""
        if self.gate is not None:
            m = m * torch.sigmoid(self.gate(z))[..., None].to(m.dtype)
        return self.out(m.flatten(2))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Nothing seen."""
        return {
            "attention": self.local.init_state(batch, device, dtype),
            "memory": self.store.init_state(batch, device, dtype),
        }

    @torch.no_grad()
    def _probe(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weights of the chunks [B, T, Nc], and numbers of every token [B, T]."""
        a = self.local_out(self.local(x, None, None, False)[0])
        z = self.norm(x + a)
        streams = self._streams(z, None, None)
        shares = self.store.shares(*streams[1:])
        m = self._combined(self.store(*streams, None, None, False, self.ages)[0], z)
        numbers = self.store.numbers(shares)
        if self.gate is not None:
            numbers["gate"] = torch.sigmoid(self.gate(z)).mean(-1)
        return shares, numbers | {"strength": m.norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-12)}

    @torch.no_grad()
    def diagnose(self, x: Tensor) -> dict[str, Tensor]:
        """Means over the tokens of x [B, T, dim] that had a chunk to read: ``entropy`` of the chunks' weights, in nats;
        ``distance`` in tokens to the chunks, by weight; ``strength``, the norm of what the memory adds over that of
        the local attention's answer; ``gate``, where there is one, a mean over heads."""
        shares, numbers = self._probe(x)
        reads = shares.sum(-1) > 0
        return {name: (value * reads).sum() / reads.sum().clamp(min=1) for name, value in numbers.items()}

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, Tensor]:
        """See :class:`Mixer`: ``chunks`` [B, T, Nc], the weight of each chunk, and the numbers of :meth:`diagnose`."""
        shares, numbers = self._probe(x)
        return {"chunks": shares, **numbers}
