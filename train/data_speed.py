"""How fast a source is tokenised, beside the ``tokenizers`` library alone: ``palimpsest.train.data … --measure``.

*ours* is all of the pipeline: reading, unpacking, parsing, checking, starting processes, tokenising, writing, syncing.
*raw* is ``Tokenizer.encode_batch_fast`` on the same documents, already in memory as strings, with as many of its own
threads as ours has processes, in a process of its own, and asking each result for its ids, a list; nothing else is
timed, not the start of that process either. The two take turns, and the best round of each counts. Processor seconds,
of all processes and threads, stand beside the clock's: what else a machine does weighs little in them.
"""

import datetime
import importlib.metadata
import os
import pickle
import platform
import resource
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
    ours: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []
    size = tokens = 0
    load = os.getloadavg()[0]
    for _ in range(rounds):
        before = _processor_seconds()
        with tempfile.TemporaryDirectory() as folder:
            corpus = prepare(config.model_copy(update={"folder": str(Path(folder, "corpus"))}), jobs=jobs)
            assert corpus.seconds is not None  # the folder is new
            ours.append((corpus.seconds, _processor_seconds() - before))
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
        "load_average_before": load,
        **_figures("", ours, size),
    }
    if raw:
        found |= _figures("raw_", alone, size)
        for kind in ("", "processor_"):
            found[f"{kind}ratio_to_raw"] = round(min(found[f"raw_{kind}seconds"]) / min(found[f"{kind}seconds"]), 3)
    return found | {"machine": _machine(), "versions": _versions(), "date": _today()}


def _figures(name: str, rounds: list[tuple[float, float]], size: int) -> dict[str, Any]:
    """What rounds of (seconds, processor seconds) come to, under keys that begin with ``name``."""
    seconds, processor = ([round(each, 3) for each in column] for column in zip(*rounds, strict=True))
    return {
        f"{name}seconds": seconds,
        f"{name}processor_seconds": processor,
        f"{name}mb_per_minute": round(60e-6 * size / min(seconds), 1),
        f"{name}mb_per_processor_minute": round(60e-6 * size / min(processor), 1),
    }


def _processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def report(found: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{found['bytes'] / 1e6:,.1f} MB, {found['tokens']:,} tokens, vocabulary {found['vocabulary']:,}, "
        f"jobs {found['jobs']}, best of {len(found['seconds'])}"
    ]
    for kind, name in (("", "minute"), ("processor_", "processor minute")):
        line = f"ours {found[f'mb_per_{kind}minute']:,.0f} MB per {name}"
        if "ratio_to_raw" in found:
            line += f"; encode_batch_fast alone {found[f'raw_mb_per_{kind}minute']:,.0f}: "
            line += f"ratio {found[f'{kind}ratio_to_raw']:.2f}"
        lines.append(line)
    return "\n".join(lines)


def _raw_in_a_process(config: DataConfig, tokenizer: Tokenizer, threads: int) -> tuple[float, float]:
    """(seconds, processor seconds) of raw encoding, in a process whose environment names the number of threads."""
    parallel = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    environment = {**os.environ, **parallel, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", f"from {__name__} import raw; raw()"]
    order = pickle.dumps((config.model_dump(), tokenizer))
    done = subprocess.run(command, input=order, stdout=subprocess.PIPE, env=environment, check=True)
    seconds, processor = done.stdout.split()[-2:]
    return float(seconds), float(processor)


def raw() -> None:
    """Read the order on standard input; encode all documents; print the seconds and processor seconds of encoding."""
    section, tokenizer = pickle.load(sys.stdin.buffer)
    texts = [document.text.decode("utf-8") for document in documents(DataConfig(**section)) if document.text]
    seconds = processor = 0.0
    while texts:
        size, count = 0, 0
        while count < len(texts) and size < GROUP:
            size, count = size + len(texts[count]), count + 1
        began, used = time.perf_counter(), time.process_time()
        _ = [found.ids for found in tokenizer.backend.encode_batch_fast(texts[:count], add_special_tokens=False)]
        seconds, processor = seconds + time.perf_counter() - began, processor + time.process_time() - used
        texts = texts[count:]
    print(seconds, processor)


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
