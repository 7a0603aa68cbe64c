"""What each token mixer exchanges, so that the parts of a sequence in several processes are one sequence.

Applied from outside: methods of a model's own modules are replaced, one by one, by ones that exchange where a
:class:`~.passage.Passage` is under way, and are the original ones where none is. What is exchanged depends on the kind:

    borders     window attention: keys and values of the window − 1 tokens before (full attention: of all);
                short convolutions: width − 1 inputs. Every process sends before it waits.
    summaries   a memory that is linear in its state: M' = A M + B over a part, A and B known before M is. Only M' goes
                from process to process; then each reads with the M that it got.
    states      all else: the state that the part before leaves behind, by the contract of every mixer that a whole is
                its first part and then the rest from the first one's state. One process after the other, and several
                micro batches on their way at once.

Of packed documents only one goes on from a part to the next, if any; see :mod:`.documents`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...kernels.routing import Routing, dispatch
from ...models import MemoryLM
from ...models.losses import add_loss, collected
from ...models.mixers import LayerState, Mixer
from ...models.mixers.attention import Attention, AttentionHeads
from ...models.mixers.block_union import BlockUnionAttention
from ...models.mixers.chunk_store import ChunkStore
from ...models.mixers.hcam import HierarchicalMemory
from ...models.mixers.lact import LargeChunkMemory
from ...models.mixers.mag import MemoryAsGate
from ...models.mixers.mal import MemoryAsLayer
from ...models.mixers.mixture import MixtureOfMemories
from ...models.mixers.neural_memory import MemoryLayer
from ...models.mixers.tnt import ShardedMemory
from .documents import Piece
from .link import Tree
from .passage import Passage, joined

Step = tuple[Tensor, LayerState | None]


class Underway(Protocol):
    """Where the passage that is under way stands."""

    now: Passage | None


def divide(model: MemoryLM, division: Underway, *, whole: bool = False) -> None:
    """Have the mixers of a model exchange during ``division.now``.

    Args:
        whole: every mixer as one that nothing is known of, whose state is handed on. Not for one with a bank, which
            reads what is kept where it is given a state.
    """
    for layer, block in enumerate(model.blocks):
        mixer: Any = block.mixer
        handed = partial(_whole, what=f"the state of layer {layer}")
        parts = handed if whole else partial(KINDS.get(type(mixer), handed), what=f"layer {layer}")
        parts(mixer, division)
        _outside(mixer, division)
        if isinstance(mixer, MixtureOfMemories):
            _replace(mixer, "route", division, partial(_route, mixer))
        _replace(mixer, "forward", division, partial(_reached, mixer))


def hands_on(mixer: Mixer) -> bool:
    """Whether a process waits with this mixer until the one before has run it: not where all borders and summaries are
    known at once."""
    if isinstance(mixer, MixtureOfMemories):
        return mixer.spec is not None or (mixer.conv is not None and mixer.memories > 1)
    return type(mixer) is not Attention


def checkpointed(model: MemoryLM, division: Underway) -> None:
    """Keep of each block its inputs and what it received, and run it again in the backward pass, without exchanges; as
    :func:`palimpsest.train.parallel.checkpoint_blocks`."""
    for block in model.blocks:
        original = block.forward

        def forward(*args: Any, original: Callable[..., Any] = original) -> Any:
            now = division.now
            if now is None:
                return checkpoint(original, *args, use_reentrant=False)
            heard: list[Tree] = []
            again = False

            def run(*args: Any) -> Any:
                nonlocal again
                if not again:
                    again = True
                    with now.recorded(heard):
                        return original(*args)
                before, division.now = division.now, now.again(heard)
                try:
                    return original(*args)
                finally:
                    division.now = before

            return checkpoint(run, *args, use_reentrant=False)

        block.forward = forward


def _replace(module: nn.Module, name: str, division: Underway, method: Callable[..., Any]) -> None:
    """``module.name(…)`` becomes ``method(passage, original, …)`` while a passage is under way."""
    original = getattr(module, name)

    @wraps(original)
    def instead(*args: Any, **options: Any) -> Any:
        if division.now is None:
            return original(*args, **options)
        return method(division.now, original, *args, **options)

    setattr(module, name, instead)


def _reached(module: nn.Module, now: Passage, original: Callable[..., Any], *args: Any) -> Any:
    """Every parameter of a module is reached, those also that only the first process uses: W_0."""
    now.reached([p for p in module.parameters() if p.requires_grad])
    return original(*args)


def _outside(mixer: Mixer, division: Underway) -> None:
    """A fresh state is made without exchanges."""
    original = mixer.init_state

    @wraps(original)
    def init_state(batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        now, division.now = division.now, None
        try:
            return original(batch, device, dtype)
        finally:
            division.now = now

    setattr(mixer, "init_state", init_state)  # noqa: B010  (a method is replaced on purpose)


def _whole(mixer: Mixer, division: Underway, what: str) -> None:
    """The state of a mixer is handed on."""

    def forward(now: Passage, original: Callable[..., Step], x: Tensor, *_: Any) -> Step:
        def run(piece: Piece, state: LayerState | None, keep: bool) -> Step:
            return original(x[:, piece.tokens], state, piece.cu_seqlens, keep)

        return joined(now.hand_on(what, run)), None

    _replace(mixer, "forward", division, forward)


# -- attention ---------------------------------------------------------------------------------------------------------


def _attention(core: AttentionHeads, division: Underway, what: str) -> None:
    """Keys and values of the window before."""
    what = f"the keys and values of {what}"

    def forward(now: Passage, original: Callable[..., Step], x: Tensor, state: Any = None, *_: Any) -> Step:
        if not now.first:
            rows = x.shape[0] if now.cu_seqlens is None else len(now.cu_seqlens) - 1
            held = core.init_state(rows, x.device, x.dtype) if state is None else state
            state = held | {"position": held["position"] + now.seen(rows)}
        return original(x, state, now.cu_seqlens, False)

    def attend(
        now: Passage, original: Callable[..., Step], q: Tensor, k: Tensor, v: Tensor, cache: Any, *_: Any
    ) -> Step:
        size = None if core.window is None else core.window - 1
        held = None if cache is None else {"k": cache["k"], "v": cache["v"]}
        if now.documents is None:
            return original(q, k, v, _cache(now.before({"k": k, "v": v}, size, what, held)), None, False)
        past = now.before({"k": k, "v": v}, size, what)

        def run(piece: Piece) -> Tensor:
            own = {} if held is None else {name: x[piece.rows] for name, x in held.items()}
            if piece.takes:
                own = {name: torch.cat([own[name].to(x.dtype), x], 1) if own else x for name, x in past.items()}
            near = (x[:, piece.tokens] for x in (q, k, v))
            return original(*near, _cache(own), piece.cu_seqlens, False)[0]

        return joined(now.each(run)), None

    _replace(core, "forward", division, forward)
    _replace(core, "attend", division, attend)


def _cache(past: dict[str, Tensor]) -> LayerState | None:
    """A cache of k and v [N, S, Hkv, D]; None where they are of no tokens."""
    if not past or not past["k"].shape[1]:
        return None
    k = past["k"]
    return past | {"count": torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)}


def _standing(mixer: Mixer, division: Underway, state: Callable[[Tensor], LayerState]) -> None:
    """A mixer that takes its place from its state is given one that says where this process's tokens begin."""

    def forward(now: Passage, original: Callable[..., Step], x: Tensor, *_: Any) -> Step:
        place = now.seen(x.shape[0] if now.cu_seqlens is None else len(now.cu_seqlens) - 1)
        return original(x, None if now.first else state(place), now.cu_seqlens, False)

    _replace(mixer, "forward", division, forward)


