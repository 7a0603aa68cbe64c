"""Making a corpus: the same bytes as a plain loop makes, by any number of processes, and however often it is killed."""

import gzip
import json
import os
import random
import shutil
import signal
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from tokenizers import decoders, models, pre_tokenizers, trainers

from palimpsest.train import build, encode, shards, sources
from palimpsest.train.data import DataConfig, DataError, prepare
from palimpsest.train.split import derive

TEXT = "the memory of a river is its bed – and what it writes there it reads again in spring"
WORDS = TEXT.split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, pieces so small that a short corpus has many, and a note after each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "PIECE", 300)
    monkeypatch.setattr(build, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(encode, "FEW", 1)
    return tmp_path


def write_documents(count: int = 40, name: str = "x.jsonl", seed: int = 0) -> list[bytes]:
    draw = random.Random(seed)
    texts = ["\n".join(" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(3)) for _ in range(count)]
    texts[3] = ""
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts), encoding="utf-8")
    return [text.encode() for text in texts if text]


def write_tokenizer(name: str = "bpe.json") -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    backend.save(name)
    return backend


def plain_loop(texts: list[bytes], fraction: float, shard_tokens: int, bpe: tokenizers.Tokenizer | None = None) -> dict:
    """What a corpus' files hold, by their names: one document after the other, each encoded whole."""
    chosen = [i > 0 and derive(0x70616C696D707365, i) < int(fraction * 2**64) for i in range(len(texts))]
    split = {"train": [t for t, c in zip(texts, chosen, strict=True) if not c]}
    split["validation"] = [t for t, c in zip(texts, chosen, strict=True) if c]
    if not any(chosen):
        last = split["train"].pop()
        cut = len(last) - round(fraction * sum(map(len, texts)))
        while 0 < cut < len(last) and last[cut] & 0xC0 == 0x80:
            cut += 1
        split["train"] += [last[:cut]] if cut > 0 else []
        split["validation"] = [last[max(cut, 0) :]] if cut < len(last) else []
    dtype = "<u1" if bpe is None else "<u2"
    separator = 0 if bpe is None else bpe.token_to_id("<|endoftext|>")
    found = {}
    for name, documents in split.items():
        stream, offsets = [], []
        for text in documents:
            offsets.append(len(stream))
            stream += [separator, *(text if bpe is None else bpe.encode(text.decode()).ids)]
        found[f"{name}-documents.bin"] = np.array([*offsets, len(stream)], dtype="<i8").tobytes()
        for number in range(-(-len(stream) // shard_tokens)):
            part = stream[number * shard_tokens : (number + 1) * shard_tokens]
            found[f"{name}-{number:05d}.bin"] = np.array(part, dtype=dtype).tobytes()
    return found


def content(folder: str = "corpus") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "manifest.json"}


def config(**keys: object) -> DataConfig:
    given = {"source": "jsonl", "path": "x.jsonl", "folder": "corpus", "shard_tokens": 700, "validation_fraction": 0.1}
    return DataConfig(**{**given, **keys})


# -- the same as a plain loop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.1, 1e-3, 0.0])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_corpus_is_what_a_plain_loop_makes(here, jobs, fraction):
    """At 0.1 whole documents are held out; at 0.001 none, but the end of the last; at 0 nothing."""
    texts, bpe = write_documents(), write_tokenizer()
    for folder, tokenizer, judge in (("a", "bytes", None), ("b", "bpe.json", bpe)):
        prepare(config(folder=folder, tokenizer=tokenizer, validation_fraction=fraction), jobs=jobs)
        assert content(folder) == plain_loop(texts, fraction, 700, judge)


@pytest.mark.parametrize("fraction", [0.3, 0.013, 0.0])
def test_a_long_document_in_parts_is_the_document(here, monkeypatch, fraction):
    """One text file of 60 times what is tokenised at once, cut at words, where byte-level BPE cuts anyway."""
    monkeypatch.setattr(sources, "LONGEST", 100)
    draw, bpe = random.Random(1), write_tokenizer()
    text = "".join(
        draw.choice(WORDS) + draw.choice([" ", "  ", "\n", "\n\n  ", " ", " "]) for _ in range(1200)
    ).encode()
    Path("x.txt").write_bytes(text)
    for folder, tokenizer, judge in (("a", "bytes", None), ("b", "bpe.json", bpe)):
        keys = {"source": "text", "path": "x.txt", "validation_fraction": fraction}
        corpus = prepare(config(folder=folder, tokenizer=tokenizer, **keys))
        assert content(folder) == plain_loop([text], fraction, 700, judge)
        assert sum(split["bytes"] for split in corpus.manifest["splits"].values()) == len(text)


def test_text_without_words_is_cut_at_characters(here, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 10)
    for text in ("日" * 100, "x" * 99, "\n" * 50, " " * 10, "é" + "日" * 3 + "x"):
        Path("x.txt").write_text(text, encoding="utf-8")
        found = sources.pieces(config(source="text", path="x.txt"))
        parts = [part.text for piece in found for part in sources.parse(piece, "text")]
        assert b"".join(parts) == text.encode() and max(map(len, parts)) <= 10 and all(parts)


def test_standard_input_is_the_file(here, monkeypatch):
    write_documents()
    Path("y.txt").write_text(" ".join(WORDS * 80), encoding="utf-8")
    for source, path in (("jsonl", "x.jsonl"), ("text", "y.txt")):
        by_name = prepare(config(source=source, path=path, folder=f"{source}-file"))
        with open(path, "rb") as stream:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
            piped = prepare(config(source=source, path="-", folder=f"{source}-pipe"))
        assert content(f"{source}-file") == content(f"{source}-pipe") and by_name.checksum == piped.checksum
    Path("z").write_bytes(b"{\n")
    with open("z", "rb") as stream, pytest.raises(DataError, match=r"standard input:1 is not JSON"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
        prepare(config(path="-", folder="other"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "text", "hf"])
def test_a_source_is_read_on_from_any_place(here, monkeypatch, kind):
    """From the end of each piece on, a source gives what it had not given yet."""
    texts = [text.decode() for text in write_documents(30)]
    raw = Path("x.jsonl").read_bytes()
    for number in (1, 2):
        Path(f"d{number}.jsonl.gz").write_bytes(gzip.compress(raw))
        Path(f"d{number}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
        Path(f"d{number}.jsonl").write_bytes(raw)
        Path(f"d{number}.txt").write_bytes(raw)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), f"d{number}.parquet", row_group_size=7)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk("saved")
    monkeypatch.setattr(sources, "LONGEST", 200)
    monkeypatch.setattr(sources, "ROWS", 5)
    suffix = "txt" if kind == "text" else kind
    given = (
        {"source": "hf", "name": "saved"} if kind == "hf" else {"source": kind.split(".")[0], "path": f"d*.{suffix}"}
    )
    found = list(sources.pieces(DataConfig(**given)))
    assert len(found) > 4
    each = [list(sources.parse(piece, "text")) for piece in found]
    for number, piece in enumerate(found):
        rest = sources.pieces(DataConfig(**given), piece.after)
        assert [part for later in rest for part in sources.parse(later, "text")] == [
            part for later in each[number + 1 :] for part in later
        ]


# -- killed -----------------------------------------------------------------------------------------------------------

TOUCHES = (
    (shards.FileWriter, "write"),
    (shards.FileWriter, "sync"),
    (Path, "replace"),
    (Path, "unlink"),
    (os, "rename"),
)
"""What touches the disk while a corpus is made."""


def count_touches(last: int) -> list[int]:
    """Count the calls that touch the disk in this process, and kill it at number ``last``, a write half done."""
    seen = [0]

    def counted(original):
        def wrapper(*arguments, **keys):
            seen[0] += 1
            if seen[0] == last:
                if original.__name__ == "write":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    arguments[0]._stream.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keys)

        return wrapper

    for owner, name in TOUCHES:
        function = getattr(owner, name)
        setattr(owner, name, counted(function))
    return seen


def in_child(given: DataConfig, last: int = 0, stdin: str | None = None, jobs: int = 1) -> int:
    """Prepare in a forked process, which is killed at a touch of the disk; how it ended."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            seen = count_touches(last)
            if stdin is not None:
                sys.stdin = SimpleNamespace(buffer=open(stdin, "rb"))  # noqa: SIM115
            prepare(given, jobs=jobs)
            Path("touches").write_text(str(seen[0]))
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("case", ["documents held out", "tail held out", "one long document", "standard input"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(here, monkeypatch, case):
    """Killed two times in a row at touches of the disk drawn at random, and once at the very end."""
    texts, fraction = write_documents(24), 0.1 if case == "documents held out" else 0.004
    stdin = "x.jsonl" if case == "standard input" else None
    given = config(validation_fraction=fraction, path="-" if stdin else "x.jsonl")
    if case == "one long document":
        monkeypatch.setattr(sources, "LONGEST", 250)
        texts = [b" ".join(texts)]
        Path("x.txt").write_bytes(texts[0])
        given = config(source="text", path="x.txt", validation_fraction=0.4)
    assert in_child(given, stdin=stdin) == 0
    expected, manifest = content(), Path("corpus/manifest.json").read_bytes()
    assert expected == plain_loop(texts, given.validation_fraction, 700)
    touches, draw = int(Path("touches").read_text()), random.Random(case)
    assert touches > 60
    moments = [(draw.randint(1, touches), draw.randint(1, touches)) for _ in range(5)]
    for first, second in [*moments, (touches, touches), (touches - 1, 1), (touches - 4, touches - 5)]:
        os.rename("corpus", "old")
        killed = [in_child(given, first, stdin), in_child(given, second, stdin)]
        assert killed[0] == -signal.SIGKILL and killed[1] in (0, -signal.SIGKILL)
        if killed[1]:
            assert in_child(given, stdin=stdin) == 0
        assert (content(), Path("corpus/manifest.json").read_bytes()) == (expected, manifest), (first, second)
        assert not list(Path().glob(".*"))
        shutil.rmtree("old")


def test_killed_while_the_end_is_held_out_it_does_not_start_anew(here, caplog):
    """At each of the last touches, where the train split is cut back, what is noted is still there."""
    texts = write_documents(24)
    given = config(validation_fraction=0.004)
    assert in_child(given) == 0
    touches = int(Path("touches").read_text())
    caplog.set_level("INFO", "palimpsest.train")
    for before_the_end in range(2, 22, 3):
        shutil.rmtree("corpus")
        assert in_child(given, touches - before_the_end) == -signal.SIGKILL
        prepare(given)
        assert content() == plain_loop(texts, 0.004, 700)
    assert "going on with" in caplog.text and "starting anew" not in caplog.text


def test_what_is_done_is_not_done_again(here, monkeypatch):
    """After a kill near the end, few pieces are tokenised."""
    write_documents(60)
    assert in_child(config()) == 0
    total = int(Path("touches").read_text())
    os.rename("corpus", "whole")
    assert in_child(config(), total * 3 // 4) == -signal.SIGKILL
    seen, original = [], build.Making.add
    monkeypatch.setattr(build.Making, "add", lambda *arguments: seen.append(1) or original(*arguments))
    prepare(config())
    assert content() == content("whole")
    assert 0 < len(seen) < len(list(sources.pieces(config()))) / 2


def test_killed_with_workers_that_end_with_it(here, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 2000)
    monkeypatch.setattr(build, "JOURNAL_SECONDS", 0.05)
    texts = write_documents(1500)
    draw, endings = random.Random(5), []
    for _ in range(3):
        endings.append(in_child(config(), draw.randint(20, 120), jobs=2))
    prepare(config(), jobs=2)
    assert content() == plain_loop(texts, 0.1, 700) and endings == 3 * [-signal.SIGKILL]
    deadline = time.monotonic() + 20
    while workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers()


def workers() -> list[str]:
    """Worker processes that were started in this test's folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                b"encode import serve" in (process / "cmdline").read_bytes()
                and Path.cwd() == (process / "cwd").resolve()
            ):
                found.append(process.name)
        except OSError:
            continue
    return found


