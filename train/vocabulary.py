"""Training a tokenizer: byte-level byte-pair encoding of a corpus, by the ``tokenizers`` library.

    python -m palimpsest.train.tokenizer SOURCE... --vocab-size 32000 --out tokenizer.json

SOURCE is as of ``palimpsest.train.data``. Text is split into words as GPT-2 does (Radford et al. 2019, section 2.2),
and the most frequent pair of neighbours inside words is merged, again and again (Sennrich et al. 2016), starting from
the 256 bytes: so any text can be encoded, and decoding gives it back byte for byte. ``<|endoftext|>`` separates
documents.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .data import OF_SOURCES, section
from .data_config import DataConfig
from .files import STDIN, DataError
from .sources import parse, pieces
from .tokenizer import SEPARATORS

logger = logging.getLogger("palimpsest.train")

SMALLEST = 257
"""The 256 bytes and the separator."""


def train_bpe(config: DataConfig, vocab_size: int, limit: int | None = None) -> Any:
    """A byte-level BPE ``tokenizers.Tokenizer`` of at most ``vocab_size`` entries, trained on a source's text.

    Args:
        config: names the source; what it would hold out for validation is read as well. limit: bytes of text to read
            at most; the beginning of the source is taken.

    Raises:
        DataError: for ``vocab_size`` less than 257, a source that cannot be used or has no text, or a missing package.
    """
    if vocab_size < SMALLEST:
        raise DataError(f"vocab_size was {vocab_size}; it must be at least {SMALLEST}: the bytes and the separator")
    if limit is not None and limit < 1:
        raise DataError(f"limit was {limit}; it must be at least 1 byte of text")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise DataError("training a tokenizer needs the extra 'data': pip install 'palimpsest[data]'") from error
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    source = Text(config, limit)
    backend.train_from_iterator(iter(source), trainer)
    if not source.size:
        raise DataError("the source had no text; a tokenizer must have some to be trained on")
    if source.limited:
        logger.info("read the first %s bytes of text; there is more", f"{source.size:,}")
    if (found := backend.get_vocab_size()) < vocab_size:
        logger.warning("the text has words for %d entries only; vocab_size was %d", found, vocab_size)
    return backend


class Text:
    """The text of a source, a document or a part of a long one at a time, as far as a limit of bytes allows."""

    def __init__(self, config: DataConfig, limit: int | None) -> None:
        self.config, self.limit = config, limit
        self.size, self.limited = 0, False

    def __iter__(self) -> Iterator[str]:
        for part in (part for piece in pieces(self.config) for part in parse(piece, self.config.text_key)):
            if self.limit is not None and self.size >= self.limit:
                self.limited = True
                return
            self.size += len(part.text)
            yield part.text.decode("utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m palimpsest.train.tokenizer", description="Train a byte-level BPE.")
    made.add_argument("items", nargs="+", metavar="SOURCE", help="files, folders, globs, hf:NAME, stdlib, or -")
    made.add_argument("--vocab-size", type=int, required=True, help="entries, with 256 bytes and the separator")
    made.add_argument("--out", required=True, metavar="FILE.json", help="where it goes; data.tokenizer afterwards")
    made.add_argument("--source", choices=["text", "jsonl", "parquet"], help="the kind of file (default: by suffix)")
    made.add_argument("--text-key", help="the field or column that holds a document's text (default: text)")
    made.add_argument("--subset", help="the Hugging Face dataset's configuration name")
    made.add_argument("--split", help="the Hugging Face dataset's split (default: train)")
    made.add_argument("--limit", type=float, metavar="MB", help="MB of text to read, from the beginning (default: all)")
    return made


def command(arguments: Sequence[str] | None = None) -> int:
    """Train a tokenizer and write its file; returns the exit code."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, began = Path(options.out), time.perf_counter()
    try:
        if out.suffix != ".json":
            raise DataError(f"--out was {options.out!r}; it must end in .json, by which data.tokenizer knows a file")
        given = {key: getattr(options, key, None) for key in OF_SOURCES}
        given["out"] = (
            "unused" if options.items == [STDIN] else None
        )  # a corpus would need a folder; nothing is written
        config = section(argparse.Namespace(**(vars(options) | given)))
        limit = None if options.limit is None else round(options.limit * 1e6)
        backend = train_bpe(config, options.vocab_size, limit)
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(f".{out.name}")
        backend.save(str(beside))
        beside.replace(out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - began
    print(f"{out}: {backend.get_vocab_size():,} entries, trained in {seconds:.1f} s; use it as data.tokenizer={out}")
    return 0
