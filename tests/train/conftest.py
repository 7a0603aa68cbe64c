"""A tiny corpus and config, and a runner of training processes, for the tests of the loop."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from training import MODEL, TRAIN, Runner

WORDS = "the memory of a river is its bed and what it writes there it reads again in spring"


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("runner"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> dict:
    """The ``data`` section of a small text corpus, tokenised once."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for number in range(12):
        words = " ".join(draw.choice(WORDS.split()) for _ in range(400))
        (folder / f"{number}.txt").write_text(words)
    return {
        "source": "text",
        "path": str(folder / "*.txt"),
        "folder": str(folder / "tokens"),
        "validation_fraction": 0.2,
    }


@pytest.fixture
def content(corpus, tmp_path) -> dict:
    """A whole config as a mapping, with its run folder in this test's folder."""
    return {"name": "tiny", "seed": 3, "model": MODEL, "data": corpus, "train": TRAIN | {"out": str(tmp_path / "run")}}


@pytest.fixture
def config(content, tmp_path) -> Path:
    """The same, as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
