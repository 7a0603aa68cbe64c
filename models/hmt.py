"""HMT: a language model that reads in segments and recalls what earlier segments left in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from ..kernels.check import compute_dtype
from .config import ModelConfig
from .hmt_config import HMTConfig
from .layers import Linear, token_positions
from .mixers import LayerState
from .state import take_rows


class Backbone(Protocol):
    """What a model does for its segments; see :class:`palimpsest.models.lm.MemoryLM`."""

    @property
    def embed(self) -> nn.Embedding:
        """Embeddings of tokens."""

    def through(
        self, x: Tensor, layers: list[LayerState] | None, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, list[LayerState]]:
        """Embeddings x [B, T, dim] to the last hidden values, and the layers' states."""

    def fresh(self, batch: int) -> list[LayerState]:
        """The layers' states before the first token."""


class Recall(nn.Module):
    """p = softmax(W_q s · (W_k M)ᵀ / √d) M: attention of one query over memory vectors, which are their own values.

    W_q and W_k ~ N(0, 1/d), so that scores are of size one for normalised s and M.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = Linear(dim, dim, dim**-0.5)
        self.key = Linear(dim, dim, dim**-0.5)

    def forward(self, summary: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """s [B, dim], M [B, n, dim] → p [B, dim] and the weights [B, n]."""
        scores = self.key(memory) @ self.query(summary)[..., None]
        weights = (scores[..., 0].to(compute_dtype(scores)) * memory.shape[-1] ** -0.5).softmax(-1)
        return (weights.to(memory.dtype)[:, None] @ memory)[:, 0], weights


@dataclass(frozen=True)
class Text:
    """The tokens that a call can read: those of each row, behind the last ones of the calls before.

    ``ids`` int64, flat; row r's first new token lies at ``base[r]``, and is its token number ``position[r]``.
    """

    ids: Tensor
    base: list[int]
    position: list[int]
    length: list[int]

    def read(self, starts: list[int], count: int) -> Tensor:
        """[len(starts), count] tokens from each of these places on."""
        first = torch.tensor(starts, device=self.ids.device)
        return self.ids[first[:, None] + torch.arange(count, device=self.ids.device)]


@dataclass(frozen=True)
class Rows:
    """Rows that have seen the same number of tokens, ``done`` of them in this call, and what they hold: memory vectors
    M [R, n, dim], the prompt p [R, dim] of the segment that they are in, and the layers' states where it has begun."""

    rows: list[int]
    done: int
    memory: Tensor
    prompt: Tensor
    layers: list[LayerState]

    def some(self, chosen: list[int]) -> "Rows":
        """Those at the given places among these."""
        if len(chosen) == len(self.rows):
            return self
        layers = [take_rows([layer], chosen) for layer in self.layers]
        return Rows([self.rows[i] for i in chosen], self.done, self.memory[chosen], self.prompt[chosen], layers)


