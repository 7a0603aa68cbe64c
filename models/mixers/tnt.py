"""TNT: a memory of the whole sequence in large chunks, and one in small chunks that begins anew with every shard."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...kernels import l2_norm, linear_attention, neural_memory, neural_memory_state
from ..config import ModelConfig
from ..mixer_config import TNT
from .gates import MemoryGates
from .mixer import LayerState
from .neural_memory import MemoryLayer, draw_start


@dataclass(frozen=True)
class Pieces:
    """Rows cut at the ends of their shards: pieces of one packed row, with ``borders``.

    ``last``: the piece that each row ends with. ``carried``: (piece, row) of those that go on with a shard. ``places``:
    tokens of its present shard that each row has seen at the end.
    """

    borders: list[int]
    last: list[int]
    carried: list[tuple[int, int]]
    places: list[int]

    @classmethod
    def of(cls, lengths: Sequence[int], places: Sequence[int], shard: int) -> "Pieces":
        """Of rows with so many new tokens, ``places`` tokens into their shards."""
        borders, last, carried = [0], [], []
        for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
            if place:
                carried.append((len(borders) - 1, row))
            begin = borders[-1]
            borders += [*range(begin + shard - place, begin + length, shard), begin + length]
            last.append(len(borders) - 2)
        after = [(place + length) % shard for length, place in zip(lengths, places, strict=True)]
        return cls(borders, last, carried, after)


class ShardedMemory(MemoryLayer):
    """y = finish(M(q; W) + M'(q'; W')), W' written in small chunks from a learnt W'_0 in every shard (TNT, Li et al.,
    2025).

        q'_t = l2_norm(Σ_{i ≤ t in the shard} k_i ⟨k_i, q_t⟩)      ``span``: asked only for what it was told

    Both memories have the same q, k and v, and gates and W_0 of their own. A shard knows nothing of those before it, so
    that all run at once; what lies further back is the first memory's, whose chunks are long and few. The paper adds up
    k kᵀ from the local chunk's start and leaves the size of q' open; here from the shard's start, and normalised.

    What is diagnosed, observed and recalled is the first memory's.
    State: those of :class:`MemoryLayer`; ``local``, ``span`` and ``position`` int32 [N], tokens of the shard so far.
    """

    def __init__(self, model: ModelConfig, mixer: TNT) -> None:
        super().__init__(model, mixer.memory)
        self.local, self.shard, self.span = mixer.local.spec, mixer.shard, mixer.span
        self.local_gates = MemoryGates(model, mixer.local, self.heads)
        shapes = self.local.weight_shapes(self.heads, self.width, self.width)
        self.local_weights = nn.ParameterList(nn.Parameter(torch.empty(*shape)) for shape in shapes)
        self.local_norm = nn.Parameter(torch.empty(self.heads, self.width)) if self.local.norm else None
        self._draw_local()

    def _draw_local(self) -> None:
        draw_start(list(self.local_weights), self.local_norm, self.local)

    def reset_parameters(self) -> None:
        """See :class:`MemoryLayer`; both memories alike."""
        super().reset_parameters()
        self._draw_local()

    @property
    def inner_chunk(self) -> int | None:
        """See :class:`Mixer`; of the local memory, as the paper serves with other chunks than it trains with."""
        return self.local.chunk_size

    def rechunk(self, size: int) -> None:
        """See :class:`Mixer`."""
        self.local = replace(self.local, chunk_size=size)

    def _beside(
        self,
        o: Tensor,
        x: Tensor,
        tokens: tuple[Tensor, Tensor, Tensor],
        held: LayerState,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, LayerState]:
        near, after = self._local(x, *tokens, held, cu_seqlens, return_state)
        return o + near, after

    def _local(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, held: LayerState, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, LayerState]:
        """What the local memory answers [B, T, H, D], and its part of the state."""
        batch, length, _ = x.shape
        lengths = [length] * batch if cu_seqlens is None else cu_seqlens.diff().tolist()
        places = held["position"].tolist() if held else [0] * len(lengths)
        pieces = Pieces.of(lengths, places, self.shard)
        borders = torch.tensor(pieces.borders, dtype=torch.int32, device=x.device)
        tokens = {"q": q, "k": k, "v": v, **self.local_gates(x)}
        tokens = {name: y.flatten(0, 1).unsqueeze(0) for name, y in tokens.items()}
        after: LayerState = {}
        if self.span:
            key = tokens["k"]
            seen, span = linear_attention(
                tokens["q"], key, key, state=self._going_on("span", held, pieces), cu_seqlens=borders, return_state=keep
            )
            tokens["q"], after["span"] = l2_norm(seen), span
        o, after["local"] = neural_memory(
            **tokens,
            weights=list(self.local_weights),
            spec=self.local,
            norm=self.local_norm,
            state=self._going_on("local", held, pieces),
            cu_seqlens=borders,
            return_state=keep,
        )
        if keep:
            after = {name: {key: y[pieces.last] for key, y in part.items()} for name, part in after.items()}
            after["position"] = torch.tensor(pieces.places, dtype=torch.int32, device=x.device)
        return o.view(batch, length, *o.shape[2:]), after

    def _going_on(self, name: str, held: LayerState, pieces: Pieces) -> LayerState | None:
        """The state that each piece begins with: a row's own where it goes on with a shard, else a fresh one."""
        if not pieces.carried:
            return None
        fresh = self._fresh(name, len(pieces.borders) - 1, held[name])
        where, rows = (list(numbers) for numbers in zip(*pieces.carried, strict=True))
        index = torch.tensor(where, device=next(iter(fresh.values())).device)
        return {key: y.index_copy(0, index, held[name][key][rows].to(y.dtype)) for key, y in fresh.items()}

    def _fresh(self, name: str, rows: int, like: LayerState) -> LayerState:
        if name == "span":
            return {key: y.new_zeros(rows, *y.shape[1:]) for key, y in like.items()}
        return neural_memory_state(list(self.local_weights), rows, self.local)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Nothing seen by either memory."""
        state = super().init_state(batch, device, dtype)
        state["local"] = neural_memory_state(list(self.local_weights), batch, self.local)
        if self.span:
            memory = state["memory"]["weights.0"]
            state["span"] = {"memory": memory.new_zeros(batch, self.heads, self.width, self.width)}
        return state | {"position": torch.zeros(batch, dtype=torch.int32, device=device)}
