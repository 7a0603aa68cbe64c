"""Choosing the next token, and a text under way that can be put down and taken up again exactly."""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models import load_state
from . import draws
from .record import write_json

SCHEMA = 1
PIECE = 2048  # a long prompt is read in pieces of this many tokens: one [piece, vocabulary] of logits at a time


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits.

    ``temperature`` divides the logits, 0 takes the greatest; then only the ``top_k`` greatest stay (None: all), then
    the smallest set whose probability reaches ``top_p`` (1.0: all). Draw ``i`` depends on ``seed`` and ``i`` only.

    Raises:
        ValueError: for a value out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "0 (greedy) or positive"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or left out for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        )
        for name, holds, must in rules:
            if not holds:
                raise ValueError(f"{name} was {getattr(self, name)}; it must be {must}")


def choose(logits: Tensor, sampling: Sampling, draw: int) -> int:
    """The next token from ``logits`` [V]: the inverse of the cumulative distribution at draw number ``draw``.

    In float64 and sorted stably, so that equal logits give equal tokens.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores = logits.detach().double().cpu()
    ordered, order = torch.sort(scores, descending=True, stable=True)
    share = torch.softmax((ordered / sampling.temperature)[: sampling.top_k], dim=0).cumsum(0)
    if sampling.top_p < 1:
        share = share[: int((share < sampling.top_p).sum()) + 1]
    point = draws.uniform(sampling.seed, "sampling", 1, start=draw)[0] * share[-1].item()
    index = int(np.searchsorted(share.numpy(), point, side="right"))
    return int(order[min(index, share.numel() - 1)])


@dataclass
class Session:
    """A text under way: what the model has read (``state``), what it has still to read, and the draws made so far.

    ``unread`` are tokens that were given or written but not fed yet; ``unprinted`` are written tokens whose text is not
    whole yet (the first bytes of a longer character).
    """

    model: Any
    sampling: Sampling = field(default_factory=Sampling)
    state: Any = None
    unread: list[int] = field(default_factory=list)
    drawn: int = 0
    unprinted: list[int] = field(default_factory=list)

    def read(self, tokens: Sequence[int]) -> None:
        """Give tokens to the text: they are fed before the next one is written."""
        vocabulary = self.model.config.vocab_size
        outside = [token for token in tokens if not 0 <= token < vocabulary]
        if outside:
            raise ValueError(f"tokens had {outside[0]}; they must be from 0 to {vocabulary - 1}")
        self.unread += [int(token) for token in tokens]

    @torch.no_grad()
    def step(self) -> int:
        """Feed what is unread and choose the next token, which is then unread itself.

        Raises:
            ValueError: when there is nothing to read, that is, the prompt was empty.
        """
        if not self.unread:
            raise ValueError("prompt was empty; it must have at least one token")
        device = next(self.model.parameters()).device
        for piece in torch.tensor([self.unread], dtype=torch.int64, device=device).split(PIECE, dim=1):
            out = self.model(piece, state=self.state)
            self.state = out.state
        token = choose(out.logits[0, -1], self.sampling, self.drawn)
        self.drawn += 1
        self.unread = [token]
        return token

    def write(self, max_tokens: int, stop: Collection[int] = ()) -> Iterator[int]:
        """Yield up to ``max_tokens`` tokens; a token of ``stop`` ends the text and is not yielded."""
        for _ in range(max_tokens):
            token = self.step()
            if token in stop:
                return
            yield token

    def save(self, path: str | Path) -> None:
        """Write the model's state to ``path`` and all else to ``path`` + ".json", with the state's checksum.

        Raises:
            ValueError: when nothing has been read yet.
        """
        if self.state is None:
            raise ValueError("state was empty; at least one token must have been read before it is saved")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.state.save(path)
        content = {"schema": SCHEMA, "sampling": asdict(self.sampling), "unread": self.unread}
        content |= {"drawn": self.drawn, "unprinted": self.unprinted}
        write_json(companion(path), content | {"sha256": _digest(path, content)})

    @classmethod
    def load(cls, path: str | Path, model: Any, **changed: Any) -> "Session":
        """The text saved at ``path``, to go on with ``model``; ``changed`` replaces fields of its :class:`Sampling`.

        With a new ``seed`` the draws begin again at the first.

        Raises:
            FileNotFoundError: when one of the two files is missing.
            ValueError: naming a file that is damaged, or a state that belongs to another model.
        """
        path = Path(path)
        for part in (path, companion(path)):
            if not part.is_file():
                raise FileNotFoundError(
                    f"state file {str(part)!r} not found; --save-state writes {path} and {companion(path)}"
                )
        content = _companion_content(companion(path))
        if content.pop("sha256") != _digest(path, content):
            raise ValueError(f"state file {str(path)!r} or its .json is damaged: the checksum does not hold")
        state = load_state(path, next(model.parameters()).device)
        mine = model.fingerprint
        if state.fingerprint != mine:
            raise ValueError(f"state file {str(path)!r} is of model {state.fingerprint}; it must be of model {mine}")
        sampling = Sampling(**(content["sampling"] | changed))
        drawn = 0 if sampling.seed != content["sampling"]["seed"] else content["drawn"]
        return cls(model, sampling, state, content["unread"], drawn, content["unprinted"])


def companion(path: Path) -> Path:
    """The file beside a saved state that holds the sampler."""
    return path.with_name(path.name + ".json")


def _digest(path: Path, content: dict[str, Any]) -> str:
    """The checksum over the state file and all that lies beside it."""
    return hashlib.sha256(path.read_bytes() + json.dumps(content, sort_keys=True).encode()).hexdigest()


def _companion_content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"state file {str(path)!r} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else None
        raise ValueError(f"state file {str(path)!r} has schema {found}; this version reads {SCHEMA}")
    if "sha256" not in content:
        raise ValueError(f"state file {str(path)!r} is damaged: it has no sha256")
    return content
