"""A run asked at another chunk size than its memories were trained with, beside the one they were."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..models import chunking
from .harness import Plan, Run, evaluate

logger = logging.getLogger("palimpsest.eval")


def _scores(name: str, result: Mapping[str, Any]) -> dict[str, float]:
    """What is compared of a task's result: the loss on text, else the mean of its groups' or cells' scores."""
    if name == "perplexity":
        return {key: result["overall"][key] for key in ("loss", "bits_per_byte")}
    parts = result.get("groups") or result.get("cells") or []
    keys = [key for key in ("loss", "accuracy") if parts and all(part.get(key) is not None for part in parts)]
    return {key: sum(part[key] for part in parts) / len(parts) for key in keys}


def at_chunk_size(run: Run, plan: Plan, size: int) -> dict[str, Any]:
    """The record of ``plan`` on a run whose neural memories have chunks of ``size``; ``chunk_size`` in it has the
    trained sizes, and for every task that has them its scores at both.

    Raises:
        ValueError: as :func:`palimpsest.models.chunking.at_chunk_size`, and as :func:`evaluate`.
    """
    other = replace(run, model=chunking.at_chunk_size(run.model, size))
    trained = chunking.chunk_sizes(run.model)
    content = evaluate(other, plan)
    if trained == [size]:
        return content
    before = evaluate(run, plan)
    compared = []
    for name, result in content["tasks"].items():
        for key, value in _scores(name, result).items():
            was = _scores(name, before["tasks"][name])[key]
            compared.append({"task": name, "score": key, "asked": value, "trained": was})
            logger.warning(
                "%s: %s was %.4f at chunk size %d, and is %.4f at that of the training, %s",
                name, key, value, size, was, ", ".join(map(str, trained)),
            )  # fmt: skip
    content["seconds"] = round(content["seconds"] + before["seconds"], 1)
    return content | {"chunk_size": {"asked": size, "trained": trained, "compared": compared}}
