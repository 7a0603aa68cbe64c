"""The configuration of a model, validated; and the machinery that every room's configuration shares."""

import difflib
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails
from typing_extensions import Self

from ..configs import find_config
from .hmt_config import HMTConfig
from .mixer_config import MixerConfig
from .strict import ConfigError, Count, Positive, Strict

__all__ = [
    "ConfigError",
    "ModelConfig",
    "Strict",
    "apply_overrides",
    "load_config",
    "load_yaml",
    "parse_override",
    "validate",
]

Section = TypeVar("Section", bound=BaseModel)


# -- reading ----------------------------------------------------------------------------------------------------------


@cache
def _loader() -> Any:
    """YAML with two repairs: ``1e-3`` is a number (YAML 1.1 asks for ``1.0e-3``), and a repeated key is an error.

    Imported by the first file that is read: a model made of a mapping needs no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(f"{key!r} stands twice in one section, again on line {line}")
                seen.add(key)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?|\.inf|\.nan)$"),
        list("-+0123456789."),
    )
    return Loader


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: when there is no such file.
        ConfigError: for text that is not YAML, a repeated key, or a file whose top level is not a mapping.
    """
    import yaml

    text = Path(path).read_text(encoding="utf-8")
    try:
        content = yaml.load(text, Loader=_loader())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} held {type(content).__name__} at its top level; it must hold a mapping")
    return content


def load_config(path: str | Path, read: Callable[[Path], dict[str, Any]] = load_yaml) -> dict[str, Any]:
    """A run's configuration in a YAML file, on top of the one that its key ``base`` names; ``read`` reads a file.

    ``base`` is a file as :func:`palimpsest.configs.find_config` finds it, and may have a base of its own. What a file
    says replaces what its base says, key by key inside sections; a list, and a section with a ``kind``, is replaced
    whole.

    Raises:
        FileNotFoundError: when a file is not there.
        ConfigError: as :func:`load_yaml`; for a base that is not a text, or that leads back to the file itself.
    """
    chain: list[Path] = []
    contents: list[dict[str, Any]] = []
    following: Any = path
    while following is not None:
        file = find_config(following).resolve()
        if file in chain:
            raise ConfigError(f"base of {chain[-1]} was {str(following)!r}; it must not lead back to where it began")
        chain.append(file)
        contents.append(read(file))
        following = contents[-1].pop("base", None)
        if following is not None and not isinstance(following, str):
            raise ConfigError(f"base of {file} was {following!r}; it must be the name of a configuration")
    merged = contents.pop()
    while contents:
        merged = _on_top(merged, contents.pop())
    return merged


def _on_top(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        below = base.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and "kind" not in value:
            value = _on_top(below, value)
        merged[key] = value
    return merged


def parse_override(text: str) -> tuple[str, Any]:
    """``"train.lr=1e-3"`` to ``("train.lr", 0.001)``; the value is read as YAML.

    Raises:
        ConfigError: without ``=``, with an empty part in the key, or with a value that is not YAML.
    """
    import yaml

    key, sign, value = text.partition("=")
    if not sign or not all(key.strip().split(".")):
        raise ConfigError(f"override was {text!r}; it must be key=value with a dotted key, like train.lr=1e-3")
    try:
        return key.strip(), yaml.load(value, Loader=_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"value of override {text!r} is not valid YAML: {error}") from None


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of ``config`` with ``{"a.b": value}`` set at ``config["a"]["b"]``; a number in a key indexes a list.

    A section that is missing is made, so that a mistyped one is reported by validation, with the nearest valid name.

    Raises:
        ConfigError: when a key goes through something that is not a section, or past a list's end.
    """
    result = _copy(config)
    for key, value in overrides.items():
        *path, last = key.split(".")
        place: Any = result
        for done, part in enumerate(path):
            slot = _slot(place, part, key, ".".join(path[:done]))
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[slot]
        place[_slot(place, last, key, ".".join(path))] = _copy(value)
    return result


def _slot(place: Any, part: str, key: str, above: str) -> str | int:
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise ConfigError(f"override {key!r}: {above} was {place!r}; it must be a section to have a key {part!r}")
    if not part.isdigit() or int(part) >= len(place):
        raise ConfigError(f"override {key!r}: {above} is a list of {len(place)}; {part!r} must be an index into it")
    return int(part)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


# -- validating -------------------------------------------------------------------------------------------------------


def validate(section: type[Section], data: Any, place: str = "") -> Section:
    """``section`` made from ``data``; ``place`` is the dotted name under which ``data`` lies in its file.

    Raises:
        ConfigError: with a line for each fault: the dotted place, what was there, what must be, and for an unknown
            key the nearest valid one.
    """
    try:
        return section.model_validate(data)
    except ValidationError as error:
        lines = [_explain(section, data, place, fault) for fault in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configuration sections named anywhere inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _descend(section: type[BaseModel], location: Iterable[str | int]) -> list[type[BaseModel]]:
    """The sections that may stand at an error's location, where pydantic mixes keys, list indices and kinds."""
    found = [section]
    for part in location:
        fields = [model.model_fields[part] for model in found if part in model.model_fields]
        if fields:
            found = [model for field in fields for model in _models(field.annotation)]
        else:
            named = [m for m in found if "kind" in m.model_fields and m.model_fields["kind"].default == part]
            found = named or found
    return found


def _place(data: Any, prefix: str, location: Iterable[str | int]) -> str:
    """The location as it is written in the file: without the kinds, and without the index of a lone mixer."""
    parts, here = [prefix] if prefix else [], data
    for part in location:
        listed = isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)
        if listed or (isinstance(here, Mapping) and part in here):
            here = here[part]
        elif isinstance(here, Mapping) and (part == here.get("kind") or isinstance(part, int)):
            continue
        parts.append(str(part))
    return ".".join(parts) or "the configuration"


