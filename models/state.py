"""The state of a model between calls: what it has in memory after the tokens it has seen."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SCHEMA = 1
Tree = dict[str, Any]


@dataclass(frozen=True)
class State:
    """The state of N sequences.

    ``layers``: one nested dict of tensors per block, every tensor with N leading rows. ``position`` int64 [N]: tokens
    seen. ``fingerprint`` names the model configuration it belongs to. Nothing here is ever changed in place: every
    method returns a new state.
    """

    layers: list[Tree]
    position: Tensor
    fingerprint: str = ""

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """``function`` of every tensor."""
        layers = [_map(layer, function) for layer in self.layers]
        return replace(self, layers=layers, position=function(self.position))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, under a name like ``layers/0/memory/weights.0``."""
        yield "position", self.position
        for i, layer in enumerate(self.layers):
            for name, tensor in _flatten(layer):
                yield f"layers/{i}/{name}", tensor

    @property
    def rows(self) -> int:
        """N, the number of sequences."""
        return self.position.shape[0]

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(x.numel() * x.element_size() for _, x in self.tensors())

    def to(self, device: torch.device | str) -> "State":
        """On another device."""
        return self.map(lambda x: x.to(device))

    def detach(self) -> "State":
        """Without its graph, as between two pieces of a long sequence in truncated backpropagation."""
        return self.map(torch.Tensor.detach)

    def select(self, rows: Sequence[int] | Tensor) -> "State":
        """The given rows, in the given order; a row may be taken more than once."""
        index = torch.as_tensor(rows, device=self.position.device)
        return self.map(lambda x: x[index])

    def reset(self, rows: Sequence[int] | Tensor, fresh: "State") -> "State":
        """With ``rows`` (integers) put back to the one row of ``fresh`` (``model.init_state(1)``).

        Raises:
            ValueError: when ``fresh`` has another number of rows, or belongs to another model.
        """
        if fresh.rows != 1 or fresh.fingerprint != self.fingerprint:
            was = f"{fresh.rows} rows of model {fresh.fingerprint}"
            raise ValueError(f"fresh was a state with {was}; it must be one row of model {self.fingerprint}")
        again = torch.as_tensor(rows, device=self.position.device)
        if again.dtype == torch.bool:
            raise ValueError("rows was a boolean mask; it must be row numbers")
        chosen = {int(row) % self.rows for row in again.tolist()}
        order = [self.rows if row in chosen else row for row in range(self.rows)]
        layers = [take_rows([mine, new], order) for mine, new in zip(self.layers, fresh.layers, strict=True)]
        return replace(self, layers=layers, position=torch.cat([self.position, fresh.position])[order])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in self.tensors()}
        about = {"schema": str(SCHEMA), "fingerprint": self.fingerprint, "layers": str(len(self.layers))}
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, beside, metadata={"palimpsest.state": json.dumps(about)})
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def _from_parts(parts: Iterable[Any], fingerprint: str) -> State:
    layers, position = parts
    return State(layers, position, fingerprint)


pytree.register_pytree_node(
    State,
    lambda state: ([state.layers, state.position], state.fingerprint),
    _from_parts,
    serialized_type_name="palimpsest.models.state.State",
)


def load_state(path: str | Path, device: torch.device | str = "cpu") -> State:
    """Read what :meth:`State.save` wrote. Whether it fits a model is checked where the model is given it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is damaged, is not a state, or has another schema version.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"state file {str(path)!r} not found")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {}).get("palimpsest.state", "{}"))
            flat = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, RuntimeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"state file {str(path)!r} is damaged or not a safetensors file: {what}") from None
    if not isinstance(about, dict) or about.get("schema") != str(SCHEMA):
        schema = about.get("schema") if isinstance(about, dict) else about
        raise ValueError(f"{str(path)!r} was of state schema {schema}; it must be a state of schema {SCHEMA}")
    try:
        layers = _layers(flat, about.get("layers"))
        position, fingerprint = flat["position"], about["fingerprint"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"state file {str(path)!r} holds no whole state: {error}") from None
    if position.dtype != torch.int64 or position.dim() != 1 or not isinstance(fingerprint, str):
        was = f"a position {position.dtype} {tuple(position.shape)} of model {fingerprint!r}"
        raise ValueError(f"state file {str(path)!r} holds {was}; it must be torch.int64 [N] and a text")
    return State(layers, position, fingerprint)


MOST_LAYERS = 1 << 16
"""A file that claims more is not believed: they are made before anything is known of them."""


def _layers(flat: dict[str, Tensor], claimed: Any) -> list[Tree]:
    """The nested dicts of tensors that names like ``layers/0/memory/weights.0`` stand for."""
    if not isinstance(claimed, str) or not claimed.isdecimal() or int(claimed) > MOST_LAYERS:
        raise ValueError(f"layers was {claimed!r}; it must be a number up to {MOST_LAYERS}")
    layers: list[Tree] = [{} for _ in range(int(claimed))]
    for name, tensor in flat.items():
        if name == "position":
            continue
        head, _, rest = name.partition("/")
        layer, _, rest = rest.partition("/")
        if head != "layers" or not layer.isdecimal() or int(layer) >= len(layers) or not rest:
            raise ValueError(f"it has a tensor {name!r}; it must be layers/<below {len(layers)}>/<name>")
        place = layers[int(layer)]
        *path_in, last = rest.split("/")
        for part in path_in:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"tensor {name!r} lies inside of another tensor")
        if last in place:
            raise ValueError(f"tensor {name!r} has the name of a group of tensors")
        place[last] = tensor
    return layers


def take_rows(parts: Sequence[Tree], order: Sequence[int]) -> Tree:
    """Rows ``order`` of the parts' rows counted through. A cache that is longer in one part (dimension 1, newest
    entries last) lengthens the others with zeros on the left, which their own count leaves unread; a tensor that one
    part does not have is zeros there."""
    return _take_rows(parts, [next(_flatten(part))[1].shape[0] for part in parts], order)


def _take_rows(parts: Sequence[Tree], rows: Sequence[int], order: Sequence[int]) -> Tree:
    result: Tree = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        first = next(part[name] for part in parts if name in part)
        if isinstance(first, dict):
            result[name] = _take_rows([part.get(name, {}) for part in parts], rows, order)
            continue
        mine = [part.get(name, first.new_zeros(n, *first.shape[1:])) for n, part in zip(rows, parts, strict=True)]
        if first.dim() > 1:
            longest = max(x.shape[1] for x in mine)
            mine = [_pad(x, longest) for x in mine]
        result[name] = torch.cat([x.to(first.dtype) for x in mine])[torch.as_tensor(order, device=first.device)]
    return result


def _pad(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[1]
    return x if not missing else torch.cat([x.new_zeros(x.shape[0], missing, *x.shape[2:]), x], 1)


def _map(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    return {name: _map(x, function) if isinstance(x, dict) else function(x) for name, x in tree.items()}


def _flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, x in tree.items():
        if isinstance(x, dict):
            yield from _flatten(x, f"{prefix}{name}/")
        else:
            yield prefix + name, x
