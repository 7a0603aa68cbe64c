"""The past of a stream in a bank of chunks: :class:`ChunkStore` where a state is carried."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.chunk_attention import ChunkLayout, chunk_attention
from ..bank import MemoryBank
from ..config import ModelConfig
from ..mixer_config import Bank, ChunkMemory
from ..state import take_rows
from .chunk_store import Ages, ChunkStore, written
from .mixer import LayerState


class BankedStore(ChunkStore):
    """A :class:`ChunkStore` that keeps the chunks of a stream in a :class:`palimpsest.models.bank.MemoryBank`.

    Where a state is given or wanted, a token reads what the bank held when its chunk began; a chunk goes to the bank
    when it is complete. As long as nothing was left out or evicted that is what a store without a bank reads. A call
    that is neither given a state nor asked for one (training) has no bank.

    A forward is a loop over the pieces between the rows' chunk borders, which are read on the host, as is what is
    chosen; packed documents are run one by one.

    State: ``bank``, of the MemoryBank; ``k``, ``v``, ``keys``, ``queries`` [N, C − 1, ...] of the unfinished chunk;
    ``leader`` and ``position`` as without a bank.
    """

    def __init__(
        self,
        model: ModelConfig,
        mixer: ChunkMemory,
        read: Literal["two_level", "union"],
        kv: tuple[int, int],
        choosing: tuple[int, int],
        bank: Bank,
    ) -> None:
        super().__init__(model, mixer, read, kv, choosing)
        self.bank = MemoryBank(bank, mixer.chunk_size)
        self.names.remove("summary")
        self.open = [name for name in self.names if name in ("k", "v", "keys", "queries")]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        choosing: Tensor,
        keys: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
        ages: Ages | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`ChunkStore`."""
        streams = (q, k, v, choosing, keys)
        if state is None and not return_state:
            return super().forward(*streams, None, cu_seqlens, False)
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        held = self.init_state(rows, k.device, k.dtype) if state is None else state
        held = {**held, "bank": self.bank.at_home(held["bank"], k.device)}
        if cu_seqlens is None:
            o, after = self._stream(streams, held)
            return o, after if return_state else None
        outputs, states = [], []
        for n, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            own = take_rows([held], [n])
            if begin < end:
                o, own = self._stream(tuple(x[:, begin:end] for x in streams), own)
                outputs.append(o)
            states.append(own)
        return torch.cat(outputs, 1), self._together(states) if return_state else None

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Nothing seen, an empty bank."""
        state = super().init_state(batch, device, dtype)
        unfinished = torch.zeros(batch, self.chunk_size - 1, *self.kv, device=device, dtype=dtype)
        bank = self.bank.init_state(batch, self.choosing, device, dtype)
        state |= {"k": unfinished, "v": unfinished.clone(), "bank": bank}
        return {name: state[name] for name in [*self.names, "bank"]}

    def _together(self, states: list[LayerState]) -> LayerState:
        """One state of several; their banks as long as the longest."""
        room = max(state["bank"]["written"].shape[1] for state in states)
        level = []
        for state in states:
            bank = dict(state["bank"])
            for name in ("summary", "written", "used", "weight"):
                x = bank[name]
                bank[name] = F.pad(x, (0, 0) * (x.dim() - 2) + (0, room - x.shape[1]))
            level.append({**state, "bank": bank})
        return take_rows(level, range(len(level)))

    def _stream(self, streams: tuple[Tensor, ...], held: LayerState) -> tuple[Tensor, LayerState]:
        """Rows of q, k, v, choosing and keys that go on from ``held``, piece by piece."""
        length, size = streams[0].shape[1], self.chunk_size
        borders = {t for place in (held["position"] % size).tolist() for t in range(size - place, length, size)}
        outputs = []
        for begin, end in pairwise([0, *sorted(borders), length]):
            o, held = self._piece(tuple(x[:, begin:end] for x in streams), held)
            outputs.append(o)
        return torch.cat(outputs, 1), held

    def _piece(self, streams: tuple[Tensor, ...], held: LayerState) -> tuple[Tensor, LayerState]:
        """Tokens of one chunk of each row, which may complete it."""
        q, k, v, choosing, keys = streams
        rows, length, size, start = q.shape[0], q.shape[1], self.chunk_size, held["position"]
        row = torch.arange(rows, device=q.device)[:, None]
        position = start[:, None] + torch.arange(length, device=q.device)
        place = position % size
        fresh = {"k": k, "v": v, "keys": keys, "queries": choosing}
        grown = {name: written(held[name], fresh[name], row, place) for name in self.open}
        leading, leader = self._leading(choosing, position, held.get("leader"))
        slots = self.bank.choose(held["bank"], leading, self.top_k, self.branching)
        o, weight = self._attend(q, choosing, slots, place, grown["k"], grown["v"], held["bank"])
        bank = self.bank.touched(held["bank"], slots, weight, position)

        filled = start % size + length
        done = filled == size
        complete = [n for n, full in enumerate(done.tolist()) if full]
        after: LayerState = {}
        for name, x in grown.items():
            after[name] = torch.where(done[:, None, None, None], 0, x[:, : size - 1])
        if complete:
            first = {name: x[:, :size] for name, x in grown.items()}
            summary = self.scorer(first["keys"], first.get("queries", first["keys"]))
            bank = self.bank.write(bank, complete, first["k"], first["v"], summary, start + length)
        if leader is not None:
            after["leader"] = leader
        after |= {"position": start + length, "bank": bank}
        return o, {name: after[name] for name in [*self.names, "bank"]}

    def _leading(self, choosing: Tensor, position: Tensor, held: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What chooses for each token, [N, T, Hs, E], and for the run that is unfinished after them, [N, Hs, E]."""
        if held is None:
            return choosing, None
        start, share = position[:, :1], self.share
        pool = torch.cat([held[:, None].to(choosing.dtype), choosing], 1)
        ahead = torch.cat([position, position[:, -1:] + 1], 1)
        index = (ahead - ahead % share - start + 1).clamp(min=0)
        index = index.clamp(max=choosing.shape[1])[..., None, None].expand(-1, -1, *choosing.shape[2:])
        led = pool.gather(1, index.long())
        fresh = (ahead[:, -1] % share == 0)[:, None, None]
        return led[:, :-1], torch.where(fresh, 0, led[:, -1])

    def _attend(
        self, q: Tensor, choosing: Tensor, slots: Tensor, place: Tensor, k: Tensor, v: Tensor, bank: LayerState
    ) -> tuple[Tensor, Tensor]:
        """o [N, T, H, D] of tokens that read ``slots`` and, in a union, their own chunk (k, v, tokens in ``place``);
        and the weights of the chosen chunks, like ``slots``."""
        near_k, near_v, summary, have, chosen = self.bank.read(bank, slots)
        rows, length, size, count = *q.shape[:2], self.chunk_size, summary.shape[1]
        if count:
            k, v = torch.cat([near_k.to(k.dtype), k], 1), torch.cat([near_v.to(v.dtype), v], 1)
        summary = F.pad(summary.to(choosing.dtype), (0, 0, 0, 0, 0, 1))  # the unfinished chunk, which nobody chooses
        row = torch.arange(rows, device=q.device)[:, None]
        chunk, begin = torch.arange(count + 1, device=q.device), row * k.shape[1]
        start = begin + chunk * size
        filled = torch.where(chunk < count, size * (chunk < have[:, None]), place[:, -1:] + 1)
        end = start + filled
        first = (row * (count + 1)).expand(rows, length)
        local = (begin + count * size).expand(rows, length)
        laid = (start, end, first, first + count, local, local + place + 1)
        query = torch.arange(rows * length, dtype=torch.int32, device=q.device)
        start, end, first, last, local, own = (x.flatten().to(torch.int32) for x in laid)
        layout = ChunkLayout(start, end, first, last, local, own, query, 1, query.numel(), size)
        selection = torch.where(chosen < 0, -1, chosen + row[..., None, None] * (count + 1)).to(torch.int32)
        o = chunk_attention(
            q, k, v, choosing, summary, top_k=self.top_k, layout=layout, read=self.read, selection=selection
        )
        assert isinstance(o, Tensor)
        return o, self.weights(choosing.detach(), summary.detach(), chosen)
