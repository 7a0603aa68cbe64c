"""A bank of chunks: how much of a stream is kept, what is kept of it, and where it lies."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.chunk_attention import ChunkLayout, select_chunks
from .mixer_config import Bank

Page = tuple[Tensor, Tensor]
Near = tuple[Page, Tensor, Tensor]


class MemoryBank:
    """Up to ``capacity`` chunks of each of N rows: their keys and values in pages on the bank's own device, their
    summaries on the model's.

    Nothing in a state is changed in place: a write copies the page that it writes to, and shares all others. Reading a
    chunk that lies on another device copies it; the chunks read last, and those that were nearly read, stay near: the
    next ``near`` reads are likely to ask for them again.

    State: ``summary`` [N, M, Hs, E]; int64 [N, M] ``written``, the position of the row after the chunk (0: the slot is
    empty), and ``used``, that of the last token that read it; ``weight`` [N, M], the sum of the weights it was read
    with; ``pages``, by number, each ``k``, ``v`` [N, page, C, Hkv, D]. M grows by pages up to the capacity. Slots fill
    in order, so that as long as nothing has been evicted chunk i lies in slot i.

    Args:
        config: capacity, policies and place.
        chunk_size: C.
    """

    def __init__(self, config: Bank, chunk_size: int) -> None:
        self.config, self.chunk_size = config, chunk_size
        self._near: OrderedDict[tuple[int, int, int], Near] = OrderedDict()
        self._stream: Any = None

    def init_state(
        self, batch: int, choosing: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Any]:
        """No chunks, no slots."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        number = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        return {
            "summary": torch.zeros(batch, 0, *choosing, device=device, dtype=dtype),
            "written": number,
            "used": number.clone(),
            "weight": torch.zeros(batch, 0, device=device, dtype=wide),
            "pages": {},
        }

    def home(self, device: torch.device) -> torch.device:
        """Where pages lie for a model on ``device``."""
        return torch.device("cpu") if self.config.device == "cpu" else device

    def at_home(self, state: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """With every page in its place, wherever the state has been in between."""
        home = self.home(device)
        pages = state.get("pages", {})  # a state that was saved without pages comes back without the name
        if all(page["k"].device == home for page in pages.values()):
            return {**state, "pages": pages}
        moved = {number: {name: x.to(home) for name, x in page.items()} for number, page in pages.items()}
        return {**state, "pages": moved}

    # -- reading ------------------------------------------------------------------------------------------------------

    def choose(self, state: dict[str, Any], choosing: Tensor, top_k: int, branching: int | None) -> Tensor:
        """Slots int32 [N, T, Hs, top_k] of the most relevant chunks, −1 where there are no more; choosing
        [N, T, Hs, E]."""
        rows, slots = state["written"].shape
        length = choosing.shape[1]
        if not slots:
            return torch.full((*choosing.shape[:3], top_k), -1, dtype=torch.int32, device=choosing.device)
        start = torch.arange(rows * slots, dtype=torch.int32, device=choosing.device)
        query = torch.arange(rows * length, dtype=torch.int32, device=choosing.device)
        first = query // length * slots
        filled = (state["written"] > 0).to(torch.int32)
        last = first + filled.sum(1, dtype=torch.int32).repeat_interleave(length)
        nothing = torch.zeros_like(query)
        layout = ChunkLayout(start, start + filled.flatten(), first, last, nothing, nothing, query, 1, query.numel(), 1)
        ahead = 0 if branching is not None else self._ahead(choosing.device)  # a wider beam would choose otherwise
        found = select_chunks(choosing, state["summary"].to(choosing.dtype), layout, top_k + ahead, branching=branching)
        found = torch.where(found < 0, -1, found - first.view(rows, length, 1, 1))
        if ahead:
            self._fetch_ahead(state, found[..., top_k:], choosing.device)
        return found[..., :top_k].contiguous()

    def read(self, state: dict[str, Any], slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The chunks that tokens read, each once for a row.

        Args:
            state: of this bank.
            slots: [N, T, Hs, K], of :meth:`choose`.

        Returns: k, v [N, R C, Hkv, D] and summaries [N, R, Hs, E] of R chunks per row; how many of them each row really
        has, [N]; and slots as numbers of these, [N, T, Hs, K]. R = 0 where there is no page yet; k and v are then not
        to be used.
        """
        wanted = [sorted({s for s in row if s >= 0}) for row in slots.flatten(1).tolist()]
        count, device = max(len(row) for row in wanted), slots.device
        number = torch.full((len(wanted), state["written"].shape[1] + 1), -1, dtype=torch.int32)
        for n, row in enumerate(wanted):
            number[n, row] = torch.arange(len(row), dtype=torch.int32)
        chosen = number.to(device).gather(1, slots.flatten(1).long() % number.shape[1]).view_as(slots)
        have = torch.tensor([len(row) for row in wanted], device=device)
        if not count:
            return (*(slots.new_zeros(0) for _ in range(2)), state["summary"][:, :0], have, chosen)
        padded = [row + [0] * (count - len(row)) for row in wanted]
        index = torch.tensor(padded, device=device)
        summary = state["summary"].gather(1, index[..., None, None].expand(-1, -1, *state["summary"].shape[2:]))
        pairs = [[self._chunk(state, n, slot, device) for slot in row] for n, row in enumerate(padded)]
        k, v = (torch.stack([torch.cat([pair[i] for pair in row]) for row in pairs]) for i in range(2))
        return k, v, summary, have, chosen

    def touched(self, state: dict[str, Any], slots: Tensor, weight: Tensor, position: Tensor) -> dict[str, Any]:
        """The state after tokens at ``position`` [N, T] have read ``slots`` [N, T, Hs, K] with ``weight`` (like it)."""
        room = state["written"].shape[1]
        if not room:
            return state
        index = torch.where(slots < 0, room, slots.long()).flatten(1)  # one more slot, for what was not there
        when = (position + 1)[..., None, None].expand(slots.shape).flatten(1)
        used = F.pad(state["used"], (0, 1)).scatter_reduce(1, index, when.to(torch.int64), "amax")[:, :room]
        share = (weight / slots.shape[2]).to(state["weight"].dtype).flatten(1)
        return {**state, "used": used, "weight": F.pad(state["weight"], (0, 1)).scatter_add(1, index, share)[:, :room]}

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(
        self, state: dict[str, Any], rows: list[int], k: Tensor, v: Tensor, summary: Tensor, position: Tensor
    ) -> dict[str, Any]:
        """The state with one more chunk in each of ``rows``, unless the write policy leaves it out.

        Args:
            state: of this bank.
            rows: rows that have completed a chunk.
            k, v: [N, C, Hkv, D]; rows that are not among ``rows`` are not looked at.
            summary: [N, Hs, E].
            position: int [N], tokens of each row, the chunk's last among them.
        """
        slots = {n: self._slot(state, n, position) for n in rows if self._is_new(state, n, summary)}
        if not slots:
            return state
        room = state["written"].shape[1]
        more = max(slots.values()) // self.config.page * self.config.page + self.config.page
        more = max(min(more, self.config.capacity) - room, 0)
        after = {name: _widened(state[name], more) for name in ("summary", "written", "used", "weight")}
        at = (torch.tensor(list(slots), device=k.device), torch.tensor(list(slots.values()), device=k.device))
        now = position[at[0]].to(torch.int64)
        values = {"summary": summary[at[0]], "written": now, "used": now}
        for name, value in values.items():
            after[name] = after[name].index_put(at, value.to(after[name].dtype))
        after["weight"] = after["weight"].index_put(at, torch.zeros_like(now, dtype=after["weight"].dtype))
        pages = dict(state["pages"])
        for number in sorted({slot // self.config.page for slot in slots.values()}):
            mine = [n for n, slot in slots.items() if slot // self.config.page == number]
            places = [slots[n] % self.config.page for n in mine]
            pages[str(number)] = {
                name: self._rewritten(pages.get(str(number), {}).get(name), x, mine, places)
                for name, x in (("k", k), ("v", v))
            }
        return {**after, "pages": pages}

    def _is_new(self, state: dict[str, Any], row: int, summary: Tensor) -> bool:
        """Whether the write policy keeps a chunk: surprise asks how far the most similar summary is from its own."""
        kept = state["written"][row] > 0
        if self.config.write == "every" or not bool(kept.any()):
            return True
        known = state["summary"][row][kept].detach().flatten(1)
        likeness = F.cosine_similarity(known, summary[row].detach().flatten()[None].to(known.dtype))
        return 1 - float(likeness.max()) > self.config.threshold

    def _slot(self, state: dict[str, Any], row: int, position: Tensor) -> int:
        """The next free slot of a row, or that of the chunk that the eviction policy gives up: of equals the oldest."""
        written = state["written"][row]
        filled = int((written > 0).sum())
        if filled < self.config.capacity:
            return filled
        worth = {
            "fifo": lambda: written,
            "lru": lambda: state["used"][row],
            "least_relevant": lambda: state["weight"][row] / (position[row] - written).clamp(min=1),
        }[self.config.evict]()
        order = written.argsort()
        return int(order[worth[order].sort(stable=True).indices[0]])

    def _rewritten(self, page: Tensor | None, x: Tensor, rows: list[int], places: list[int]) -> Tensor:
        """A copy of a page (None: a new one) in which x[n] lies at its place for each of the rows."""
        home = self.home(x.device)
        if page is None:
            page = torch.zeros(x.shape[0], self.config.page, *x.shape[1:], dtype=x.dtype, device=home)
        at = (torch.tensor(rows, device=home), torch.tensor(places, device=home))
        made = page.index_put(at, x[rows].to(home, page.dtype))
        return made.pin_memory() if home.type == "cpu" and x.device.type == "cuda" else made

    # -- near ---------------------------------------------------------------------------------------------------------

    def _far(self, device: torch.device) -> bool:
        """Whether pages lie elsewhere than the model."""
        return self.home(device) != device

    def _ahead(self, device: torch.device) -> int:
        """How many chunks more than are read are chosen, to be near for the tokens that follow."""
        return self.config.ahead if self._far(device) and not torch.is_grad_enabled() else 0

    def _chunk(self, state: dict[str, Any], row: int, slot: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """k, v [C, Hkv, D] of a chunk, on ``device``."""
        page = state["pages"][str(slot // self.config.page)]
        place = slot % self.config.page
        if not self._far(device) or torch.is_grad_enabled():
            return page["k"][row, place].to(device), page["v"][row, place].to(device)
        # By identity: a page that was written to is another tensor, and as long as it is held here its id is its own.
        key = (id(page["k"]), row, place)
        if key not in self._near:
            k, v = (page[name][row, place].to(device, non_blocking=True) for name in ("k", "v"))
            self._near[key] = ((page["k"], page["v"]), k, v)
            if len(self._near) > self.config.near:
                self._near.popitem(last=False)
        elif self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)
        self._near.move_to_end(key)
        return self._near[key][1:]

    def _fetch_ahead(self, state: dict[str, Any], slots: Tensor, device: torch.device) -> None:
        """Begin to bring chunks near that were nearly chosen, beside the work on those that were."""
        wanted = [sorted({s for s in row if s >= 0}) for row in slots.flatten(1).tolist()]
        if device.type != "cuda":
            for n, row in enumerate(wanted):
                for slot in row:
                    self._chunk(state, n, slot, device)
            return
        current = torch.cuda.current_stream(device)
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for n, row in enumerate(wanted):
                for slot in row:
                    for x in self._chunk(state, n, slot, device):
                        x.record_stream(current)


def _widened(x: Tensor, more: int) -> Tensor:
    """x [N, M, ...] with ``more`` empty slots behind its M."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, more)) if more else x
