"""Corpora on disk: whole or not there, verified when found, refused by name when damaged or of something else."""

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import make, texts_of, write_documents

from palimpsest.train import build, shards
from palimpsest.train import prepare as preparing
from palimpsest.train import tokenizer as tokenizers
from palimpsest.train.data import DataConfig, DataError, prepare


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- what is in a corpus ----------------------------------------------------------------------------------------------


def test_every_document_is_in_one_split_and_in_order(here):
    texts = write_documents()
    corpus = make(validation_fraction=0.1, shard_tokens=100)
    training, validation = texts_of(corpus, "train"), texts_of(corpus, "validation")
    assert 4 <= len(validation) <= 24  # 12 expected
    assert not set(training) & set(validation)
    assert sorted(training + validation) == sorted(texts)
    assert [text for text in texts if text in set(training)] == training
    for name, found in (("train", training), ("validation", validation)):
        split = corpus.split(name)
        size = sum(map(len, found))
        assert (split.documents, split.bytes, split.table_bytes) == (len(found), size, size)
        assert split.tokens == size + len(found)
        assert len(split.shards) == -(-split.tokens // 100)
        assert all(isinstance(shard, np.memmap) and shard.dtype == np.uint8 for shard in split.shards)


def test_size_of_shards_changes_nothing_else(here):
    write_documents()
    small, large = make(shard_tokens=10), make(folder="other")
    for name in ("train", "validation"):
        left, right = small.split(name), large.split(name)
        assert np.array_equal(left.read(0, left.tokens), right.read(0, right.tokens))


def held_out(texts: list[bytes], fraction: float) -> tuple[list[bytes], list[bytes]]:
    """The documents of the two splits of a corpus of these texts."""
    lines = [json.dumps({"text": text.decode()}) + "\n" for text in texts]
    Path("held.jsonl").write_text("".join(lines), encoding="utf-8")
    corpus = make(path="held.jsonl", folder=None, validation_fraction=fraction)
    return texts_of(corpus, "train"), texts_of(corpus, "validation")


def test_the_tail_of_a_single_document_is_held_out_at_a_character(here):
    text = ("é" * 500).encode()
    for fraction in (0.101, 0.1, 0.003):
        (training,), (validation,) = held_out([text], fraction)
        assert training + validation == text
        assert abs(len(validation) - fraction * 1000) <= 1.5
        training.decode(), validation.decode()


def test_the_tail_of_the_last_document_is_held_out_when_the_hash_chose_none(here):
    assert held_out([b"a" * 100, b"b" * 300], 0.05) == ([b"a" * 100, b"b" * 280], [b"b" * 20])
    assert held_out([b"a" * 300, b"b" * 5], 0.05) == ([b"a" * 300], [b"b" * 5])


def test_the_first_document_is_for_training_whatever_its_hash(here, monkeypatch):
    monkeypatch.setattr(shards, "mix64", lambda words: words * 0)
    assert held_out([b"a", b"b", b"c"], 0.02) == ([b"a"], [b"b", b"c"])


def test_whole_documents_are_held_out_in_proportion(here):
    """20,000 documents at 0.02: 400 expected, standard deviation 20."""
    texts = [str(i).encode() for i in range(20000)]
    training, validation = held_out(texts, 0.02)
    assert abs(len(validation) - 400) < 5 * 20 and sorted(training + validation) == sorted(texts)
    assert held_out(texts, 0.02) == (training, validation)
    more = held_out(texts, 0.04)[1]
    assert set(validation) <= set(more)


def test_nothing_is_held_out_at_zero(here):
    texts = write_documents()
    corpus = make(validation_fraction=0.0)
    assert texts_of(corpus, "train") == texts
    with pytest.raises(DataError, match=r"validation split of the corpus in corpus is empty: data.*fraction was 0.0"):
        corpus.split("validation")
    with pytest.raises(ValueError, match="split was 'test'"):
        corpus.split("test")


def test_packed_and_stream_are_the_same_corpus(here):
    write_documents()
    packed, stream = make(documents="packed"), make()
    assert packed.fingerprint == stream.fingerprint
    shape = {"seed": 0, "batch_size": 2, "seq_len": 16}
    assert packed.split("train").batch(0, **shape).cu_seqlens is not None
    assert stream.split("train").batch(0, **shape).cu_seqlens is None
    assert torch.equal(
        packed.split("train", "stream").batch(0, **shape).tokens, stream.split("train").batch(0, **shape).tokens
    )
    with pytest.raises(ValueError, match="documents was 'padded'"):
        stream.split("train", "padded")


def test_a_larger_vocabulary_takes_wider_tokens(here, monkeypatch):
    texts = write_documents()

    class Words(tokenizers.Tokenizer):
        """A number per distinct document, to have large ids and inexact byte counts."""

        name, vocab_size, separator, identity = "words", 70000, 69999, {"name": "words"}
        byte_counts = np.array([10.0] * 69999 + [0.0])

        def encode_documents(self, found):
            return [np.full(2, 66000 + texts.index(text)) for text in found]

        def decode(self, tokens):
            raise NotImplementedError

    monkeypatch.setattr(preparing, "load_tokenizer", lambda name: Words())
    corpus = make()
    split = corpus.split("train")
    assert split.bytes + corpus.split("validation").bytes == sum(map(len, texts))
    assert split.shards[0].dtype == np.uint32 and split.document(0).tolist() == [69999, 66000, 66000]
    ring = torch.from_numpy(split.read(0, split.tokens))
    assert split.table_bytes == 20 * split.documents != split.bytes
    assert split.bytes_of(ring).sum().item() == pytest.approx(split.bytes, rel=1e-12)  # sum of 200 float64 terms


def test_empty_documents_are_left_out_and_counted(here, capsys):
    Path("x.jsonl").write_text('{"text": ""}\n{"text": "some text"}\n{"text": ""}\n', encoding="utf-8")
    corpus = make(validation_fraction=0)
    assert texts_of(corpus, "train") == [b"some text"] and corpus.manifest["empty_documents"] == 2


@pytest.mark.parametrize(("content", "what"), [("", "no documents"), ('{"text": ""}\n', "nothing but empty documents")])
def test_an_empty_corpus_is_refused(here, content, what):
    Path("x.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"data.path was 'x.jsonl', a corpus with {what}; it must have text"):
        make()
    assert sorted(os.listdir()) == ["x.jsonl"]


def test_the_standard_library_is_a_corpus(here):
    corpus = prepare(DataConfig())
    assert corpus.folder == Path("runs/data", corpus.fingerprint[:16])
    train, validation = corpus.split("train"), corpus.split("validation")
    assert train.bytes > 5e6 and 0.002 < validation.bytes / train.bytes < 0.2
    assert "def " in corpus.tokenizer.decode(validation.document(0).tolist())


# -- found and verified -----------------------------------------------------------------------------------------------


def test_a_corpus_that_is_found_is_used(here, monkeypatch):
    write_documents()
    first = make(folder=None)
    monkeypatch.setattr(build, "tokenise", None)
    again = make(folder=None)
    assert (again.folder, again.checksum, again.fingerprint) == (first.folder, first.checksum, first.fingerprint)


def test_a_changed_source_is_another_corpus(here):
    write_documents()
    first = make(folder=None)
    make()
    with open("x.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"text": "more"}\n')
    assert make(folder=None).folder != first.folder
    with pytest.raises(DataError, match=r"source files changed after the corpus in corpus was prepared .* delete it"):
        make()


def test_a_given_folder_outlives_its_source(here, caplog):
    write_documents()
    first = make()
    Path("x.jsonl").unlink()
    assert make().checksum == first.checksum
    assert "using the corpus in corpus without its source: data.path was 'x.jsonl'" in caplog.text
    with pytest.raises(DataError, match=r"data.path was 'x.jsonl', which does not exist"):
        make(folder="other")
    with pytest.raises(DataError, match=r"data.path was 'x.jsonl', which does not exist"):
        make(folder=None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"validation_fraction": 0.3}, "data.validation_fraction was 0.3; the corpus in corpus was prepared with 0.02"),
        ({"shard_tokens": 5}, "data.shard_tokens was 5; "),
        ({"path": ["x.jsonl"]}, r"data.path was \['x.jsonl'\]; the corpus in corpus was prepared with 'x.jsonl'"),
        ({"text_key": "body"}, "data.text_key was 'body'; the corpus in corpus was prepared with 'text'"),
        ({"source": "stdlib", "path": None}, "data.path was None; the corpus in corpus was prepared with 'x.jsonl'"),
    ],
)
def test_a_corpus_of_another_configuration_is_refused(here, keys, message):
    write_documents()
    make()
    with pytest.raises(DataError, match=message):
        make(**keys)


