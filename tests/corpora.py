"""What the tests of corpora share: a source of short documents, and a corpus made of it."""

import json
from pathlib import Path

from palimpsest.train.data import Corpus, DataConfig, prepare


def write_documents(count: int = 120) -> list[bytes]:
    """A jsonl file ``x.jsonl`` of documents of 1 to 60 characters, each unlike the others."""
    texts = [f"{i} " + "naïve 日本 "[: i % 10] * (i % 7) for i in range(count)]
    Path("x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return [text.encode() for text in texts]


def make(**keys: object) -> Corpus:
    return prepare(DataConfig(**{"source": "jsonl", "path": "x.jsonl", "folder": "corpus", **keys}))


def texts_of(corpus: Corpus, name: str) -> list[bytes]:
    split = corpus.split(name)
    found = [split.document(i) for i in range(split.documents)]
    assert all(document[0] == 0 for document in found)
    return [bytes(document[1:].tolist()) for document in found]
