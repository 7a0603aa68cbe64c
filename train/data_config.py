"""The ``data`` section of a run's configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..models.config import ConfigError, Positive, Strict, validate


class Component(Strict):
    """A component of ``data.mixture``: a corpus of its own, made as ``data`` would make it, or one that is there.

    Keys that are null or left out are those of ``data``; ``folder`` alone names a prepared corpus.
    """

    weight: Positive
    """Its share of the windows of every batch, as a ratio to the sum of all weights."""
    label: str | None = None
    """What its validation loss is called; null: the last part of its folder, path or name."""
    source: Literal["corpus", "stdlib", "text", "jsonl", "parquet", "hf"] = "corpus"
    path: str | list[str] | None = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"
    folder: str | None = None
    validation_fraction: float | None = Field(None, ge=0.0, le=0.5)
    shard_tokens: int | None = Field(None, ge=1)


class DataConfig(Strict):
    """Where the text comes from, how it is tokenised, and how windows are cut from it.

    ``documents``, ``reset`` and ``folder`` do not change the tokenised corpus; every other key does, and is in its
    fingerprint.
    """

    source: Literal["stdlib", "text", "jsonl", "parquet", "hf", "corpus", "mixture", "task"] = "stdlib"
    """stdlib: the Python standard library's own sources; hf: a Hugging Face dataset; corpus: one that is prepared, in
    ``folder``; mixture: several; task: examples made from a seed; the others: local files."""
    task: str | None = None
    """A module of palimpsest.eval.tasks, or one of your own with dots in its name; source task only."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the task takes."""
    mixture: list[Component] = Field(default_factory=list)
    """Corpora to draw windows from by weight; source mixture only, which need not be said."""
    path: str | list[str] | None = None
    """Files, folders or globs of source text, jsonl or parquet; read in this order, and sorted inside each. ``-``:
    standard input, text or jsonl, with a ``folder``."""
    name: str | None = None
    """The Hugging Face dataset (a name, or a local folder); source hf only."""
    subset: str | None = None
    """The Hugging Face dataset's configuration name, where it has several."""
    split: str = "train"
    """The Hugging Face dataset's split."""
    text_key: str = "text"
    """The field (jsonl, hf) or column (parquet) that holds a document's text."""
    tokenizer: str = "bytes"
    """``bytes``, the path of a ``tokenizers`` JSON file, or a Hugging Face name. A prepared corpus (source corpus)
    knows its own, which this then need not name."""
    folder: str | None = None
    """Where the tokenised corpus lies; null: ``runs/data/<fingerprint>``."""
    validation_fraction: float = Field(0.02, ge=0.0, le=0.5)
    """The share of the corpus held out by whole documents; 0: no validation split."""
    documents: Literal["stream", "packed", "whole"] = "stream"
    """stream: windows run across documents; packed: the same windows, cut at the borders of documents; whole: windows
    of whole documents, cut only where one is longer than a window, and filled up with padding."""
    reset: bool | None = None
    """Whether memory and attention begin anew at a document's border (cu_seqlens); null: yes for packed and whole, no
    for stream. Only whole leaves a choice."""
    shard_tokens: int = Field(2**27, ge=1)
    """Tokens per shard file."""

    @model_validator(mode="before")
    @classmethod
    def _a_mixture_is_a_source(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("mixture") and "source" not in data:
            return {**data, "source": "mixture"}
        return data

    @model_validator(mode="after")
    def _source_has_its_keys(self) -> "DataConfig":
        if self.source in ("text", "jsonl", "parquet") and not self.path:
            raise ValueError(
                f"data.path was {self.path!r}; with data.source {self.source!r} it must name files, folders or globs"
            )
        if self.source in ("stdlib", "hf", "task", "corpus", "mixture") and self.path is not None:
            raise ValueError(f"data.path was {self.path!r}; it must be null with data.source {self.source!r}")
        if (self.source == "task") != (self.task is not None):
            must = "name a task" if self.source == "task" else "be null"
            raise ValueError(f"data.task was {self.task!r}; with data.source {self.source!r} it must {must}")
        if self.options and self.task is None:
            raise ValueError(f"data.options was {self.options}; it must be empty without data.task")
        if self.source == "hf" and not self.name:
            raise ValueError(f"data.name was {self.name!r}; with data.source 'hf' it must name a Hugging Face dataset")
        return self

    @model_validator(mode="after")
    def _folders_and_mixtures(self) -> "DataConfig":
        paths = self.path if isinstance(self.path, list) else [self.path]
        if "-" in paths and (self.path != "-" or self.source == "parquet"):
            raise ValueError(
                f"data.path was {self.path!r} with data.source {self.source!r}; '-' must stand alone, for text or jsonl"
            )
        if self.folder is None and (self.path == "-" or self.source == "corpus"):
            why = "data.path '-'" if self.path == "-" else "data.source 'corpus'"
            raise ValueError(f"data.folder was null; with {why} it must name the corpus' folder")
        if (self.source == "mixture") != bool(self.mixture):
            must = "have components" if self.source == "mixture" else "be empty"
            raise ValueError(f"data.mixture had {len(self.mixture)}; with data.source {self.source!r} it must {must}")
        if self.source == "mixture" and (self.folder or self.name):
            key = "folder" if self.folder else "name"
            raise ValueError(f"data.{key} was {getattr(self, key)!r}; it must be null beside data.mixture")
        if self.reset not in (None, self.documents != "stream") and self.documents != "whole":
            raise ValueError(
                f"data.reset was {self.reset}; it must be null or {self.documents != 'stream'} with data.documents "
                f"{self.documents!r}: choose stream for windows without borders, packed for windows with them"
            )
        return self

    @model_validator(mode="after")
    def _components_stand_by_themselves(self) -> "DataConfig":
        for index in range(len(self.mixture)):
            try:
                self.component(index)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        labels = [self.label(index) for index in range(len(self.mixture))]
        if len(set(labels)) < len(labels):
            raise ValueError(f"data.mixture had the labels {labels}; each component must have one of its own (label)")
        return self

    def label(self, index: int) -> str:
        """What component ``index`` of the mixture is called."""
        component = self.mixture[index]
        place = component.folder or component.path or component.name or component.source
        return component.label or Path(place if isinstance(place, str) else place[0]).name

    def component(self, index: int) -> "DataConfig":
        """Component ``index`` of the mixture as a ``data`` section of its own."""
        chosen = self.mixture[index].model_dump(exclude={"weight", "label"}, exclude_none=True)
        shared = self.model_dump(include={"tokenizer", "documents", "reset", "validation_fraction", "shard_tokens"})
        return validate(DataConfig, {**shared, **chosen}, place=f"data.mixture.{index}")