def test_a_corpus_of_another_tokenizer_is_refused(here):
    write_documents()
    manifest = Path(make().folder, "manifest.json")
    content = json.loads(manifest.read_text())
    content["identity"]["tokenizer"] = {"name": "gpt2"}
    manifest.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"data.tokenizer was \{'name': 'bytes'\}; .* prepared with \{'name': 'gpt2'\}"):
        make()


@pytest.mark.parametrize("name", ["train-00001.bin", "validation-00000.bin", "train-documents.bin"])
def test_a_damaged_file_is_named(here, name):
    write_documents()
    path = Path(make(shard_tokens=500).folder, name)
    sound = path.read_bytes()

    def refused(content: bytes, message: str, verify: bool = True) -> None:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name} {message}.*delete corpus to have the corpus prepared again"):
            prepare(DataConfig(source="jsonl", path="x.jsonl", folder="corpus", shard_tokens=500), verify=verify)

    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    refused(bytes(flipped), f"is corrupted: its sha256 was .* must be {hashlib.sha256(sound).hexdigest()}")
    for verify in (True, False):
        refused(sound[:-1], f"had {len(sound) - 1} bytes; by the manifest it must have {len(sound)}", verify)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing from the corpus; delete corpus"):
        make(shard_tokens=500)
    path.write_bytes(sound)
    make(shard_tokens=500)


