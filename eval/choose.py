"""Which tasks an evaluation runs, by name, and with which options."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ..models.config import parse_override
from ..train.examples import open_task, scores
from . import tasks
from .tasks import facts, niah, passkey, perplexity, retention

TEXT: Mapping[str, ModuleType] = {
    "perplexity": perplexity,
    "passkey": passkey,
    "niah": niah,
    "facts": facts,
    "retention": retention,
}
"""Tasks about text; every other module of :mod:`.tasks` with a function ``task`` makes examples of numbers."""
STREAM = "stream"
"""The option of every task of examples that is not the task's own: read them so many tokens at a time."""


def names() -> list[str]:
    """All tasks there are."""
    found = [module.name for module in pkgutil.iter_modules(tasks.__path__) if not module.name.startswith("_")]
    made = [name for name in found if name not in TEXT]
    return [*TEXT, *(name for name in made if hasattr(importlib.import_module(f"{tasks.__name__}.{name}"), "task"))]


def nearest(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown name."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_tasks(given: Sequence[str]) -> list[str]:
    """The tasks of a comma-separated or repeated option, each once and in order; a name with dots is a module.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    known = names()
    for name in given:
        if name not in known and "." not in name:
            raise ValueError(f"task was {name!r}; it must be one of {', '.join(known)}{nearest(name, known)}")
    return list(dict.fromkeys(given))


def options(items: Sequence[str], chosen: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["mqar.seed=1"]`` to ``{"mqar": {"seed": 1}}``.

    Raises:
        ValueError: for an option of a task that is not among the chosen ones.
    """
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        place, value = parse_override(item)
        task, _, key = place.rpartition(".")
        if task not in chosen:
            raise ValueError(
                f"--set was {item!r}; it must be TASK.OPTION=VALUE of a task that is run: {', '.join(chosen)}"
            )
        found.setdefault(task, {})[key] = value
    return found


def settings(name: str, told: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """The ``Settings`` of a text task: of ``told`` what it has, with ``given`` on top.

    Raises:
        ValueError: for an option that it does not take, with the nearest that it does, or a value that it refuses.
    """
    kind = TEXT[name].Settings
    takes = [field.name for field in fields(kind)]
    for key in given:
        if key not in takes:
            raise ValueError(f"option {name}.{key} is not known; {name} takes {', '.join(takes)}{nearest(key, takes)}")
    try:
        return TypeAdapter(kind).validate_python({key: told[key] for key in takes if key in told} | dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (name, *first["loc"])))
        raise ValueError(f"option {place} was {first['input']!r}: {first['msg']}") from None


def _carried(model: Any, tokens: Tensor, width: int) -> int:
    """Bytes of the state after tokens [1, T], read ``width`` at a time."""
    state, device = None, next(model.parameters()).device
    for piece in tokens.split(width, dim=1):
        state = model(piece.to(device), state=state, return_state=True).state
    assert state is not None
    return state.bytes


@torch.no_grad()
def examples(
    model: Any, name: str, trained_on: Mapping[str, Any], given: Mapping[str, Any], tokens: int = 4096
) -> dict[str, Any]:
    """A model's scores on the test groups of a task made with the options ``trained_on`` and, on top, ``given``.

    Of each group also ``state_bytes``, what the model carries after one of its examples.

    Raises:
        ConfigError: for a task or options that are none.
        ValueError: for a task of more tokens than the model's vocabulary has.
    """
    made = {key: value for key, value in {**trained_on, **given}.items() if key != STREAM}
    task = open_task(name, made)
    have = model.config.vocab_size
    if have < task.vocab_size:
        raise ValueError(f"task {name!r} needs a vocabulary of {task.vocab_size}; the model's has {have}")
    groups = []
    for group in task.test:
        groups.append(
            {
                "name": group.name,
                "length": group.length,
                "examples": group.count,
                **scores(model, group, tokens=tokens, stream=given.get(STREAM)),
                "state_bytes": _carried(model, group.read(0, 1)[0], given.get(STREAM) or group.length),
            }
        )
    return {"options": made, "stream": given.get(STREAM), "groups": groups}
