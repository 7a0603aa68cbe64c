"""The memory that a training step takes, counted without taking it: on the meta device, whatever the model's size.

What a forward keeps for its backward is what autograd packs, seen by ``saved_tensors_hooks``: a tensor counts once,
however often it is kept and whatever views of it are. The operations' own choice is in it, for a GPU's Triton kernels
as for plain torch, because every operation is a registered operator that tells its shapes. Not in it is what an
operation takes inside of itself and gives back, but for the loss's gradients of logits, whose number is known.
"""

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels.backend import as_on_a_gpu
from ..models.config import ModelConfig
from ..models.lm import MemoryLM, make
from ..models.meta_autocast import MetaAutocast
from . import optim, sltrain
from .config import TrainConfig
from .parallel import checkpoint_blocks
from .start import freeze_backbone

MEMORIES = ("palimpsest::neural_memory", "palimpsest::linear_memory")
"""Operators that return, after their reads, states: the last ones, and those kept for the backward."""


@dataclass(frozen=True)
class Activations:
    """What one micro batch keeps, in bytes.

    ``parts``: kept by the end of the forward, by part of the model (embed, norms, mixers, mlps, loss; ``states``: what
    memories keep of their states); with blocks run ``again`` what is left of these, and ``inputs``, those of such
    blocks. ``blocks``: what each block keeps where none is run again. ``working``: the most that forward and backward
    hold at a time beyond the parts, the parameters and their gradients. ``again``: the numbers of those blocks.
    """

    parts: dict[str, int]
    blocks: tuple[int, ...]
    working: int
    again: tuple[int, ...]

    @property
    def kept(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """The most that a forward and backward hold at a time, parameters and gradients apart."""
        return self.kept + self.working


def activations(
    config: ModelConfig,
    settings: TrainConfig,
    rows: int,
    *,
    gpu: bool,
    again: Collection[int] = (),
    seq_len: int | None = None,
) -> Activations:
    """What ``rows`` sequences of ``train.seq_len`` tokens keep.

    Args:
        again: the numbers of the blocks that are run again in the backward pass.
        gpu: as a GPU's kernels would, else as this machine's processor does in plain torch. Not for models whose
            chunks end where a token surprises, which are counted on real tensors, a row of them, times ``rows``.
    """
    length = seq_len or settings.seq_len
    cut = any(getattr(mixer, "cut", None) is not None for mixer in config.mixer)
    scale, rows = (rows, 1) if cut else (1, rows)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if gpu and not cut:
            stack.enter_context(as_on_a_gpu())
        device = torch.device("cpu" if cut else "meta")
        with device:
            model = make(config)
            tokens = torch.zeros(rows, length, dtype=torch.int64)
        _as_trained(model, settings)
        whole = _kept(model, tokens, settings.precision)
        parts = whole.parts
        if again:
            products = partial(_products, device, settings.precision)  # torch's own autocast knows no meta tensors
            checkpoint_blocks(model.blocks, again, context_fn=lambda: (nullcontext(), products()))
            parts = _kept(model, tokens, settings.precision, again).parts
        peak = _peak(model, tokens, settings.precision)
    parts = {name: size * scale for name, size in parts.items() if size}
    working = max(0, peak * scale - sum(parts.values()))
    return Activations(parts, tuple(size * scale for size in whole.blocks), working, tuple(sorted(again)))


def _as_trained(model: MemoryLM, settings: TrainConfig) -> None:
    """What the config makes of a model before it is spread over processes, as ``launch.model`` does."""
    if settings.freeze_backbone:
        freeze_backbone(model)
    if settings.sltrain is not None:
        sltrain.apply(model, optim.hidden_matrices(model), settings.sltrain, 0)


@contextmanager
def _products(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast as in training."""
    if precision == "fp32":
        yield
        return
    with MetaAutocast(torch.bfloat16) if device.type == "meta" else torch.autocast(device.type, torch.bfloat16):
        yield


class _Keeper:
    """Which storages a forward keeps, and for which part."""

    def __init__(self, model: nn.Module) -> None:
        self.part, self.block = ["loss"], -1
        self.sizes: dict[int, tuple[str, int, int]] = {}  # of each storage: part, block, bytes
        self.held: list[Tensor] = []  # so that no storage takes the place of another
        self.states: dict[int, Tensor] = {}
        self.given = {_key(p) for p in model.parameters()}

    def pack(self, x: Tensor) -> Tensor:
        """What autograd calls with each tensor that it keeps."""
        key = _key(x)
        if key not in self.given and key not in self.sizes:
            part = "states" if key in self.states else self.part[-1]
            self.sizes[key] = part, self.block, x.untyped_storage().nbytes()
            self.held.append(x)
        return x

    def inside(self, module: nn.Module, part: str, block: int | None = None) -> Iterator[Any]:
        """Hooks that name what is kept while a module is at work."""

        def enter(*_: Any) -> None:
            self.part.append(part)
            self.block = self.block if block is None else block

        def leave(*_: Any) -> None:
            self.part.pop()
            self.block = self.block if block is None else -1

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _States(TorchDispatchMode):
    """Notes the states that memories return."""

    def __init__(self, keeper: _Keeper) -> None:
        super().__init__()
        self.keeper = keeper

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in MEMORIES:
            self.keeper.states |= {_key(x): x for x in tree_leaves(list(out)[1:]) if isinstance(x, Tensor)}
        return out


def _kept(model: MemoryLM, tokens: Tensor, precision: str, again: Collection[int] = ()) -> Activations:
    """One forward; the inputs of the blocks of ``again`` are kept too, which checkpointing holds by itself."""
    keeper = _Keeper(model)
    handles: list[Any] = [*keeper.inside(model.embed, "embed"), *keeper.inside(model.norm, "norms")]
    if model.hmt is not None:
        handles += keeper.inside(model.hmt, "hmt")
    for i, block in enumerate(model.blocks):
        handles += keeper.inside(block, "blocks", i)
        for name, part in block.named_children():
            handles += keeper.inside(part, "norms" if name.startswith("norm") else f"{name}s")
        if i in again:
            handles.append(block.register_forward_pre_hook(_noting(keeper)))
    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(keeper.pack, lambda x: x)
        with hooks, _products(tokens.device, precision), _States(keeper) if tokens.is_meta else nullcontext():
            model(tokens, targets=tokens)
    finally:
        for handle in handles:
            handle.remove()
    parts: dict[str, int] = {}
    blocks = [0] * len(model.blocks)
    for kind, index, size in keeper.sizes.values():
        parts[kind] = parts.get(kind, 0) + size
        if index >= 0:
            blocks[index] += size
    return Activations(parts, tuple(blocks), 0, tuple(again))


def _noting(keeper: _Keeper) -> Callable[..., None]:
    """A hook that counts what a block is called with."""

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        keeper.part.append("inputs")
        for x in tree_leaves(args):
            if isinstance(x, Tensor):
                keeper.pack(x)
        keeper.part.pop()

    return note


class _Live(TorchDispatchMode):
    """How many bytes are held at a time, of all that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _peak(model: MemoryLM, tokens: Tensor, precision: str) -> int:
    """The most that a forward and backward hold at a time beside parameters and gradients, which are there before."""
    live = _Live()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p)
    live.known = {_key(x) for p in model.parameters() for x in (p, p.grad) if x is not None} | {_key(tokens)}
    with live:
        with _products(tokens.device, precision):
            output = model(tokens, targets=tokens)
        assert output.loss_sum is not None
        (output.loss_sum + sum(output.aux.values())).backward()
    for p in model.parameters():
        p.grad = None
    return live.peak


# -- parameters, gradients, optimizer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    """Bytes of one process that are there whatever the batch: of its share of the parameters, of their gradients, of
    the optimizer's state after a step (``rule``: how that is counted); and of whole tensors: all trainable ones, those
    outside of blocks, the largest block's."""

    parameters: int
    gradients: int
    optimizer: int
    whole_gradients: int
    root: int
    block: int
    rule: str


def fixed(model: MemoryLM, settings: TrainConfig, shard: int) -> Fixed:
    """Of a model on the meta device, its parameters shared by ``shard`` processes, each in rows of its first dimension.

    The optimizer is the run's own, stepped once on shapes.
    """
    _as_trained(model, settings)
    in_blocks = [_bytes(list(block.parameters())) for block in model.blocks]
    root = _bytes(list(model.parameters())) - sum(in_blocks)
    whole = _bytes([p for p in model.parameters() if p.requires_grad])
    with FakeTensorMode(allow_non_fake_inputs=True):
        shares: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if id(p) not in shares:
                    shape = (ceil(p.shape[0] / shard), *p.shape[1:]) if p.dim() else ()
                    empty = torch.empty(shape, dtype=p.dtype, device="cpu")
                    shares[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
                module.register_parameter(name, shares[id(p)])
        optimizer = optim.make(model, settings)
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.empty_like(p)
        rule = f"{settings.optimizer}'s state after a step, counted on shapes"
        try:
            optimizer.step()
            kept = _bytes(
                [x for x in tree_leaves([dict(x) for x in optimizer.state.values()]) if isinstance(x, Tensor)]
            )
        except DataDependentOutputException:  # it looks at gradients, which shapes do not have
            kept = 2 * _bytes(trained)
            rule = f"put down as 2 x gradients: {settings.optimizer} looks at values, which shapes do not have"
        parameters, block = list(model.parameters()), max(in_blocks, default=0)
        return Fixed(_bytes(parameters), _bytes(trained), kept, whole, root, block, rule)


def _bytes(tensors: list[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