def _nearest(name: object, valid: Iterable[str]) -> str:
    valid = sorted(valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid here: {', '.join(valid)}"


def _explain(section: type[BaseModel], data: Any, prefix: str, fault: ErrorDetails) -> str:
    location, was = fault["loc"], fault.get("input")
    if fault["type"] == "extra_forbidden":
        valid = {name for model in _descend(section, location[:-1]) for name in model.model_fields}
        above = _place(data, prefix, location[:-1])
        name, hint = location[-1], _nearest(location[-1], valid)
        return f"{_place(data, prefix, location)}: unknown key {name!r} in {above}; {hint}"
    place = _place(data, prefix, location)
    if fault["type"] == "missing":
        return f"{place} is missing; it must be given"
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = [str(model.model_fields["kind"].default) for model in _descend(section, location)]
        was = was.get("kind") if isinstance(was, Mapping) else was
        if was is None:
            return f"{place}.kind is missing; it must be one of {', '.join(kinds)}"
        return f"{place}.kind was {was!r}; it must be one of {', '.join(kinds)}; {_nearest(was, kinds)}"
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    if " was " not in message:
        return f"{place} was {was!r}; {message}"
    return message if message.startswith(f"{place}.") else f"{place}: {message}"


# -- the model --------------------------------------------------------------------------------------------------------


PARTS = ("hmt", "huggingface")
"""Keys of parts that most models do not have."""


class ModelConfig(Strict):
    """A language model: ``layers`` blocks of width ``dim``, the mixers cycled over them.

    ``ffn_hidden``: null rounds 8/3 dim up to a multiple of 32, 0 leaves the MLP out. ``softcap`` (null: none) bounds
    the logits by softcap * tanh(logits / softcap). ``z_loss`` weighs log-sum-exp squared in the training loss.
    ``hmt`` (null: none) cuts the text into segments with memory across them. ``huggingface``: the configuration of a
    causal model of that library, which then is all but ``hmt``; see :func:`palimpsest.models.hf.wrap`.
    """

    vocab_size: Count
    dim: Count
    layers: Count
    mixer: Annotated[list[MixerConfig], Field(min_length=1)]
    ffn_hidden: Annotated[int, Field(ge=0)] | None = None
    norm_eps: Positive = 1e-6
    tie_embeddings: bool = True
    rope_base: Positive = 10000.0
    softcap: Positive | None = None
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    init_std: Positive = 0.02
    hmt: HMTConfig | None = None
    huggingface: dict[str, Any] | None = None

    @field_validator("mixer", mode="before")
    @classmethod
    def _one_mixer_is_a_list(cls, value: Any) -> Any:
        if not isinstance(value, Mapping | BaseModel | list | tuple):
            raise ValueError(f"mixer was {value!r}; it must be a section with a kind, or a list of such sections")
        return [value] if isinstance(value, Mapping | BaseModel) else value

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        for mixer in self.mixer:
            inner = getattr(getattr(mixer, "memory", None), "heads", None)
            counts = [("heads", getattr(mixer, "heads", None)), ("memory.heads", inner)]
            for name, heads in counts:
                if heads is not None and self.dim % heads:
                    raise ValueError(f"{name} of mixer {mixer.kind} was {heads}; it must divide dim = {self.dim}")
            if getattr(mixer, "rope", False) and (self.dim // mixer.heads) % 2:  # type: ignore[union-attr]
                width = self.dim // mixer.heads  # type: ignore[union-attr]
                raise ValueError(f"head width of mixer {mixer.kind} was {width}; it must be even for rope: true")
        return self

    @model_validator(mode="after")
    def _segments_are_wrapped(self) -> Self:
        if self.huggingface is not None and self.hmt is None:
            raise ValueError("hmt was null; it must be given with huggingface")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_parts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A part that a model does not have is not written: records from before there was such a part stay equal."""
        return {key: value for key, value in dump(self).items() if value is not None or key not in PARTS}

    @property
    def hidden(self) -> int:
        """The width of the MLP; 0 when there is none."""
        return -(-8 * self.dim // 3 // 32) * 32 if self.ffn_hidden is None else self.ffn_hidden

    @property
    def residual_std(self) -> float:
        """Deviation of the maps that write to the residual stream: init_std / sqrt(2 layers) (GPT-2)."""
        return self.init_std / (2 * self.layers) ** 0.5

    def mixer_of(self, layer: int) -> MixerConfig:
        """The mixer of a layer."""
        return self.mixer[layer % len(self.mixer)]