def test_another_configuration_or_source_starts_anew(here, caplog):
    texts = write_documents()
    assert in_child(config(), 60) == -signal.SIGKILL
    prepare(config(tokenizer="bytes", validation_fraction=0.2))
    assert content() == plain_loop(texts, 0.2, 700)
    assert in_child(config(folder="other"), 60) == -signal.SIGKILL
    texts = write_documents(30, seed=1)
    prepare(config(folder="other"))
    assert content("other") == plain_loop(texts, 0.1, 700)


def test_progress_that_does_not_fit_its_files_is_not_trusted(here, caplog):
    texts = write_documents()
    assert in_child(config(), 90) == -signal.SIGKILL
    (_, full), _ = json.loads(Path(".corpus.partial/progress.json").read_bytes())["splits"].values()
    Path(f".corpus.partial/train-{len(full):05d}.bin").write_bytes(b"")
    prepare(config())
    assert content() == plain_loop(texts, 0.1, 700) and "starting anew" in caplog.text


def test_other_standard_input_is_refused_when_it_should_go_on(here, monkeypatch):
    write_documents()
    write_documents(name="y.jsonl", seed=2)
    assert in_child(config(path="-"), 90, stdin="x.jsonl") == -signal.SIGKILL
    with (
        open("y.jsonl", "rb") as stream,
        pytest.raises(DataError, match=r"standard input is not what it was .* differ"),
    ):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
        prepare(config(path="-"))