class SegmentMemory(nn.Module):
    """Hierarchical memory over the segments H_0, H_1, … of L tokens of a sequence (HMT; He et al., 2024, section 3):

        s_n = last hidden of backbone [T ‖ h tokens ‖ T]                                  summary
        p_n = softmax(W_q s_n · (W_k M)ᵀ / √d) M,  M = m_{n−N} … m_{n−1}                  recall; p_0 = e
        y_n ‖ m_n = hidden of backbone [γp_n ‖ last k tokens of H_{n−1} ‖ H_n ‖ γp_n]     at H_n and at the last slot

    with T and e learnt vectors. Every pass of the backbone starts from an empty state of its own, so its cost and its
    positions do not grow with the text; only the m_n go from segment to segment.

    The h tokens of the query: "previous" (the default), the last of H_{n−1}: no token sees a later one. "half", the
    first of H_n, as published: then the hidden values at them have seen ahead, and do not count
    (:meth:`counted`: what is said from token h − 1 of a segment on has seen nothing later). While a call has not read
    that many tokens of a segment, they are read with p_{n−1}; when it has, the segment is read again from its first.
    "none": p_n = m_{n−1}, and there is neither summary nor recall (the first stage of training).

    One thing is not in the paper: p enters at the embeddings' scale, times a learnt γ (at first ``init_std``), because
    m is a normalised hidden value. Entering as it is, it would outweigh what the layers add to it, and at first every
    m_n would nearly be p_n. As in the paper, no projection follows the recall.

    Gradients: M is detached where n is a multiple of ``bptt``. So the loss of segment n reaches the memory vectors of
    its own block of ``bptt`` segments and, exactly, nothing before; of the tokens, those of its block, and of the
    segment before it what s_n and the sensory tokens read directly.

    A state has, after the layers' own (of the segment under way, empty between two): ``memory`` [rows, N, dim], the
    newest last; ``prompt`` [rows, dim]; ``tokens`` int64 [rows, ·], the last ones, to be read again.
    """

    def __init__(self, model: ModelConfig, hmt: HMTConfig) -> None:
        super().__init__()
        self.segment, self.sensory, self.memories, self.bptt = hmt.segment, hmt.sensory, hmt.memories, hmt.bptt
        self.recall_by, self.asking = hmt.recall, hmt.asking
        self.std, self.dim = model.init_std, model.dim
        needed = {"previous": max(hmt.sensory, hmt.asking), "half": hmt.sensory + hmt.asking, "none": hmt.sensory}
        self.kept = needed[hmt.recall]
        self.empty = nn.Parameter(torch.empty(model.dim))
        self.gain = nn.Parameter(torch.empty(model.dim))
        self.topic = None if hmt.recall == "none" else nn.Parameter(torch.empty(model.dim))
        self.recall = None if hmt.recall == "none" else Recall(model.dim)
        self.passes = 1  # of the backbone, in the last call
        self.reading: slice | None = None  # of the pass under way: where the new tokens are; None in a summary
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """e ~ N(0, 1), as memory vectors are; T as an embedding; γ = init_std. W_q and W_k draw themselves."""
        nn.init.normal_(self.empty)
        nn.init.constant_(self.gain, self.std)
        if self.topic is not None:
            nn.init.normal_(self.topic, std=self.std)

    def counted(self, targets: Tensor, position: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Targets [B, T] with −100 for those that are said from a place that has seen ahead."""
        place = token_positions(targets.shape[1], position, cu_seqlens, targets.device) % self.segment
        return targets.masked_fill(place < self.asking - 1, -100)

    def init_state(self, backbone: Backbone, batch: int) -> list[LayerState]:
        """No memory vectors, no tokens."""
        weight = backbone.embed.weight
        own = {
            "memory": torch.zeros(batch, self.memories, self.dim, dtype=weight.dtype, device=weight.device),
            "prompt": torch.zeros(batch, self.dim, dtype=weight.dtype, device=weight.device),
            "tokens": torch.zeros(batch, self.kept, dtype=torch.int64, device=weight.device),
        }
        return [*backbone.fresh(batch), own]

    def forward(
        self,
        backbone: Backbone,
        tokens: Tensor,
        layers: list[LayerState] | None,
        position: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, list[LayerState]]:
        """Hidden values [B, T, dim] of tokens, and the state's layers after them (empty unless ``keep``).

        Rows that stand at different places, and documents, go together as long as they are equally far; how far they
        are is read on the host.
        """
        batch, length = tokens.shape
        count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        held = self.init_state(backbone, count) if layers is None else layers
        places = [0] * count if position is None else position.tolist()
        text = self._text(tokens, held[-1]["tokens"], places, cu_seqlens)
        self.passes = 0
        asked = self._summaries(backbone, text)
        found: list[tuple[list[int], int, Tensor]] = []
        ended: list[Rows] = []
        for group in self._groups(text, held):
            open_ = [group]
            while open_:
                rows = open_.pop()
                for part, take in self._equal(rows, text):
                    if not take:
                        ended.append(part)
                        continue
                    y, after = self._piece(backbone, text, asked, part, take, keep)
                    found.append((part.rows, part.done, y))
                    open_.append(after)
        y = self._in_order(found, text, batch, length)
        return y, self._state(backbone, text, ended) if keep else []

    @torch.no_grad()
    def observe(self, weights: list[Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """Of each token's segment, [B, T], from the weights [B, n] of each recall: ``age``, how many segments back the
        recalled vectors are made, and ``recalled``, how many they are (the exponential of the weights' entropy), both
        in the mean. NaN where nothing is recalled: in the first segment, and in a half that is not yet read."""
        told: dict[str, list[Tensor]] = {"age": [], "recalled": []}
        for share in weights:
            back = torch.arange(share.shape[1], 0, -1, device=share.device, dtype=share.dtype)
            told["age"].append((share * back).sum(-1))
            told["recalled"].append(torch.special.entr(share).sum(-1).exp())
        nothing = torch.full_like(told["age"][0], torch.nan)
        segment = torch.arange(tokens.shape[1], device=tokens.device) // self.segment
        return {name: torch.stack([nothing, *values, nothing], 1)[:, segment] for name, values in told.items()}

    @torch.no_grad()
    def diagnose(self, weights: list[Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """The means over tokens of what :meth:`observe` says."""
        return {name: value.nanmean() for name, value in self.observe(weights, tokens).items()}

    # -- what is to be read --------------------------------------------------------------------------------------------

    def _text(self, tokens: Tensor, before: Tensor, places: list[int], cu_seqlens: Tensor | None) -> Text:
        batch, length = tokens.shape
        if cu_seqlens is None:
            base = [row * (self.kept + length) + self.kept for row in range(batch)]
            return Text(torch.cat([before, tokens], 1).flatten(), base, places, [length] * batch)
        borders = cu_seqlens.tolist()
        sizes = [end - start for start, end in pairwise(borders)]
        pieces = tokens[0].split(sizes)
        base = [start + (row + 1) * self.kept for row, start in enumerate(borders[:-1])]
        ids = torch.cat([x for pair in zip(before, pieces, strict=True) for x in pair])
        return Text(ids, base, places, sizes)

    def _groups(self, text: Text, held: list[LayerState]) -> Iterator[Rows]:
        """The rows by the number of tokens that they have seen before this call."""
        own = held[-1]
        rows_of: dict[int, list[int]] = {}
        for row, place in enumerate(text.position):
            rows_of.setdefault(place, []).append(row)
        whole = Rows(list(range(len(text.base))), 0, own["memory"], own["prompt"], held[:-1])
        for place, rows in rows_of.items():
            part = whole.some(rows)
            count = min(place // self.segment, self.memories)
            layers = part.layers if place % self.segment else []
            yield replace(part, memory=part.memory[:, self.memories - count :], layers=layers)

    def _equal(self, rows: Rows, text: Text) -> list[tuple[Rows, int]]:
        """Parts that go equally many tokens further, at most to the end of the segment; 0: the row has ended."""
        left = self.segment - (text.position[rows.rows[0]] + rows.done) % self.segment
        places: dict[int, list[int]] = {}
        for i, row in enumerate(rows.rows):
            places.setdefault(min(left, text.length[row] - rows.done), []).append(i)
        return [(rows.some(chosen), take) for take, chosen in places.items()]

    # -- one segment ---------------------------------------------------------------------------------------------------

    def _summaries(self, backbone: Backbone, text: Text) -> dict[tuple[int, int], Tensor]:
        """s by (row, segment), of all segments whose prompt is made in this call: none depends on another."""
        if self.recall_by == "none":
            return {}
        half = self.recall_by == "half"
        keys, starts = [], []
        for row, (place, length) in enumerate(zip(text.position, text.length, strict=True)):
            due = self.asking - 1 if half else 0  # the token of a segment with which its prompt is made
            first = max(1, -(-(place - due) // self.segment))
            for segment in range(first, -(-(place + length - due) // self.segment)):
                begin = text.base[row] + segment * self.segment - place
                keys.append((row, segment))
                starts.append(begin if half else begin - self.asking)
        if not keys:
            return {}
        assert self.topic is not None
        topic = self.topic.expand(len(keys), 1, -1)
        x = torch.cat([topic, backbone.embed(text.read(starts, self.asking)), topic], 1)
        self.passes, self.reading = self.passes + 1, None
        hidden, _ = backbone.through(x, None, None, False)
        return dict(zip(keys, hidden[:, -1].unbind(), strict=True))

    def _prompt(self, asked: dict[tuple[int, int], Tensor], part: Rows, segment: int, memory: Tensor) -> Tensor:
        """p of a segment [R, dim]."""
        if not segment:
            return self.empty.expand(len(part.rows), -1)
        if self.recall is None:
            return memory[:, -1]
        return self.recall(torch.stack([asked[row, segment] for row in part.rows]), memory)[0]

    def _piece(
        self,
        backbone: Backbone,
        text: Text,
        asked: dict[tuple[int, int], Tensor],
        part: Rows,
        take: int,
        keep: bool,
    ) -> tuple[Tensor, Rows]:
        """Hidden values [R, take, dim] of the next tokens, all of one segment, and the rows after them."""
        segment, at = divmod(text.position[part.rows[0]] + part.done, self.segment)
        again = self.recall_by == "half" and at < self.asking <= at + take
        begin = again or not at
        memory, prompt, layers, lead = part.memory, part.prompt, part.layers, 0
        if begin:
            memory = memory.detach() if segment % self.bptt == 0 else memory
            if again or self.recall_by != "half" or not segment:
                prompt = self._prompt(asked, part, segment, memory)
            layers, lead = [], at + (min(self.sensory, segment * self.segment))
        complete = at + take == self.segment
        slot_last = complete and (keep or any(text.length[row] > part.done + take for row in part.rows))
        starts = [text.base[row] + part.done - lead for row in part.rows]
        slot = (prompt * self.gain)[:, None]
        x = backbone.embed(text.read(starts, lead + take))
        x = torch.cat([slot] * begin + [x] + [slot] * slot_last, 1)
        self.passes, self.reading = self.passes + 1, slice(begin + lead, begin + lead + take)
        hidden, layers = backbone.through(x, layers or None, None, keep and not complete)
        if slot_last:
            memory = torch.cat([memory.to(hidden.dtype), hidden[:, -1:]], 1)[:, -self.memories :]
        after = replace(part, done=part.done + take, memory=memory, prompt=prompt, layers=layers)
        return hidden[:, self.reading], after

    # -- what comes of it ----------------------------------------------------------------------------------------------

    def _in_order(self, found: list[tuple[list[int], int, Tensor]], text: Text, batch: int, length: int) -> Tensor:
        """The pieces' hidden values at their places, [B, T, dim]."""
        if all(len(rows) == batch and y.dim() == 3 for rows, _, y in found) and len(text.base) == batch:
            return torch.cat([y for _, _, y in found], 1)
        first = [base - (row + 1) * self.kept for row, base in enumerate(text.base)]  # among the tokens of the call
        where, values = [], []
        for rows, done, y in found:
            start = torch.tensor([first[row] + done for row in rows], device=y.device)
            where.append((start[:, None] + torch.arange(y.shape[1], device=y.device)).flatten())
            values.append(y.flatten(0, 1))
        return torch.cat(values)[torch.cat(where).argsort()].view(batch, length, -1)

    def _state(self, backbone: Backbone, text: Text, ended: list[Rows]) -> list[LayerState]:
        """The state of all rows, from the parts in which they ended."""
        kind = backbone.embed.weight.dtype
        parts: list[list[LayerState]] = []
        for part in ended:
            memory = part.memory.to(kind)
            missing = self.memories - memory.shape[1]
            memory = torch.cat([memory.new_zeros(len(part.rows), missing, self.dim), memory], 1)
            last = [text.base[row] + text.length[row] - self.kept for row in part.rows]
            own = {"memory": memory, "prompt": part.prompt.to(kind), "tokens": text.read(last, self.kept)}
            parts.append([*(part.layers or backbone.fresh(len(part.rows))), own])
        order = [row for part in ended for row in part.rows]
        if order == list(range(len(order))) and len(parts) == 1:
            return parts[0]
        places = [order.index(row) for row in range(len(order))]
        return [take_rows(layer, places) for layer in zip(*parts, strict=True)]
