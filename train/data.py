"""Tokenised corpora: text in, memory-mapped shards and a manifest out. ``python -m palimpsest.train.data CONFIG``.

A corpus is a folder (its files: ``shards.py``). It is made in a folder beside and renamed into place (``build.py``): a
corpus that is there is whole, and of two processes that prepare it at the same time one does and the other waits.
"""

import argparse
import hashlib
import json
import logging
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.config import apply_overrides, load_config, parse_override, validate
from .build import build
from .data_config import DataConfig
from .files import DataError, source_digest
from .shards import MANIFEST, SPLITS, entries, map_file, read_manifest, verify_files
from .split import Batch, Split
from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["Batch", "Corpus", "DataConfig", "DataError", "Split", "main", "prepare"]

logger = logging.getLogger("palimpsest.train")

FORMAT = 1


class Corpus:
    """A tokenised corpus on disk, opened.

    Attributes:
        folder: where it lies. tokenizer: what made it. manifest: the content of its manifest.json.
        fingerprint: names the configuration and the source files that it was made from.
        checksum: sha256 over the checksums of its files, in order: equal corpora have equal ones.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer, documents: str = "stream") -> None:
        self.folder, self.manifest, self.tokenizer = folder, manifest, tokenizer
        self.fingerprint: str = manifest["fingerprint"]
        self.documents = documents
        sums = "".join(entry["sha256"] for entry in entries(manifest))
        self.checksum = hashlib.sha256(sums.encode("ascii")).hexdigest()

    def split(self, name: str, documents: str | None = None) -> Split:
        """The ``train`` or the ``validation`` split.

        Args:
            documents: ``stream`` or ``packed``; None for what the configuration says.

        Raises:
            ValueError: for another name.
            DataError: when nothing was held out for validation.
        """
        if name not in SPLITS:
            raise ValueError(f"split was {name!r}; it must be one of {SPLITS}")
        documents = documents or self.documents
        if documents not in ("stream", "packed"):
            raise ValueError(f"documents was {documents!r}; it must be 'stream' or 'packed'")
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
            packed=documents == "packed",
            where=str(self.folder),
        )


def prepare(config: DataConfig, *, verify: bool = True, jobs: int = 1) -> Corpus:
    """The corpus that a configuration describes: tokenised now, or found and verified.

    Args:
        jobs: processes that tokenise, where that is still to do; the corpus does not depend on it.
        verify: whether the checksums of a corpus that is found are computed, which reads it once. Without, only the
            files' sizes are compared; for ranks of a node where another one verifies.
        build: False: only a corpus that is there.

    Raises:
        DataError: for a source, text or tokenizer that cannot be used; for a corpus that is found but damaged, or was
            made from another configuration, tokenizer or state of the source files. It names the key or the file.
    """
    if config.task is not None:
        raise DataError(f"data.task was {config.task!r}; it must be null where text is wanted: a task has no corpus")
    tokenizer = load_tokenizer(config.tokenizer)
    identity = _identity(config, tokenizer)
    given = None if config.folder is None else Path(config.folder).expanduser()
    try:
        digest = source_digest(config)
    except DataError as error:
        if given is None or not (given / MANIFEST).exists():
            raise
        logger.warning("using the corpus in %s without its source: %s", given, error)
        digest = None
    fingerprint = hashlib.sha256(json.dumps([identity, digest], sort_keys=True).encode("utf-8")).hexdigest()
    folder = given or Path("runs", "data", fingerprint[:16])
    if not (folder / MANIFEST).exists():
        about = {"identity": identity, "source": digest, "fingerprint": fingerprint}
        verify = not build(folder, config, tokenizer, about, jobs) and verify  # what was just written needs no reading
    manifest = read_manifest(folder)
    _check_identity(manifest, identity, digest, folder)
    verify_files(manifest, folder, checksums=verify)
    return Corpus(folder, manifest, tokenizer, config.documents)


def _identity(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a corpus is made from, as far as the configuration says."""
    keys = {
        "stdlib": (),
        "text": ("path",),
        "jsonl": ("path", "text_key"),
        "parquet": ("path", "text_key"),
        "hf": ("name", "subset", "split", "text_key"),
    }[config.source]
    identity = {key: getattr(config, key) for key in ("source", *keys, "validation_fraction", "shard_tokens")}
    if config.source == "stdlib":
        identity["python"] = platform.python_version()
    return {"format": FORMAT, **identity, "tokenizer": tokenizer.identity}


def _check_identity(manifest: dict[str, Any], identity: dict[str, Any], digest: str | None, folder: Path) -> None:
    """Refuse a corpus that was made from something else than the configuration now asks for."""
    remedy = f"choose another data.folder than {folder}, or delete it to have the corpus prepared again"
    for key in sorted(identity.keys() | manifest["identity"].keys()):
        now, then = identity.get(key), manifest["identity"].get(key)
        if now != then:
            raise DataError(f"data.{key} was {now!r}; the corpus in {folder} was prepared with {then!r}; {remedy}")
    if digest is not None and digest != manifest["source"]:
        raise DataError(f"the source files changed after the corpus in {folder} was prepared from them; {remedy}")


# -- the command ------------------------------------------------------------------------------------------------------


def summary(corpus: Corpus) -> str:
    """A table of what a corpus holds."""
    rows = [("split", "documents", "tokens", "bytes", "tokens/byte", "shards", "MiB on disk")]
    for name, entry in corpus.manifest["splits"].items():
        size = sum(part["size"] for part in (*entry["shards"], entry["index"])) / 2**20
        rate = f"{entry['tokens'] / entry['bytes']:.4f}" if entry["bytes"] else "-"
        counts = [f"{entry[key]:,}" for key in ("documents", "tokens", "bytes")]
        rows.append((name, *counts, rate, str(len(entry["shards"])), f"{size:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    identity = corpus.manifest["identity"]
    return "\n".join(
        (
            *lines,
            f"source {identity['source']}, tokenizer {identity['tokenizer']['name']}, "
            f"{corpus.manifest['empty_documents']} empty documents left out",
            f"checksum {corpus.checksum}",
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the corpus of a configuration, or verify the one that is there, and print what it holds."""
    parser = argparse.ArgumentParser(prog="palimpsest-data", description="Tokenise the corpus of a configuration.")
    parser.add_argument("config", help="a run's configuration file; its data section is used")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="like data.source=text data.path=my.txt")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    try:
        overrides = dict(parse_override(text) for text in options.overrides)
        run = apply_overrides(load_config(options.config), overrides)
        corpus = prepare(validate(DataConfig, run.get("data") or {}, place="data"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(corpus))
    print(f"{corpus.folder} ready in {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
