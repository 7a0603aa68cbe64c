"""What a configuration amounts to, without training it: ``python -m palimpsest.models.describe CONFIG [key=value …]``.

Parameters, the bytes of one sequence's state, the floating-point operations of a token, which kernels a GPU runs, and a
tree of the modules with their shapes. Nothing is computed and no memory taken for it: tensors are on the meta device,
whatever the model's size.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels.backend import log_once
from ..kernels.op import Choice, watching
from .config import ConfigError, ModelConfig, apply_overrides, load_config, parse_override, validate
from .lm import MemoryLM, make
from .state import State

SEQ_LEN = 512  # where a file does not say train.seq_len: the default there
Shape = tuple[str, tuple[int, ...], str]


@dataclass(frozen=True)
class Description:
    """A model in numbers.

    ``parameters``: trainable ones, a shared one counted once; ``active_parameters``: those that one token meets.
    ``state_bytes``: all tensors of one sequence's state after ``seq_len`` tokens. ``flops_per_token``: of a forward and
    backward over ``seq_len`` tokens, by token; ``head_flops_per_token``, the output head's part: 6 dim V.
    ``kernels``: each operation of a forward, its calls, and whether a GPU runs Triton kernels or plain torch, and why.
    ``tree``: the modules, a line each, with the shapes of their parameters; then the state's tensors.
    """

    parameters: int
    active_parameters: int
    state_bytes: int
    flops_per_token: float
    head_flops_per_token: float
    seq_len: int
    kernels: tuple[str, ...]
    tree: str

    def text(self) -> str:
        """All of it, for a terminal."""
        lines = [
            ("parameters", f"{self.parameters:,}"),
            ("of these, met by a token", f"{self.active_parameters:,}"),
            (f"state bytes, one sequence of {self.seq_len:,} tokens", f"{self.state_bytes:,}"),
            (f"FLOPs per token, forward and backward at {self.seq_len:,}", f"{self.flops_per_token:,.0f}"),
            ("of these, in the output head", f"{self.head_flops_per_token:,.0f}"),
        ]
        wide, right = (max(len(pair[i]) for pair in lines) for i in (0, 1))
        numbers = [f"{name.ljust(wide)}  {value.rjust(right)}" for name, value in lines]
        return "\n".join([*numbers, "", "on a GPU", *(f"  {line}" for line in self.kernels), "", self.tree])


def read(config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> tuple[ModelConfig, int]:
    """The model of a configuration, and the length it is trained at (``train.seq_len``).

    Args:
        config: a file (a path, or a name inside ``configs/``), a run folder, or a mapping with a ``model`` section.
        overrides: values by dotted key, of the model or ``train.seq_len``.

    Raises:
        ConfigError: for a configuration that is not valid; FileNotFoundError: for a file that is not there.
    """
    if isinstance(config, Mapping):
        content: Mapping[str, Any] = config
    else:
        folder = Path(config)
        content = load_config(folder / "config.yaml" if folder.is_dir() else config)
    for key in overrides or {}:
        if key.split(".")[0] != "model" and key != "train.seq_len":
            raise ConfigError(f"override was {key!r}; it must be a key of the model, like model.dim, or train.seq_len")
    content = apply_overrides(content, overrides or {})
    if "model" not in content:
        raise ConfigError(f"model is missing among {sorted(content)}; it must be given")
    seq_len = (content.get("train") or {}).get("seq_len", SEQ_LEN)
    if not isinstance(seq_len, int) or isinstance(seq_len, bool) or seq_len < 1:
        raise ConfigError(f"train.seq_len was {seq_len!r}; it must be an integer of at least 1")
    return validate(ModelConfig, content["model"], "model"), seq_len


def describe(config: str | Path | Mapping[str, Any], **overrides: Any) -> Description:
    """A model in numbers; see :func:`read` for what ``config`` may be and what is raised."""
    told, seq_len = read(config, overrides)
    model = outline(told)
    with watching() as calls:
        state = state_of(model, seq_len)
    return Description(
        parameters=count(model),
        active_parameters=model.active_parameters(),
        state_bytes=state.bytes,
        flops_per_token=model.flops_per_token(seq_len),
        head_flops_per_token=6.0 * told.dim * told.vocab_size,
        seq_len=seq_len,
        kernels=tuple(_paths(calls)),
        tree="\n".join([*_modules("model", model), f"state {state.bytes:,} bytes", *_state(state)]),
    )


def reads_values(config: ModelConfig) -> bool:
    """Whether what the model keeps depends on the tokens' values, so that meta tensors cannot tell: a chunk memory
    with a bank, or with chunks that end where a token surprises; a model of Hugging Face's."""
    parts = [getattr(mixer, part, None) for mixer in config.mixer for part in ("bank", "cut")]
    return config.huggingface is not None or any(part is not None for part in parts)


