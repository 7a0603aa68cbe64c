"""How fast a source is tokenised, beside the ``tokenizers`` library alone: ``palimpsest.train.data … --measure``.

*ours* is all of the pipeline: reading, unpacking, parsing, checking, starting processes, tokenising, writing, syncing.
*raw* is ``Tokenizer.encode_batch_fast`` on the same documents, already in memory as strings, with as many of its own
threads as ours has processes, in a process of its own; nothing else is timed. The two take turns, and the best round of
each counts, so that what else a machine does weighs as little as it can.
"""

import datetime
import importlib.metadata
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .data_config import DataConfig
from .files import STDIN, DataError
from .prepare import prepare
from .sources import documents
from .tokenizer import Tokenizer, VocabularyTokenizer, load_tokenizer

GROUP = 2**25
"""Bytes of text that raw encoding is given at once."""


def measure(config: DataConfig, jobs: int, rounds: int) -> dict[str, Any]:
    """Tokenise a source ``rounds`` times into folders that are thrown away; everything a record of it needs.

    Raises:
        DataError: as :func:`~.prepare.prepare`; for standard input, which can be read once only.
    """
    if config.path == STDIN or config.source in ("corpus", "mixture", "task"):
        what = "standard input" if config.path == STDIN else f"data.source {config.source!r}"
        raise DataError(f"--measure cannot read {what} again and again; it must be files or a dataset")
    tokenizer = load_tokenizer(config.tokenizer)
    raw = isinstance(tokenizer, VocabularyTokenizer)
    ours, alone, size, tokens = [], [], 0, 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            corpus = prepare(config.model_copy(update={"folder": str(Path(folder, "corpus"))}), jobs=jobs)
            assert corpus.seconds is not None  # the folder is new
            ours.append(corpus.seconds)
            splits = corpus.manifest["splits"].values()
            size, tokens = (sum(entry[key] for entry in splits) for key in ("bytes", "tokens"))
        if raw:
            alone.append(_raw_in_a_process(config, tokenizer, jobs))
    found = {
        "bytes": size,
        "tokens": tokens,
        "tokenizer": tokenizer.identity,
        "vocabulary": tokenizer.vocab_size,
        "source": config.source,
        "jobs": jobs,
        "seconds": [round(each, 3) for each in ours],
        "mb_per_minute": round(60e-6 * size / min(ours), 1),
    }
    if raw:
        found["raw_seconds"] = [round(each, 3) for each in alone]
        found["raw_mb_per_minute"] = round(60e-6 * size / min(alone), 1)
        found["ratio_to_raw"] = round(min(alone) / min(ours), 3)
    return found | {"machine": _machine(), "versions": _versions(), "date": _today()}


def report(found: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{found['bytes'] / 1e6:,.1f} MB, {found['tokens']:,} tokens, vocabulary {found['vocabulary']:,}, "
        f"jobs {found['jobs']}, best of {len(found['seconds'])}",
        f"ours {found['mb_per_minute']:,.0f} MB/min",
    ]
    if "ratio_to_raw" in found:
        lines[1] += f"; encode_batch_fast alone {found['raw_mb_per_minute']:,.0f}: ratio {found['ratio_to_raw']:.2f}"
    return "\n".join(lines)


def _raw_in_a_process(config: DataConfig, tokenizer: Tokenizer, threads: int) -> float:
    """Seconds of raw encoding, in a process whose environment names the number of threads before the library starts."""
    parallel = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
    environment = {**os.environ, **parallel, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", f"from {__name__} import raw; raw()"]
    order = pickle.dumps((config.model_dump(), tokenizer))
    done = subprocess.run(command, input=order, stdout=subprocess.PIPE, env=environment, check=True)
    return float(done.stdout.split()[-1])


def raw() -> None:
    """Read the order on standard input; encode all documents; print the seconds that encoding took."""
    section, tokenizer = pickle.load(sys.stdin.buffer)
    texts = [document.text.decode("utf-8") for document in documents(DataConfig(**section)) if document.text]
    seconds = 0.0
    while texts:
        size, count = 0, 0
        while count < len(texts) and size < GROUP:
            size, count = size + len(texts[count]), count + 1
        began = time.perf_counter()
        tokenizer.backend.encode_batch_fast(texts[:count], add_special_tokens=False)
        seconds += time.perf_counter() - began
        texts = texts[count:]
    print(seconds)


def _machine() -> dict[str, Any]:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text(encoding="utf-8", errors="replace") if listing.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": (names or [platform.machine()])[0],
        "cores": cores,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("palimpsest", "numpy", "tokenizers", "pyarrow", "zstandard"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