def _store(store: ChunkStore, division: Underway, what: str) -> None:
    """The chunks so far, handed on as soon as this process's own are among them; then all read at once."""
    what = f"the chunks of {what}"

    def forward(now: Passage, original: Callable[..., Any], *args: Any) -> Any:
        streams, ages = args[:5], args[8] if len(args) > 8 else None

        def run(piece: Piece) -> Tensor:
            # Of a store with a bank, too: a call that is given no state and asked for none reads all of its tokens.
            q, k, v, choosing, keys = (x[:, piece.tokens] for x in streams)
            return ChunkStore.forward(store, q, k, v, choosing, keys, None, piece.cu_seqlens, False, ages)[0]

        return joined(now.each(run)), None

    def look(
        now: Passage, original: Callable[..., Any], k: Tensor, v: Tensor, choosing: Tensor, keys: Tensor, *rest: Any
    ) -> Any:
        def step(piece: Piece, state: LayerState | None, keep: bool) -> Any:
            found, after = original(k, v, choosing, keys, state, piece.cu_seqlens, keep, rest[3])
            if after is not None and "summary" not in after:  # it is left to a bank, which there is none of here
                after["summary"] = found.summary[:, : found.k.shape[1] // store.chunk_size]
            return found, after

        return now.through(now.piece, what, step), None

    _replace(store, "forward", division, forward)
    _replace(store, "look", division, look)


# -- memories ----------------------------------------------------------------------------------------------------------


def _past(now: Passage, x: Tensor, width: int, what: str, state: Any) -> Tensor:
    """The ``width`` − 1 inputs [N, width − 1, C] before x [B, T, C], of N rows or documents; zeros before the first
    token of all, unless a state says what was there."""
    size = width - 1
    if now.documents is None:
        held = None if state is None else {"x": state["x"]}
        past: Tensor = now.before({"x": x}, size, what, held)["x"]
        return F.pad(past, (0, 0, size - past.shape[1], 0))
    assert now.cu_seqlens is not None
    start = x.new_zeros(len(now.cu_seqlens) - 1, size, x.shape[2]) if state is None else state["x"].to(x.dtype)
    first = torch.cat([start[:1], now.before({"x": x}, size, what)["x"]], 1)
    return torch.cat([first[:, first.shape[1] - size :], start[1:]])


def _memory(layer: MemoryLayer, division: Underway, what: str) -> None:
    """The convolution's last inputs, and the memory's state."""
    of_inputs, of_memory = f"the inputs of {what}", f"the memory of {what}"

    def convolve(now: Passage, original: Callable[..., Step], x: Tensor, state: Any, *_: Any) -> Step:
        if layer.conv is None:
            return original(x, None, None, False)
        held = {"x": _past(now, x, layer.conv.shape[1], of_inputs, state)}
        return original(x, held, now.cu_seqlens, False)

    def remember(
        now: Passage, original: Callable[..., Step], x: Tensor, tokens: tuple[Tensor, ...], state: Any, *_: Any
    ) -> Step:
        def run(piece: Piece, held: LayerState | None, keep: bool) -> Step:
            own = tuple(y[:, piece.tokens] for y in tokens)
            return original(x[:, piece.tokens], own, held, piece.cu_seqlens, keep)

        return joined(now.hand_on(of_memory, run, state)), None

    _replace(layer, "_convolve", division, convolve)
    _replace(layer, "_remember", division, remember)


def _sharded(layer: ShardedMemory, division: Underway, what: str) -> None:
    """As of any memory layer; and the local memory's state, with the place in its shard."""
    _memory(layer, division, what)
    of_local = f"the local memory of {what}"

    def local(now: Passage, original: Callable[..., Any], *args: Any) -> tuple[Tensor, LayerState]:
        def run(piece: Piece, held: LayerState | None, keep: bool) -> Any:
            own = (y[:, piece.tokens] for y in args[:4])  # x, q, k, v
            return original(*own, held or {}, piece.cu_seqlens, keep)

        return joined(now.hand_on(of_local, run)), {}

    _replace(layer, "_local", division, local)


def _mixture(mixer: MixtureOfMemories, division: Underway, what: str) -> None:
    """Of each memory: its convolutions' last inputs, wherever in the sequence it took them from, and its state, or of a
    linear one its summary."""
    of_inputs, of_memory = f"the inputs of {what}", f"the memories of {what}"

    def convolve(
        now: Passage, original: Callable[..., Step], x: Tensor, channels: slice, gather: bool, r: Any, s: Any, *_: Any
    ) -> Step:
        if mixer.conv is None:
            return original(x, channels, gather, r, s, None, False)
        if mixer.memories == 1:  # it takes every token: they lie in order, in slots and in tokens alike
            rows = s.rows if now.documents is None else 1
            past = _past(now, x.reshape(rows, -1, x.shape[-1]), mixer.conv.shape[1], of_inputs, None)
            return original(x, channels, gather, r, s, {"x": past[:, None]}, False)
        if gather and now.documents is not None:
            x, gather = dispatch(x, r), False

        def run(piece: Piece, held: LayerState | None, keep: bool) -> Step:
            own, borders = _slots(mixer, piece, s)
            return original(x if gather else x[:, own], channels, gather, r, borders, held, keep)

        return joined(now.hand_on(of_inputs, run)), None

    def rule(now: Passage, original: Callable[..., Step], *args: Any) -> Step:
        *tokens, s, state, _ = args

        def run(piece: Piece, held: LayerState | None, keep: bool) -> Step:
            own, borders = _slots(mixer, piece, s)
            return original(*(y[:, own] for y in tokens), borders, held, keep)

        if mixer.spec is not None:
            return joined(now.hand_on(of_memory, run, state)), None
        (piece, *_) = now.pieces
        if piece.takes and piece.gives:
            return _merged(now, mixer, original, tokens, s, of_memory), None
        return joined(now.hand_on(of_memory, run, waits=False)), None

    _replace(mixer, "_convolve", division, convolve)
    _replace(mixer, "_rule", division, rule)


def _slots(mixer: MixtureOfMemories, piece: Piece, s: Any) -> tuple[slice, Any]:
    """Which slots the tokens of a piece have, and their borders. They lie side by side, for slots are sorted by
    document, and every token has as many."""
    if piece.tokens == slice(None):
        return piece.tokens, s
    choices = mixer.mixer.top_k + mixer.mixer.shared
    begin, end = piece.tokens.start * choices, piece.tokens.stop * choices
    cuts = s.cu_seqlens[piece.rows.start * s.memories : piece.rows.stop * s.memories + 1] - begin
    return slice(begin, end), replace(s, rows=piece.rows.stop - piece.rows.start, cu_seqlens=cuts)


def _route(
    mixer: MixtureOfMemories, now: Passage, original: Callable[..., Routing], x: Tensor, cu_seqlens: Tensor | None
) -> Routing:
    """The router's losses are means over all tokens, of which this process has its share. ``balance``, M Σ f_m p̄_m, is
    a product of two: the sums of p, weighted, are left in ``now.routed`` with this process's counts, until those of all
    are known."""
    with collected() as found:
        r = original(x, cu_seqlens)
    if found.pop("balance", None) is not None:  # that of this process's tokens alone
        routed, tokens = r.probability.shape[-1], x.shape[0] * now.length
        choices = r.choices - (r.memories - routed)
        count = r.cu_seqlens.diff().view(-1, r.memories)[:, :routed].sum(0)
        weight = mixer.mixer.balance_weight * routed / (choices * tokens) / tokens
        before = now.routed.get(mixer, (0, 0))  # of the other pieces of this part
        now.routed[mixer] = (before[0] + r.probability.sum((0, 1)) * weight, before[1] + count)
    for name, values in found.items():
        for value in values:
            add_loss(name, value * (x.shape[1] / now.length))
    return r


def _merged(
    now: Passage,
    mixer: MixtureOfMemories,
    rule: Callable[..., Step],
    tokens: list[Tensor],
    s: Any,
    what: str,
) -> Tensor:
    """Reads of linear memories in a part that is all of one row or document, neither beginning nor ending in it. Their
    state M is known late, when M' = A M + B of these tokens has long been made.

    With a decay alone A is a number per head; of the delta rule it is a matrix [D, D], what the rule makes of a state I
    when nothing is written, and comes from the same call as B: values [v ‖ 0] into a state [0 ‖ I].
    """
    q, k, v, z = tokens
    factor, added = _summary(mixer, rule, q, k, v, z, s)
    held = now.receive(now.link.rank - 1, what)
    now.send(now.link.rank + 1, {"memory": factor(held["memory"]) + added}, what)
    return rule(*tokens, s, held, False)[0]


def _summary(
    mixer: MixtureOfMemories, rule: Callable[..., Step], q: Tensor, k: Tensor, v: Tensor, z: Tensor, s: Any
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """M ↦ A M, and B [N, M', H, D, D_v], of the slots of each row and memory."""
    if mixer.mixer.rule == "linear_attention":
        _, after = rule(q, k, v, z, s, None, True)
        assert after is not None
        decay = mixer.gates.activate(z)["log_decay"]
        # Sums to every slot in float64, for a sequence's own is a difference of two: [slots + 1, H].
        upto = F.pad(decay[0].double().cumsum(0), (0, 0, 1, 0))
        total = upto[s.cu_seqlens.long()].diff(dim=0).exp().unflatten(0, (s.rows, s.memories))
        factor = total.to(after["memory"].dtype)[..., None, None]
        return (lambda state: factor * state), after["memory"]
    width, kind = k.shape[-1], torch.float64 if q.dtype == torch.float64 else torch.float32
    eye = torch.eye(width, dtype=kind, device=q.device)
    start = F.pad(eye, (v.shape[-1], 0)).expand(s.rows, s.memories, k.shape[2], -1, -1)
    _, after = rule(q, k, F.pad(v, (0, width)), z, s, {"memory": start.contiguous()}, True)
    assert after is not None
    added, matrix = after["memory"].split([v.shape[-1], width], -1)
    return (lambda state: matrix @ state), added


# -- by kind -----------------------------------------------------------------------------------------------------------


def _beside(mixer: Any, division: Underway, what: str) -> None:
    _attention(mixer.attention, division, what)
    _memory(mixer.memory, division, what)


def _below(mixer: MemoryAsLayer, division: Underway, what: str) -> None:
    _memory(mixer.memory, division, what)
    _attention(mixer.attention.core, division, what)


def _large(mixer: LargeChunkMemory, division: Underway, what: str) -> None:
    _memory(mixer, division, what)
    _attention(mixer.attention, division, what)


def _hierarchical(mixer: HierarchicalMemory, division: Underway, what: str) -> None:
    _attention(mixer.local, division, what)
    _store(mixer.store, division, what)
    _standing(mixer, division, lambda place: {"attention": None, "memory": {"position": place}})


def _union(mixer: BlockUnionAttention, division: Underway, what: str) -> None:
    _store(mixer.store, division, what)
    _standing(mixer, division, lambda place: {"position": place})


KINDS: dict[type[Mixer], Callable[..., None]] = {
    Attention: lambda mixer, division, what: _attention(mixer.core, division, what),
    MemoryLayer: _memory,
    MemoryAsGate: _beside,
    MemoryAsLayer: _below,
    LargeChunkMemory: _large,
    ShardedMemory: _sharded,
    MixtureOfMemories: _mixture,
    HierarchicalMemory: _hierarchical,
    BlockUnionAttention: _union,
}
"""By a mixer's class; of one that is not here, as MAC, the whole state is handed on."""