def outline(config: ModelConfig) -> MemoryLM:
    """The model, without memory for it unless its sizes can only be seen on real tensors."""
    if reads_values(config):
        log_once("sizes are counted on real tensors: what this model keeps depends on the tokens' values")
        return make(config)
    with torch.device("meta"):
        return make(config)


def count(model: nn.Module) -> int:
    """Trainable parameters; a shared one counts once."""
    return sum(p.numel() for p in model.parameters())


def _tokens(model: MemoryLM, seq_len: int) -> torch.Tensor:
    return torch.zeros(1, seq_len, dtype=torch.int64, device=model.embed.weight.device)


@torch.no_grad()
def state_of(model: MemoryLM, seq_len: int) -> State:
    """One sequence's state after ``seq_len`` tokens, as the model returns it; on the meta device that is its shapes."""
    state = model(_tokens(model, seq_len)).state
    assert state is not None
    return state


def _paths(calls: Sequence[Choice]) -> Iterator[str]:
    """A line for each operation and path."""
    for choice, times in Counter(calls).items():
        path = f"plain torch, for {choice.reason}" if choice.reason else "Triton"
        if choice.without and not choice.reason:
            path += f", but plain torch on {' and '.join(f'sm_{arch}' for arch in choice.without)}"
        yield f"{choice.operation} × {times}: {path}"


def _shown(name: str, shape: Sequence[int], kind: str) -> str:
    return f"{name} [{', '.join(map(str, shape))}]" + ("" if kind == "float32" else f" {kind}")


def _modules(name: str, module: nn.Module, indent: int = 0) -> list[str]:
    """A module's line and, below, those of its parts; parts of a list that are built alike share theirs."""
    own = [
        _shown(key, p.shape, str(p.dtype).removeprefix("torch.")) for key, p in module.named_parameters(recurse=False)
    ]
    head = f"{'  ' * indent}{name}: {type(module).__name__}"
    lines = ["  ".join([f"{head} {count(module):,}", *own])]
    kept = {key: part for key, part in module.named_children() if count(part) or any(True for _ in part.children())}
    if isinstance(module, nn.ModuleList):
        groups = _alike([(key, _modules("", part, indent + 1)) for key, part in kept.items()])
        for keys, (first, *rest) in groups:
            start = "  " * (indent + 1)
            many = f" (each of {len(keys)})" if len(keys) > 1 else ""
            lines += [start + _places(keys) + first.removeprefix(start) + many, *rest]
        return lines
    return lines + [line for key, part in kept.items() for line in _modules(key, part, indent + 1)]


def _alike(parts: Sequence[tuple[str, list[str]]]) -> list[tuple[list[str], list[str]]]:
    """The parts that say the same, together, in the order of their first."""
    found: dict[tuple[str, ...], list[str]] = {}
    for key, lines in parts:
        found.setdefault(tuple(lines), []).append(key)
    return [(keys, list(lines)) for lines, keys in found.items()]


def _places(keys: Sequence[str]) -> str:
    """``0-3`` for neighbours, else ``0,2``."""
    numbers = [int(key) for key in keys]
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(keys)


def _state(state: State) -> Iterator[str]:
    """The state's tensors, layer by layer; layers that keep the same share their lines."""
    layers: dict[str, list[Shape]] = {}
    for name, x in state.tensors():
        top, _, rest = name.partition("/")
        layer, _, inner = rest.partition("/")
        kind = str(x.dtype).removeprefix("torch.")
        layers.setdefault(layer if top == "layers" else "", []).append((inner or top, tuple(x.shape), kind))
    for shape in layers.pop("", []):
        yield f"  {_shown(*shape)}"
    for keys, lines in _alike([(key, [_shown(*shape) for shape in shapes]) for key, shapes in layers.items()]):
        yield f"  layers {_places(keys)} (each of {len(keys)})" if len(keys) > 1 else f"  layer {keys[0]}"
        yield from (f"    {line}" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a configuration's description; 0, or 2 for bad input."""
    parser = argparse.ArgumentParser("palimpsest-describe", description="Parameters, state, FLOPs and modules.")
    parser.add_argument("config", help="a config file, a name inside configs, like tiny/titans_mag, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="like model.dim=64 train.seq_len=1024")
    args = parser.parse_args(argv)
    try:
        print(describe(args.config, **dict(parse_override(text) for text in args.overrides)).text())
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