def test_an_error_of_the_disk_keeps_what_is_done_and_a_bad_text_does_not(here, monkeypatch):
    texts = write_documents()
    original, left = shards.SplitWriter.write, [8]

    def fails(self, content):
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        return original(self, content)

    monkeypatch.setattr(shards.SplitWriter, "write", fails)
    with pytest.raises(OSError, match="No space"):
        prepare(config())
    assert Path(".corpus.partial/progress.json").exists() and not Path("corpus").exists()
    prepare(config())
    assert content() == plain_loop(texts, 0.1, 700)
    with open("x.jsonl", "a") as stream:
        stream.write("{")
    with pytest.raises(DataError, match="not JSON"):
        prepare(config(folder="other"))
    assert not list(Path().glob(".*"))


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_few_pieces_are_in_flight_and_in_order():
    """Of 60 pieces at most 2 for each worker are read and not yet written, however slow a worker or the writer is."""
    read, written, most = 0, 0, 0

    def source():
        nonlocal read, most
        for number in range(60):
            read += 1
            most = max(most, read - written)
            yield number

    def work(number: int) -> int:
        time.sleep(0.004 if number % 7 == 0 else 0.0)
        return number * number

    for piece, result in encode.in_order(source(), work, 3):
        assert (piece, result) == (written, written**2)
        written += 1
    assert written == 60 and most == 2 * 3


