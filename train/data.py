"""Tokenised corpora: text in, memory-mapped shards and a manifest out.

    python -m palimpsest.train.data SOURCE... --tokenizer tokenizer.json --out DIR
    python -m palimpsest.train.data CONFIG.yaml key=value ...

SOURCE is a file, a folder, a glob, ``hf:NAME`` (a Hugging Face dataset, or a local folder of one), ``stdlib``, or ``-``
for standard input; its kind is told by its suffix or ``--source``. The second form takes the ``data`` section of a
run's configuration.

A corpus is a folder (its files: ``shards.py``). It is made in a folder beside and renamed into place (``build.py``): a
corpus that is there is whole, of two processes that prepare it at the same time one does and the other waits, and a
call that was interrupted, however that was, is gone on with by the same command.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configs import find_config
from ..models.config import apply_overrides, load_config, parse_override, validate
from .corpus import Corpus
from .data_config import DataConfig
from .encode import ONE_THREAD
from .files import STDIN, DataError, kind_of
from .mixture import MixtureCorpus
from .prepare import prepare
from .split import Batch, Split

__all__ = ["Batch", "Corpus", "DataConfig", "DataError", "Split", "main", "prepare"]

OF_SOURCES = ("source", "tokenizer", "out", "text_key", "subset", "split", "validation_fraction", "shard_tokens")
"""Options that say of sources what a configuration says by its keys."""


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


def packing(corpus: Corpus, seq_len: int) -> str:
    """What packing whole documents into windows of ``seq_len`` tokens would come to, a line for each split."""
    lines = []
    for name, entry in corpus.manifest["splits"].items():
        if entry["tokens"]:
            split = corpus.split(name, "whole")
            made = split.plan(seq_len)
            lines.append(
                f"{name}: whole documents fill {made.windows:,} windows of {seq_len:,} tokens, "
                f"{made.padding(seq_len):.2%} padding; {made.cut:,} of {split.documents:,} documents are longer"
            )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="palimpsest-data",
        description="Tokenise text into a corpus that training reads. Killed at any moment, the same command goes on.",
    )
    made.add_argument(
        "items",
        nargs="+",
        metavar="SOURCE | CONFIG.yaml key=value",
        help="files, folders, globs, hf:NAME, stdlib, or - for standard input; or a run's configuration file, whose "
        "data section is used, and keys of it like data.source=text data.path=my.txt",
    )
    made.add_argument("--source", choices=["text", "jsonl", "parquet"], help="the kind of file (default: by suffix)")
    made.add_argument("--tokenizer", help="bytes (the default), a tokenizers .json file, or a Hugging Face name")
    made.add_argument("--out", metavar="DIR", help="the corpus' folder (default: runs/data/<fingerprint>)")
    made.add_argument("--text-key", help="the field or column that holds a document's text (default: text)")
    made.add_argument("--subset", help="the Hugging Face dataset's configuration name")
    made.add_argument("--split", help="the Hugging Face dataset's split (default: train)")
    made.add_argument("--validation-fraction", type=float, help="the share of documents held out (default: 0.02)")
    made.add_argument("--shard-tokens", type=int, help="tokens per shard file (default: 2**27)")
    made.add_argument(
        "--jobs", type=int, default=cores(), help="processes that tokenise (default: the cores, %(default)s)"
    )
    made.add_argument("--seq-len", type=int, help="also say how whole documents would be packed into such windows")
    made.add_argument(
        "--measure",
        action="store_true",
        help="tokenise into a folder that is thrown away, and compare the speed with the tokenizers library's own",
    )
    made.add_argument("--rounds", type=int, default=3, help="times that --measure does so, of which the best counts")
    made.add_argument("--json", metavar="FILE", help="where --measure writes its figures")
    return made


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def section(options: argparse.Namespace) -> DataConfig:
    """The ``data`` section that a command line means.

    Raises:
        ConfigError, DataError: naming the argument or key.
    """
    items = options.items
    given = {key: value for key in OF_SOURCES if (value := getattr(options, key)) is not None}
    if "source" not in given and _is_config(items[0]):
        if given:
            raise DataError(f"--{next(iter(given)).replace('_', '-')} was given beside a configuration; use key=value")
        overrides = dict(parse_override(text) for text in items[1:])
        run = apply_overrides(load_config(items[0]), overrides)
        return validate(DataConfig, run.get("data") or {}, place="data")
    data: dict[str, Any] = given
    if "out" in data:
        data["folder"] = data.pop("out")
    alone = [item for item in items if item in (STDIN, "stdlib") or item.startswith("hf:")]
    if alone and len(items) > 1:
        raise DataError(f"SOURCE was {' '.join(items)}; {alone[0]} must stand alone")
    if items[0] == "stdlib":
        return validate(DataConfig, data | {"source": "stdlib"}, place="data")
    if items[0].startswith("hf:"):
        return validate(DataConfig, data | {"source": "hf", "name": items[0].removeprefix("hf:")}, place="data")
    data["path"] = items[0] if len(items) == 1 else items
    data.setdefault("source", "text" if items[0] == STDIN else kind_of(items))
    return validate(DataConfig, data, place="data")


def _is_config(item: str) -> bool:
    """Whether an argument is a configuration: by its suffix, or, being no file here, as one that the package has."""
    if item.endswith((".yaml", ".yml")):
        return True
    if Path(item).exists():
        return False
    try:
        find_config(item)
    except FileNotFoundError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the corpus of sources or of a configuration, or verify the one that is there; print what it holds."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    try:
        for key in ("jobs", "rounds", "seq_len"):
            if (value := getattr(options, key)) is not None and value < 1:
                raise DataError(f"--{key.replace('_', '-')} was {value}; it must be at least 1")
        config = section(options)
        if options.jobs == 1:  # in this process
            os.environ.update(ONE_THREAD)
        if options.measure:
            return measured(config, options)
        corpus = prepare(config, jobs=options.jobs)
        shown = list(corpus.corpora.values()) if isinstance(corpus, MixtureCorpus) else [corpus]
        for each in shown:
            tell(each, options.jobs, options.seq_len)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{', '.join(str(each.folder) for each in shown)} ready in {time.perf_counter() - began:.1f} s")
    return 0


def tell(corpus: Corpus, jobs: int, seq_len: int | None) -> None:
    """Print what a corpus holds, how fast it was made, and how to train on it."""
    print(summary(corpus))
    if corpus.seconds:
        size = sum(entry["bytes"] for entry in corpus.manifest["splits"].values()) / 1e6
        print(f"tokenised {size:,.1f} MB at {60 * size / corpus.seconds:,.0f} MB/min, jobs {jobs}")
    if seq_len is not None:
        print(packing(corpus, seq_len))
    print(f"train on it: data.source=corpus data.folder={corpus.folder} data.tokenizer={corpus.tokenizer.name}")


def measured(config: DataConfig, options: argparse.Namespace) -> int:
    """``--measure``: print the figures, and write them where ``--json`` says."""
    from .data_speed import measure, report

    found = measure(config, options.jobs, options.rounds)
    print(report(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
