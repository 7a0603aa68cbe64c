"""``python -m palimpsest.eval RUN --chunk-size C``."""

import json
import logging

import pytest

from palimpsest.eval import __main__ as command
from palimpsest.eval.harness import Plan, evaluate
from palimpsest.eval.rechunk import at_chunk_size

OPTIONS = ("--tasks", "perplexity", "--tokens", "1024", "--factor", "2", "--batch", "2", "--device", "cpu")


def test_the_loss_is_shown_at_both_sizes(run_folder, run, tmp_path, caplog, capsys):
    with caplog.at_level(logging.WARNING, "palimpsest.eval"):
        assert command.main([str(run_folder), *OPTIONS, "--chunk-size", "4", "--out", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "eval.json").read_text())
    plan = Plan(tasks=("perplexity",), tokens=1024, factor=2, batch=2)
    own = evaluate(run, plan)["tasks"]["perplexity"]["overall"]
    asked = told["tasks"]["perplexity"]["overall"]
    assert told["chunk_size"]["asked"] == 4 and told["chunk_size"]["trained"] == [8]
    (loss, bits) = told["chunk_size"]["compared"]
    assert loss == {"task": "perplexity", "score": "loss", "asked": asked["loss"], "trained": own["loss"]}
    assert (bits["asked"], bits["trained"]) == (asked["bits_per_byte"], own["bits_per_byte"])
    assert abs(loss["asked"] - loss["trained"]) > 1e-4
    said = f"perplexity: loss was {asked['loss']:.4f} at chunk size 4, and is {own['loss']:.4f} at that of the training"
    assert said in caplog.text
    table = capsys.readouterr().out
    assert "All below is at chunk size 4; the memories were trained at 8." in table
    assert f"{asked['loss']:.4f}" in table and f"{own['loss']:.4f}" in table


def test_the_trained_size_is_an_evaluation_like_any_other(run):
    plan = Plan(tasks=("perplexity",), tokens=256, factor=2, batch=1)
    found, own = at_chunk_size(run, plan, 8), evaluate(run, plan)
    assert "chunk_size" not in found and found["tasks"] == own["tasks"]


def test_a_size_that_cannot_be(run_folder, capsys):
    assert command.main([str(run_folder), *OPTIONS, "--chunk-size", "0"]) == 2
    assert "chunk size was 0; it must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "result", "scores"), [
    ("mqar", {"groups": [{"accuracy": 0.5}, {"accuracy": 1.0}]}, {"accuracy": 0.75}),
    ("passkey", {"cells": [{"accuracy": 0.25, "digits": 1.0}]}, {"accuracy": 0.25}),
    ("retention", {"gaps": []}, {}),
])  # fmt: skip
def test_other_tasks_are_compared_by_their_means(name, result, scores):
    from palimpsest.eval.rechunk import _scores

    assert _scores(name, result) == scores
