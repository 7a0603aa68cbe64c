"""The ``data`` section of a run's configuration."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ..models.config import Strict


class DataConfig(Strict):
    """Where the text comes from, how it is tokenised, and how windows are cut from it.

    ``documents`` and ``folder`` do not change the tokenised corpus; every other key does, and is in its fingerprint.
    """

    source: Literal["stdlib", "text", "jsonl", "parquet", "hf", "task"] = "stdlib"
    """stdlib: the Python standard library's own sources; hf: a Hugging Face dataset; task: examples made from a seed;
    the others: local files."""
    task: str | None = None
    """A module of palimpsest.eval.tasks, or one of your own with dots in its name; source task only."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the task takes."""
    path: str | list[str] | None = None
    """Files, folders or globs of source text, jsonl or parquet; read in this order, and sorted inside each."""
    name: str | None = None
    """The Hugging Face dataset (a name, or a local folder); source hf only."""
    subset: str | None = None
    """The Hugging Face dataset's configuration name, where it has several."""
    split: str = "train"
    """The Hugging Face dataset's split."""
    text_key: str = "text"
    """The field (jsonl, hf) or column (parquet) that holds a document's text."""
    tokenizer: str = "bytes"
    """``bytes``, the path of a ``tokenizers`` JSON file, or a Hugging Face name."""
    folder: str | None = None
    """Where the tokenised corpus lies; null: ``runs/data/<fingerprint>``."""
    validation_fraction: float = Field(0.02, ge=0.0, le=0.5)
    """The share of the corpus held out by whole documents; 0: no validation split."""
    documents: Literal["stream", "packed"] = "stream"
    """stream: windows run across documents; packed: documents of a window never see each other (cu_seqlens)."""
    shard_tokens: int = Field(2**27, ge=1)
    """Tokens per shard file."""

    @model_validator(mode="after")
    def _source_has_its_keys(self) -> "DataConfig":
        if self.source in ("text", "jsonl", "parquet") and not self.path:
            raise ValueError(
                f"data.path was {self.path!r}; with data.source {self.source!r} it must name files, folders or globs"
            )
        if self.source in ("stdlib", "hf", "task") and self.path is not None:
            raise ValueError(f"data.path was {self.path!r}; it must be null with data.source {self.source!r}")
        if (self.source == "task") != (self.task is not None):
            must = "name a task" if self.source == "task" else "be null"
            raise ValueError(f"data.task was {self.task!r}; with data.source {self.source!r} it must {must}")
        if self.options and self.task is None:
            raise ValueError(f"data.options was {self.options}; it must be empty without data.task")
        if self.source == "hf" and not self.name:
            raise ValueError(f"data.name was {self.name!r}; with data.source 'hf' it must name a Hugging Face dataset")
        return self
