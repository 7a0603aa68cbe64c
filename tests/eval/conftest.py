"""A tiny run folder as training leaves it: config, weights, and a corpus of sentences made here."""

from pathlib import Path

import pytest
import torch

from palimpsest.eval import harness
from palimpsest.models import build
from palimpsest.train.config import read_config

torch.set_num_threads(1)  # the models are tiny: threads would wait for each other more than they compute

CONTEXT = 64
MEMORY = {"heads": 2, "expansion": 1, "chunk_size": 8}
MODEL = {
    "vocab_size": 256,
    "dim": 16,
    "layers": 2,
    "ffn_hidden": 32,
    "tie_embeddings": False,
    "init_std": 0.5,  # an untrained model is nearly uniform; one that is far from it tells tokens apart
    "mixer": {"kind": "titans_mag", "heads": 2, "window": 8, "persistent": 2, "memory": MEMORY},
}


def corpus_text(sentences: int = 3000) -> str:
    """Sentences that differ from each other."""
    return "".join(f"Line {i} counts {i * i % 97} stones and {i % 7} birds.\n" for i in range(sentences))


def write_run(folder: Path, sentences: int = 3000, documents: int = 40, **changed) -> Path:
    """A run folder of an untrained model."""
    texts = folder.parent / f"{folder.name}-text"
    texts.mkdir(parents=True)
    for i in range(documents):
        (texts / f"{i:02}.txt").write_text(corpus_text(sentences // documents), encoding="utf-8")
    content = {
        "name": folder.name,
        "model": MODEL | changed,
        "data": {
            "source": "text",
            "path": str(texts),
            "folder": str(folder.parent / f"{folder.name}-data"),
            "validation_fraction": 0.2,
        },
        "train": {"out": str(folder), "seq_len": CONTEXT, "steps": 4, "warmup_steps": 1, "batch_size": 2},
    }
    config = read_config(content)
    torch.manual_seed(1)
    model = build(config.plain())
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    model.save(folder, config.plain())
    return folder


@pytest.fixture(scope="session")
def make_run():
    """The function that makes a run folder."""
    return write_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("eval") / "tiny")


@pytest.fixture(scope="session")
def run(run_folder):
    return harness.open_run(run_folder, torch.device("cpu"))
