"""The command that prepares corpora: what it takes, what it prints, and how bad input is named."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import make, texts_of, write_documents

from palimpsest.train import tokenizer as tokenizers
from palimpsest.train.data import DataConfig, DataError, main, parser, prepare, section


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prepares_and_prints(here, capsys):
    texts = write_documents()
    Path("run.yaml").write_text("name: x\ndata: {source: jsonl, path: x.jsonl}\n")
    assert main(["run.yaml", "data.folder=there", "data.validation_fraction=0"]) == 0
    shown = capsys.readouterr().out
    size = sum(map(len, texts))
    assert ["train", "120", f"{size + 120:,}", f"{size:,}"] in [line.split()[:4] for line in shown.splitlines()]
    assert f"checksum {make(folder='there', validation_fraction=0.0).checksum}" in shown and "there ready in" in shown


def test_the_module_is_the_command(here):
    write_documents()
    Path("run.yaml").write_text("data: {source: jsonl, path: x.jsonl, folder: corpus}\n")
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "palimpsest.train.data", "run.yaml"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "") and "corpus ready in" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "config 'missing.yaml' not found"),
        (["run.yaml", "data.path"], "override was 'data.path'; it must be key=value"),
        (["run.yaml", "data.pth=x"], "data.pth: unknown key 'pth' in data; did you mean 'path'?"),
        (["run.yaml", "data.path=none.txt"], "data.path was 'none.txt', which does not exist"),
    ],
)
def test_the_command_names_bad_input(here, capsys, arguments, message):
    Path("run.yaml").write_text("data: {source: text, path: x.txt}\n")
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and message in shown.err and not shown.out


def test_the_command_takes_sources(here, capsys):
    texts = write_documents()
    assert main(["x.jsonl", "--out", "there", "--validation-fraction", "0", "--jobs", "1"]) == 0
    shown = capsys.readouterr().out
    assert "train on it: data.source=corpus data.folder=there data.tokenizer=bytes" in shown
    assert re.search(r"tokenised [\d.]+ MB at [\d,]+ MB/min, jobs 1", shown)
    corpus = prepare(DataConfig(source="corpus", folder="there"))
    assert texts_of(corpus, "train") == texts
    by_keys = make(folder="other", validation_fraction=0.0)
    assert by_keys.checksum == corpus.checksum
    assert main(["x.jsonl", "--out", "there", "--validation-fraction", "0"]) == 0  # found and verified
    assert "tokenised" not in capsys.readouterr().out
    Path("run.yaml").write_text("data: {source: corpus, folder: there}\n")
    assert main(["run.yaml"]) == 0
    assert f"checksum {corpus.checksum}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["x.jsonl"], {"source": "jsonl", "path": "x.jsonl"}),
        (["d"], {"source": "jsonl", "path": "d"}),
        (["*.txt", "d2"], {"source": "text", "path": ["*.txt", "d2"]}),
        (["*.parquet", "--text-key", "body"], {"source": "parquet", "path": "*.parquet", "text_key": "body"}),
        (["a-b.md", "a.txt"], {"source": "text", "path": ["a-b.md", "a.txt"]}),
        (["a-b.md"], {"source": "text", "path": "a-b.md"}),
        (["run.yaml", "--source", "text"], {"source": "text", "path": "run.yaml"}),
        (["stdlib", "--tokenizer", "t.json"], {"source": "stdlib", "tokenizer": "t.json"}),
        (["hf:some/name", "--split", "test"], {"source": "hf", "name": "some/name", "split": "test"}),
        (["-", "--source", "jsonl", "--out", "o"], {"source": "jsonl", "path": "-", "folder": "o"}),
        (["-", "--out", "o", "--shard-tokens", "9"], {"source": "text", "path": "-", "folder": "o", "shard_tokens": 9}),
        (["run.yaml", "data.path=d2"], {"source": "text", "path": "d2"}),
    ],
)
def test_kinds_are_told_by_suffix(here, items, expected):
    Path("d").mkdir()
    Path("d2").mkdir()
    for name in ("x.jsonl", "d/a.jsonl.gz", "d/b.ndjson", "a.txt", "d2/b.md", "c.parquet", "a-b.md"):
        Path(name).write_text("x")
    Path("run.yaml").write_text("data: {source: text, path: x.txt}\n")
    assert section(parser().parse_args(items)) == DataConfig(**expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.txt", "x.jsonl"], "files of several kinds: a.txt (text), x.jsonl (jsonl); choose one with --source"),
        (["a.txt", "-"], "SOURCE was a.txt -; - must stand alone"),
        (["-"], "data.folder was null; with data.path '-'"),
        (["none.txt"], "data.path was 'none.txt', which does not exist"),
        (["a.txt", "--jobs", "0"], "--jobs was 0; it must be at least 1"),
        (["run.yaml", "--out", "x"], "--out was given beside a configuration; use key=value"),
        (["a.txt", "--tokenizer", "no.json"], "data.tokenizer was 'no.json'; it must be an existing file"),
        (["-", "--out", "x", "--measure"], "--measure cannot read standard input again and again"),
    ],
)
def test_the_command_names_bad_sources(here, capsys, arguments, message):
    write_documents()
    Path("a.txt").write_text("x")
    Path("run.yaml").write_text("data: {source: text, path: a.txt}\n")
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and message in shown.err and not shown.out


def test_a_prepared_corpus_is_opened_whatever_it_was_made_from(here, capsys):
    write_documents()
    made = make()
    Path("x.jsonl").unlink()
    assert prepare(DataConfig(source="corpus", folder="corpus")).checksum == made.checksum
    with pytest.raises(DataError, match=r"data.folder was 'none', which holds no manifest.json; it must be a prepared"):
        prepare(DataConfig(source="corpus", folder="none"))
    path = Path("corpus/train-00000.bin")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"train-00000.bin is corrupted"):
        prepare(DataConfig(source="corpus", folder="corpus"))


def test_the_command_is_killed_and_goes_on(here):
    """The real command on standard input with two workers: killed, and the same again gives what one process makes."""
    texts = write_documents(4000)
    command = [sys.executable, "-m", "palimpsest.train.data", "-", "--source", "jsonl", "--out", "piped", "--jobs", "2"]
    patch = (
        "import palimpsest.train.build as b, palimpsest.train.sources as s; b.JOURNAL_SECONDS = 0; s.PIECE = 20000; "
    )
    patch += "import sys; from palimpsest.train.data import main; sys.exit(main(sys.argv[1:]))"
    with open("x.jsonl", "rb") as stream:
        process = subprocess.Popen([sys.executable, "-c", patch, *command[3:]], stdin=stream)
        while not Path(".piped.partial/progress.json").exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with open("x.jsonl", "rb") as stream:
        done = subprocess.run(command, stdin=stream, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "going on with .piped.partial after" in done.stderr, done.stderr
    corpus = prepare(DataConfig(source="corpus", folder="piped"))
    assert corpus.checksum == make(folder="plain").checksum
    assert sum(len(texts_of(corpus, name)) for name in ("train", "validation")) == len(texts)


def test_measure_compares_with_the_library_alone(here, capsys):
    write_documents(200)
    assert tokenizers.main(["x.jsonl", "--vocab-size", "300", "--out", "t.json"]) == 0
    given = ["x.jsonl", "--tokenizer", "t.json", "--measure", "--rounds", "1", "--jobs", "1", "--json", "speed.json"]
    assert main(given) == 0
    found = json.loads(Path("speed.json").read_text())
    assert found["bytes"] == sum(map(len, write_documents(200))) and found["jobs"] == 1
    assert found["ratio_to_raw"] == pytest.approx(found["raw_seconds"][0] / found["seconds"][0], rel=0.2)  # rounded
    assert {"machine", "versions", "date"} <= found.keys() and "; encode_batch_fast alone" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["speed.json", "t.json", "x.jsonl"]
