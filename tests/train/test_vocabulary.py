"""Training a tokenizer: the merges that counting gives, the same every time, usable as data.tokenizer."""

import io
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from palimpsest.train.data import DataConfig, prepare
from palimpsest.train.tokenizer import load_tokenizer, main

TEXTS = ["low low low low low", "lower lower", "newest newest newest newest newest newest", "widest widest widest"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS * 5), encoding="utf-8")
    return tmp_path


def merges_by_counting(texts: list[str], count: int) -> list[int]:
    """How often the pair of each merge was there: of the most frequent pair inside words, time and again (Sennrich et
    al. 2016, algorithm 1); a word is what follows a space, and has that space."""
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for number, word in enumerate(text.split(" ")):
            words[tuple(" " * (number > 0) + word)] += 1
    found = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        best, times = pairs.most_common(1)[0]
        found.append(times)
        joined: Counter[tuple[str, ...]] = Counter()
        for word, number in words.items():
            parts, place = [], 0
            while place < len(word):
                merge = word[place : place + 2] == best
                parts.append("".join(word[place : place + 2]) if merge else word[place])
                place += 2 if merge else 1
            joined[tuple(parts)] += number
        words = joined
    return found


def test_the_most_frequent_pairs_are_merged(here):
    """After 8 merges the text has as many tokens as the plain algorithm's: its bytes less what each merge joined."""
    assert main(["x.jsonl", "--text-key", "body", "--vocab-size", str(257 + 8), "--out", "t.json"]) == 0
    tokenizer = load_tokenizer("t.json")
    assert tokenizer.vocab_size == 265 and tokenizer.decode([tokenizer.separator]) == "<|endoftext|>"
    joined = merges_by_counting(TEXTS * 5, 8)
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS * 5)
    assert tokens == sum(len(text) for text in TEXTS * 5) - sum(joined)


def test_it_is_the_same_every_time_and_a_corpus_can_be_made_with_it(here, monkeypatch, capsys):
    for name in ("a.json", "b.json"):
        assert main(["x.jsonl", "--text-key", "body", "--vocab-size", "270", "--out", name]) == 0
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert "a.json: 270 entries, trained in" in capsys.readouterr().out
    given = {"source": "jsonl", "path": "x.jsonl", "text_key": "body", "validation_fraction": 0}
    corpus = prepare(DataConfig(**given, tokenizer="a.json", folder="corpus"))
    split = corpus.split("train")
    assert corpus.tokenizer.decode(split.document(1).tolist()) == "<|endoftext|>lower lower"
    assert split.bytes == split.table_bytes == sum(len(text) for text in TEXTS * 5)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(Path("x.jsonl").read_bytes())))
    assert main(["-", "--source", "jsonl", "--text-key", "body", "--vocab-size", "270", "--out", "c.json"]) == 0
    assert Path("c.json").read_bytes() == Path("a.json").read_bytes()
    for text in ("naïve 日本\n\t x", "🙂 <|endoftext|>"):
        tokens = corpus.tokenizer.encode(text)
        assert corpus.tokenizer.decode(tokens) == text and corpus.tokenizer.separator not in tokens


def test_a_limit_takes_the_beginning(here, caplog):
    caplog.set_level("INFO", "palimpsest.train")
    Path("y.jsonl").write_text(Path("x.jsonl").read_text() + json.dumps({"body": "zq " * 400}) + "\n")
    size = sum(len(text) for text in TEXTS * 5)
    given = ["--text-key", "body", "--vocab-size", "262"]
    assert main(["x.jsonl", *given, "--out", "a.json"]) == 0
    assert main(["y.jsonl", *given, "--out", "b.json", "--limit", str(size / 1e6)]) == 0
    assert main(["y.jsonl", *given, "--out", "c.json"]) == 0
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes() != Path("c.json").read_bytes()
    assert f"read the first {size:,} bytes of text; there is more" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.jsonl", "--vocab-size", "256", "--out", "t.json"], "vocab_size was 256; it must be at least 257"),
        (["x.jsonl", "--vocab-size", "300", "--out", "t.bin"], "--out was 't.bin'; it must end in .json"),
        (["x.jsonl", "--vocab-size", "300", "--out", "t.json", "--limit", "0"], "limit was 0; it must be at least 1"),
        (["x.jsonl", "--vocab-size", "300", "--out", "t.json"], "x.jsonl:1 has no field 'text' (data.text_key)"),
        (["none", "--vocab-size", "300", "--out", "t.json"], "data.path was 'none', which does not exist"),
        (["empty.txt", "--vocab-size", "300", "--out", "t.json"], "the source had no text; a tokenizer must have some"),
    ],
)
def test_bad_input_is_named(here, capsys, arguments, message):
    Path("empty.txt").write_text("")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not Path("t.json").exists()


def test_a_text_too_small_for_the_vocabulary_is_told(here, caplog):
    assert main(["x.jsonl", "--text-key", "body", "--vocab-size", "5000", "--out", "t.json"]) == 0
    assert "entries only; vocab_size was 5000" in caplog.text
