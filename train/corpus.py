"""A tokenised corpus on disk, opened: its splits, memory-mapped."""

import hashlib
from pathlib import Path
from typing import Any

from .files import DataError
from .shards import SPLITS, entries, map_file
from .split import Split
from .tokenizer import Tokenizer

MODES = ("stream", "packed", "whole")


class Corpus:
    """A tokenised corpus on disk, opened.

    Attributes:
        folder: where it lies. tokenizer: what made it. manifest: the content of its manifest.json.
        fingerprint: names the configuration and the source files that it was made from.
        seconds: how long tokenising took, where the call that opened it did so.
        documents, resets: as ``data.documents`` and ``data.reset`` say.
        checksum: sha256 over the checksums of its files, in order: equal corpora have equal ones.
    """

    seconds: float | None = None

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        tokenizer: Tokenizer,
        documents: str = "stream",
        resets: bool | None = None,
    ) -> None:
        self.folder, self.manifest, self.tokenizer = folder, manifest, tokenizer
        self.fingerprint: str = manifest["fingerprint"]
        self.documents, self.resets = documents, resets
        sums = "".join(entry["sha256"] for entry in entries(manifest))
        self.checksum = hashlib.sha256(sums.encode("ascii")).hexdigest()

    def split(self, name: str, documents: str | None = None) -> Split:
        """The ``train`` or the ``validation`` split.

        Args:
            documents: ``stream``, ``packed`` or ``whole``; None for what the configuration says.

        Raises:
            ValueError: for another name.
            DataError: when nothing was held out for validation.
        """
        if name not in SPLITS:
            raise ValueError(f"split was {name!r}; it must be one of {SPLITS}")
        resets = self.resets if documents in (None, self.documents) else None
        documents = documents or self.documents
        if documents not in MODES:
            raise ValueError(f"documents was {documents!r}; it must be one of {MODES}")
        entry = self.manifest["splits"][name]
        if not entry["tokens"]:
            fraction = self.manifest["identity"]["validation_fraction"]
            raise DataError(
                f"the {name} split of the corpus in {self.folder} is empty: data.validation_fraction was {fraction}"
            )
        shards = [map_file(self.folder / shard["file"], self.manifest["dtype"]) for shard in entry["shards"]]
        offsets = map_file(self.folder / entry["index"]["file"], "<i8")
        return Split(
            name,
            shards,
            offsets,
            self.tokenizer,
            byte_count=entry["bytes"],
            table_bytes=entry["table_bytes"],
            packed=documents != "stream" if resets is None else resets,
            whole=documents == "whole",
            where=str(self.folder),
        )