def test_the_first_error_in_the_order_of_the_source_is_told(here):
    """A worker is slow on a bad line while a later one is read: the earlier is named."""
    lines = [json.dumps({"text": "x" * 400}) + "\n" for _ in range(20)]
    lines[9] = '{"text": 3}\n'
    lines[12] = "{broken\n"
    Path("x.jsonl").write_text("".join(lines))
    for jobs in (1, 3):
        with pytest.raises(DataError, match="x.jsonl:10 was int"):
            prepare(config(), jobs=jobs)
    assert not workers()


def test_memory_does_not_grow_with_the_corpus(here, monkeypatch):
    """Python's and numpy's memory at its highest: the same for 1 MB and for 8 MB, in one document and in many."""
    monkeypatch.setattr(sources, "PIECE", 2**16)
    monkeypatch.setattr(sources, "LONGEST", 2**16)
    monkeypatch.setattr(build, "JOURNAL_SECONDS", 1.0)
    line = "a line of the corpus that is neither long nor short\n"
    peaks = {}
    for kind in ("text", "jsonl"):
        for size in (1, 8):
            document = line if kind == "text" else json.dumps({"text": line * 20}) + "\n"
            Path(f"{kind}{size}.{kind}").write_text(document * (size * 2**20 // len(document)))
            given = config(source=kind, path=f"{kind}{size}.{kind}", folder=f"{kind}{size}", shard_tokens=2**27)
            tracemalloc.start()
            prepare(given)
            peaks[kind, size] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peaks[kind, 8] < peaks[kind, 1] + 2**18 and peaks[kind, 8] < 2**21, peaks


def test_the_meter_tells_speed_and_time_to_come(here):
    write_documents()
    meter = build.Meter(build.files(config()), 1_000_000, 100)
    meter.total = 1100
    assert meter.line(5_000_000, 600, 2.0) == "5.0 MB of text, 2.0 MB/s, 54.5% of the source, 0:02 to go"
    assert build.Meter(build.files(config(path="-")), 0, 0).line(3_000_000, 0, 2.0) == "3.0 MB of text, 1.5 MB/s"