@pytest.mark.parametrize(("content", "what"), [("{", "is damaged: Expecting"), ("[]", "is not the manifest of a corp")])
def test_a_damaged_manifest_is_named(here, content, what):
    write_documents()
    make()
    Path("corpus/manifest.json").write_text(content)
    with pytest.raises(DataError, match=f"corpus/manifest.json {what}.*delete corpus"):
        make()


# -- building ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_left_alone(here):
    write_documents()
    Path("corpus").mkdir()
    Path("corpus/precious").write_text("x")
    with pytest.raises(DataError, match=r"data.folder was 'corpus', which holds no manifest.json; it must be a corpus"):
        make()
    Path("corpus/precious").unlink()
    assert make().split("train").tokens
    Path("file").write_text("x")
    with pytest.raises(DataError, match=r"data.folder was 'file'"):
        make(folder="file")


def test_a_preparation_that_fails_leaves_nothing(here, monkeypatch):
    write_documents()
    Path("x.jsonl").write_text(Path("x.jsonl").read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"x.jsonl:121 is not JSON"):
        make()
    write_documents()

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.FileWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        make()
    assert os.listdir() == ["x.jsonl"]


def _prepare(barrier, results) -> None:
    barrier.wait()
    results.put(make().checksum)


def test_processes_may_prepare_at_the_same_time(here):
    write_documents(2000)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_prepare, args=(barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(sums) == 1 and sorted(os.listdir()) == ["corpus", "x.jsonl"]


def test_losing_the_race_uses_the_winner(here, monkeypatch):
    """Another process's corpus appears between the look for one and the renaming, as where folders cannot be locked."""
    write_documents()
    winner = make(folder="other")
    original = build.tokenise

    def slow(folder, *given, **keys):
        manifest = original(folder, *given, **keys)
        shutil.copytree("other", "corpus")
        return manifest

    monkeypatch.setattr(build, "tokenise", slow)
    corpus = make()
    assert corpus.checksum == winner.checksum
    config = DataConfig(source="jsonl", path="x.jsonl", folder="corpus")
    assert not build.build(corpus.folder, config, corpus.tokenizer, {})  # one that looked before it was there
    assert make().checksum == corpus.checksum and sorted(os.listdir()) == ["corpus", "other", "x.jsonl"]


def test_another_process_reads_the_same_batch(here):
    write_documents()
    batch = make().split("train").batch(12345, seed=6, batch_size=8, seq_len=32)
    script = (
        "from palimpsest.train.data import DataConfig, prepare\n"
        "corpus = prepare(DataConfig(source='jsonl', path='x.jsonl', folder='corpus'))\n"
        "batch = corpus.split('train').batch(12345, seed=6, batch_size=8, seq_len=32)\n"
        "print(batch.tokens.tolist(), batch.targets.tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == f"{batch.tokens.tolist()} {batch.targets.tolist()}"
