"""MemoryLM: embed → blocks → norm → head. One forward for training, prefill and decoding."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..kernels import linear_cross_entropy
from .block import Block
from .config import ConfigError, ModelConfig, apply_overrides, load_config, validate
from .hmt import SegmentMemory
from .layers import Embedding, Linear, RMSNorm, autocast_dtype
from .losses import collected
from .mixers import LayerState, Mixer
from .state import State

IGNORE = -100
SCHEMA = 1
MODEL_TYPE = "palimpsest"  # by which transformers knows a folder, see hub.py


@dataclass
class Output:
    """What a forward gives.

    Without targets ``logits`` [B, T, V]. With targets ``loss`` (mean over the ``valid`` targets, or [B, T] per token),
    ``loss_sum`` (its sum, to be divided by the valid targets of all micro-batches and ranks) and ``valid`` (their
    number, an int64 scalar). ``state`` when it was asked for. ``aux``: in training, further losses by name, weighted as
    they are to be added to the mean loss.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    valid: Tensor | None = None
    state: State | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)


class MemoryLM(nn.Module):
    """A language model from its configuration, with fresh weights.

    It can be made on the meta device, placed with ``to_empty`` and then drawn with :meth:`reset_parameters`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim, config.init_std)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size, config.init_std)
        self.hmt = None if config.hmt is None else SegmentMemory(config, config.hmt)
        self.fingerprint = fingerprint(config)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, in place: each part draws what it owns itself."""
        for module in self.modules():
            if module is not self and callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
        return_state: bool | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Output:
        """Read tokens.

        Args:
            tokens: int64 [B, T], values below vocab_size.
            state: where an earlier call ended; one row per sequence.
            cu_seqlens: int32 [N + 1], borders of the documents packed into one row (B = 1).
            targets: int64 [B, T], the token that follows each; −100 is left out of the loss.
            return_state: None: only without targets.
            reduction: "mean": ``loss`` is a mean in nats, with the configured z-loss; "none": [B, T] float32, without.

        Raises:
            ValueError: for a wrong shape, dtype or token, or a state of another model or number of sequences.
        """
        self._check(tokens, state, cu_seqlens, targets)
        keep = targets is None if return_state is None else return_state
        with collected() as found:
            x, after = self._hidden(tokens, state, cu_seqlens, keep)
        passes = 1 if self.hmt is None else self.hmt.passes
        aux = {name: torch.stack(values).sum() / passes for name, values in found.items()}
        if targets is None:
            return Output(logits=self._logits(x), state=after)
        targets = self.counted(targets, state, cu_seqlens)
        valid = (targets != IGNORE).sum()
        loss = self._loss(x, targets, "none" if reduction == "none" else "sum")
        if reduction == "none":
            return Output(loss=loss, loss_sum=loss.sum(), valid=valid, state=after)
        return Output(loss=loss / valid.clamp(min=1), loss_sum=loss, valid=valid, state=after, aux=aux)

    def counted(self, targets: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """``targets`` of tokens that follow ``state``, with −100 for those that this model must not be judged by: all
        that it is told of before it says them (``hmt.recall: half``)."""
        if self.hmt is None or self.hmt.recall_by != "half":
            return targets
        position = None if state is None else state.position
        return self.hmt.counted(targets, position, cu_seqlens)

    def through(
        self, x: Tensor, layers: list[LayerState] | None, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, list[LayerState]]:
        """Embeddings x [B, T, dim] through all blocks and the last norm, and the blocks' states (empty unless kept)."""
        after: list[LayerState] = []
        for i, block in enumerate(self.blocks):
            x, layer = block(x, None if layers is None else layers[i], cu_seqlens, keep)
            after.append(layer)
        return self.norm(x), after if keep else []

    def fresh(self, batch: int) -> list[LayerState]:
        """The states of the blocks before the first token."""
        weight = self.embed.weight
        return [mixer.init_state(batch, weight.device, weight.dtype) for mixer in self._mixers()]

    def _hidden(
        self, tokens: Tensor, state: State | None, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, State | None]:
        held = None if state is None else state.layers
        if self.hmt is None:
            x, layers = self.through(self.embed(tokens), held, cu_seqlens, keep)
        else:
            position = None if state is None else state.position
            x, layers = self.hmt(self, tokens, held, position, cu_seqlens, keep)
        if not keep:
            return x, None
        rows = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        seen = tokens.new_full((rows,), tokens.shape[1]) if cu_seqlens is None else cu_seqlens.diff().long()
        return x, State(layers, seen if state is None else state.position + seen, self.fingerprint)

    def _mixers(self) -> list[Mixer]:
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    def _head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def _logits(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self._head_weight())
        cap = self.config.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _loss(self, x: Tensor, targets: Tensor, reduction: Literal["sum", "none"]) -> Tensor:
        weight = self._head_weight()
        kind = autocast_dtype(x.device)
        if kind is not None:  # autocast does not see into a registered operation
            x, weight = x.to(kind), weight.to(kind)
        z_loss = self.config.z_loss if reduction == "sum" else 0.0
        return linear_cross_entropy(
            x, weight, targets, ignore_index=IGNORE, reduction=reduction, z_loss=z_loss, softcap=self.config.softcap
        )

    def per_token_loss(
        self, tokens: Tensor, targets: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """−log p of each target in nats, float32 [B, T], and the state after the tokens.

        0 where the target is −100; NaN where the model must not be judged by it, see :meth:`counted`.
        """
        output = self(tokens, state, cu_seqlens, targets, return_state=True, reduction="none")
        counted = self.counted(targets, state, cu_seqlens)
        loss = output.loss if counted is targets else output.loss.masked_fill(counted != targets, torch.nan)
        return loss, output.state

    def init_state(self, batch: int) -> State:
        """The state of ``batch`` sequences before their first token."""
        layers = self.fresh(batch) if self.hmt is None else self.hmt.init_state(self, batch)
        return State(layers, torch.zeros(batch, dtype=torch.int64, device=self.embed.weight.device), self.fingerprint)

    def _check(self, tokens: Tensor, state: State | None, cu_seqlens: Tensor | None, targets: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.numel():
            was = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens was {was}; it must be torch.int64 [B, T] with at least one token")
        if targets is not None and (targets.shape != tokens.shape or targets.dtype != torch.int64):
            was = f"{targets.dtype} {tuple(targets.shape)}"
            raise ValueError(f"targets was {was}; it must be torch.int64 {tuple(tokens.shape)}, like tokens")
        if cu_seqlens is not None and (tokens.shape[0] != 1 or cu_seqlens.dtype != torch.int32):
            was = f"{cu_seqlens.dtype} with B = {tokens.shape[0]}"
            raise ValueError(f"cu_seqlens was {was}; it must be torch.int32 with B = 1")
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"tokens ran from {low} to {high}; it must lie in [0, {self.config.vocab_size})")
        if state is not None:
            rows = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            if state.fingerprint != self.fingerprint:
                raise ValueError(
                    f"state was made by a model of configuration {state.fingerprint or 'unknown'}; "
                    f"it must come from one of configuration {self.fingerprint}, like this model"
                )
            if state.rows != rows:
                raise ValueError(f"state was of {state.rows} sequences; it must have {rows}, one for each of tokens")

    def _ask(self, tokens: Tensor, method: str) -> dict[str, Tensor]:
        """What a method of each mixer says of its own input on these tokens, by ``layer.{i}/{name}``, and of the memory
        over segments, by ``hmt/{name}``. What is said of each segment is put together.

        The mixers are asked from inside a forward, where sharded parameters are gathered.
        """
        found: dict[str, list[Tensor]] = {}
        handles = []
        for i, mixer in enumerate(self._mixers()):

            def ask(module: nn.Module, args: tuple[Any, ...], layer: int = i) -> None:
                part = slice(None) if self.hmt is None else self.hmt.reading
                if part is None:
                    return
                for name, value in getattr(module, method)(args[0]).items():
                    value = value[:, part] if value.dim() > 1 else value
                    found.setdefault(f"layer.{layer}/{name}", []).append(value)

            handles.append(mixer.register_forward_pre_hook(ask))
        recalled: list[Tensor] = []
        if self.hmt is not None and self.hmt.recall is not None:
            handles.append(self.hmt.recall.register_forward_hook(lambda *call: recalled.append(call[-1][1])))
        try:
            self(tokens, return_state=False, targets=torch.zeros_like(tokens))
        finally:
            for handle in handles:
                handle.remove()
        told = {name: torch.cat(x, 1) if x[0].dim() > 1 else torch.stack(x).mean(0) for name, x in found.items()}
        if recalled and self.hmt is not None:
            told |= {f"hmt/{name}": x for name, x in getattr(self.hmt, method)(recalled, tokens).items()}
        return told

    @torch.no_grad()
    def diagnostics(self, tokens: Tensor) -> dict[str, float]:
        """Numbers of every memory on these tokens, by ``layer.{i}/{name}``; see ``diagnose`` of each mixer."""
        return {name: float(value) for name, value in self._ask(tokens, "diagnose").items()}

    @torch.no_grad()
    def observe(self, tokens: Tensor) -> dict[str, Tensor]:
        """What happens in every memory at each of tokens [B, T]: numbers [B, T] or shares [B, T, M], by
        ``layer.{i}/{name}``; see ``observe`` of each mixer."""
        return self._ask(tokens, "observe")

    def active_parameters(self) -> int:
        """Parameters that one token meets: all but those of memories that it is not routed to."""
        idle = sum(mixer.idle_parameters() for mixer in self._mixers())
        return sum(p.numel() for p in self.parameters()) - idle

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one token's forward and backward at a context of ``seq_len``, as registered."""
        return _flops(self.config.model_dump_json(), seq_len) / seq_len

    def save(self, folder: str | Path, run_config: dict[str, Any] | None = None) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, each whole or not at all."""
        from safetensors.torch import save_file  # like all that only files need: where they are

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        about = {"schema": SCHEMA, "model_type": MODEL_TYPE, "model": self.config.model_dump(mode="json")}
        about |= {"run": run_config}
        save_file(weights, folder / ".model.safetensors", metadata={"format": "pt"})
        (folder / ".config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for name in ("model.safetensors", "config.json"):
            with open(folder / f".{name}", "rb") as written:
                os.fsync(written.fileno())  # before the name: a lost machine must not leave an empty file under it
            os.replace(folder / f".{name}", folder / name)


@lru_cache(maxsize=32)
def _flops(config: str, seq_len: int) -> int:
    told = ModelConfig.model_validate_json(config)
    # Where a chunk ends that is cut by surprise, values tell: real ones, drawn without a change to anyone else's draws.
    cut = any(getattr(mixer, "cut", None) is not None for mixer in told.mixer)
    # Hugging Face models look at values, where there are any: not those of fake tensors.
    fake = nullcontext() if told.huggingface is None else FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.random.fork_rng(devices=[]):
        with torch.device("cpu" if cut else "meta"):
            model = make(told)
            tokens = torch.zeros(1, seq_len, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            loss = model(tokens, targets=tokens).loss
            loss.backward()
    return counter.get_total_flops()


def fingerprint(config: ModelConfig) -> str:
    """Names what the configuration computes: 16 hex digits, equal for models that can take each other's state."""
    content = config.model_dump(mode="json", exclude={"init_std": True, "z_loss": True, "hmt": {"bptt"}})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def build(config: str | Path | dict[str, Any] | ModelConfig, **overrides: Any) -> MemoryLM:
    """A model with fresh weights.

    Args:
        config: a file (a path, or a name inside ``configs/``), a mapping with a ``model`` section, or a ModelConfig.
        overrides: values by dotted key, ``**{"model.dim": 64}``.

    Raises:
        ConfigError: for a configuration that is not valid; FileNotFoundError: for a file that is not there.
    """
    if isinstance(config, ModelConfig):
        content: dict[str, Any] = {"model": config.model_dump(exclude_unset=True)}
    else:
        content = config if isinstance(config, dict) else load_config(config)
    for key in overrides:
        if key.split(".")[0] != "model":
            raise ConfigError(f"override was {key!r}; it must be a key of the model, like 'model.dim'")
    content = apply_overrides(content, overrides)
    if "model" not in content:
        raise ConfigError(f"model is missing among {sorted(content)}; it must be given")
    return make(validate(ModelConfig, content["model"], "model"))


def make(config: ModelConfig) -> MemoryLM:
    """The model of a configuration, with fresh weights."""
    if config.huggingface is None:
        return MemoryLM(config)
    from .hf import HuggingFaceLM

    return HuggingFaceLM(config)


def load(folder: str | Path, device: torch.device | str = "cpu") -> MemoryLM:
    """The trained model of a run folder (``config.json`` and ``model.safetensors``).

    Raises:
        FileNotFoundError: when one of the two is not there.
        ValueError: when they are damaged or do not fit each other.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} not found: {folder} is not the folder of a finished run")
    config = _config_of(folder / "config.json")
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
        if config.layers > len(sizes):  # before as many are made
            raise ValueError(f"it holds {len(sizes)} tensors, fewer than model.layers = {config.layers}")
        with torch.device("meta" if config.huggingface is None else device):  # there are buffers that no file holds
            model = make(config)
        needed = sum(value.numel() for value in model.state_dict().values())
        if needed > sum(sizes):
            raise ValueError(f"it holds {sum(sizes)} numbers, and the model has {needed}")
        if config.huggingface is None:  # and not the file's own pages: their alignment changes products' rounding
            model = model.to_empty(device=device)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} does not fit config.json: {error}") from None
    return model


def _config_of(path: Path) -> ModelConfig:
    """The model's configuration in a config.json; ValueError for a file that holds none."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON: {type(error).__name__}: {error}") from None
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        was = about.get("schema") if isinstance(about, dict) else type(about).__name__
        raise ValueError(f"{path} was of schema {was}; it must be {SCHEMA}")
    if not isinstance(about.get("model"), dict):
        raise ValueError(f"{path} has no section model; it must say which model the weights are of")
    return validate(ModelConfig, about["model"], "model")


def stream(model: MemoryLM, tokens: Tensor, chunk: int, state: State | None = None) -> Iterator[tuple[Tensor, State]]:
    """Losses along a sequence of any length, in constant memory: [B, ≤ chunk] nats and the state, piece by piece.

    Token t is scored from all before it, so a sequence [B, T] gives T − 1 losses. Gradients are not recorded.
    """
    if chunk < 1:
        raise ValueError(f"chunk was {chunk}; it must be at least 1")
    for start in range(0, tokens.shape[1] - 1, chunk):
        piece = tokens[:, start : start + chunk + 1]
        with torch.no_grad():
            loss, state = model.per_token_loss(piece[:, :-1], piece[:, 1:], state)
        yield loss, state
