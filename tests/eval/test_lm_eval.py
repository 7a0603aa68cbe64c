"""The lm-evaluation-harness on a tiny untrained run, without a network: the adapter's numbers, tasks on a local file,
and one of RULER's."""

import importlib.metadata
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch

from palimpsest.eval import lm_eval as command
from palimpsest.eval.generate import generate
from palimpsest.eval.harness import Run
from palimpsest.eval.lm_eval_model import RunLM
from palimpsest.models import build
from palimpsest.train.tokenizer import ByteTokenizer

BOUND = 1e-4  # nats of a sum over some 30 tokens of about 5 each: ten times float32's rounding
TEXTS = ["Line 12 counts 4 stones.", "Line 3", "Line 12 counts 4 stones and 5 birds.", "A"]
TASKS = {
    "choice": (
        "multiple_choice",
        "acc",
        {"doc_to_text": "{{text}}", "doc_to_target": "0", "doc_to_choice": ["1", " x"]},
    ),
    "rolling": ("loglikelihood_rolling", "bits_per_byte", {"doc_to_text": "", "doc_to_target": "{{text}}"}),
    "writing": (
        "generate_until",
        "exact_match",
        {
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{said}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False},
        },
    ),
}


def nats(run: Run, context: str, told: str) -> tuple[float, bool]:
    """log p(told | context) in one forward, and whether each token is the likeliest."""
    tokens = torch.tensor([0, *(context + told).encode()])
    share = run.model(tokens[None, :-1]).logits[0].double().log_softmax(-1)[-len(told.encode()) :]
    wanted = tokens[-len(told.encode()) :]
    return float(share.gather(1, wanted[:, None]).sum()), bool((share.argmax(-1) == wanted).all())


def written(run: Run, prompt: str, count: int) -> str:
    """What the run writes on its own, greedily."""
    return ByteTokenizer().decode(list(generate(run.model, [0, *prompt.encode()], max_tokens=count, temperature=0)))


def asking(*args: Any) -> list[Any]:
    """Requests as the harness makes them."""
    return [SimpleNamespace(args=item) for item in args]


@pytest.fixture
def tasks(tmp_path: Path, run: Run) -> Path:
    """A folder with a file of lines and three tasks on it."""
    lines = [json.dumps({"text": text, "said": written(run, text, 9)}) for text in TEXTS]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines) + "\n")
    for name, (kind, metric, more) in TASKS.items():
        about = {"task": name, "dataset_path": "json", "test_split": "test", "output_type": kind, **more}
        about["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "lines.jsonl")}, "cache_dir": str(tmp_path)}
        about["metric_list"] = [{"metric": metric}]
        (tmp_path / f"{name}.yaml").write_text(json.dumps(about))
    return tmp_path


def test_likelihoods_are_those_of_the_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RunLM(run, batch_size=3)
    follows = ((start, written(run, start, 1)) for start in map(chr, range(33, 127)))
    likely = next(pair for pair in follows if pair[1].isascii() and pair[1].isprintable())
    pairs = [(TEXTS[0], " and"), (TEXTS[1], "1"), ("", "Line"), likely, (TEXTS[2], "é\n")]
    expected = [nats(run, *pair) for pair in pairs]
    for piece in (512, 7):
        monkeypatch.setattr("palimpsest.eval.lm_eval_model.PIECE", piece)
        for (total, greedy), (known, likeliest) in zip(
            model.loglikelihood(asking(*pairs), True), expected, strict=True
        ):
            assert abs(total - known) < BOUND and greedy == likeliest
        whole = model.loglikelihood_rolling(asking(*((text,) for text in TEXTS)))
        assert all(abs(a - nats(run, "", text)[0]) < BOUND for a, text in zip(whole, TEXTS, strict=True))
    assert expected[3][1] and not expected[1][1]


def test_texts_are_those_that_the_model_writes(run: Run) -> None:
    model, greedy = RunLM(run, batch_size=3), {"until": [], "max_gen_toks": 12}
    said = [written(run, text, 12) for text in TEXTS]
    assert model.generate_until(asking(*((text, greedy) for text in TEXTS))) == said
    end = said[0][5]
    cut = model.generate_until(asking((TEXTS[0], greedy | {"until": ["\0", end]}), (TEXTS[1], greedy | {"until": end})))
    assert cut == [said[0][: said[0].index(end)], said[1].split(end)[0]]
    drawn = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12}
    assert model.generate_until(asking((TEXTS[0], drawn)))[0] != said[0]
    with pytest.raises(ValueError, match="generation_kwargs had num_beams; they must be among"):
        model.generate_until(asking(("a", {"num_beams": 3})))


def test_tasks_on_a_local_file(
    run: Run, run_folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked = ["--tasks", ",".join(TASKS), "--include", str(tasks), "--only-include", "--batch", "3"]
    assert command.main([str(run_folder), *asked]) == 0
    record = json.loads((run_folder / "lm_eval.json").read_text())
    (run_folder / "lm_eval.json").unlink()
    right = [nats(run, text, "1")[0] > nats(run, text, " x")[0] for text in TEXTS]
    bits = -sum(nats(run, "", text)[0] for text in TEXTS) / math.log(2) / sum(len(text) for text in TEXTS)
    found = record["results"]
    assert found["choice"]["acc,none"] == sum(right) / len(right)
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert found["writing"]["exact_match,none"] == 1.0
    assert record["documents"] == dict.fromkeys(TASKS, 4) and "seconds" in record
    shown = capsys.readouterr().out
    assert all(name in shown for name in TASKS) and f"{bits:.4f}" in shown


def test_a_needle_of_ruler(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With words of ours: those of the package that it takes them from, in all pairs, are six million."""
    words = {"nouns": ["stone", "bird", "river"], "adjectives": ["quiet", "round"], "verbs": []}
    monkeypatch.setitem(
        sys.modules, "wonderwords", SimpleNamespace(RandomWord=lambda: SimpleNamespace(_categories=words))
    )
    splitter = SimpleNamespace(sent_tokenize=None, data=SimpleNamespace(find=lambda name: name))
    monkeypatch.setitem(sys.modules, "nltk", splitter)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.9.1" if name == "nltk" else version(name))
    asked: list[Any] = []
    generate_until = RunLM.generate_until
    monkeypatch.setattr(RunLM, "generate_until", lambda self, found: asked.extend(found) or generate_until(self, found))
    ruler = str(Path(lm_eval.__file__).parent / "tasks" / "ruler")
    plan = command.Asked(("niah_single_1",), limit=2, lengths=(1024,), include=ruler, shipped=False, bootstrap=0)
    record = command.evaluate(run, plan)
    assert record["results"]["niah_single_1"]["1024,none"] == 0.0 and record["documents"] == {"niah_single_1": 2}
    for item in asked:
        prompt, how = item.args
        assert 700 < len(prompt) <= 1024 - 128 and how["max_gen_toks"] == 128
        assert "The grass is green." in prompt and item.doc["outputs"][0] in prompt
        assert prompt.endswith("mentioned in the provided text is")


def test_what_is_refused(run: Run, run_folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = [str(run_folder), "--include", str(tasks), "--only-include"]
    (tasks / "lines.jsonl").unlink()
    remote = {"task": "far", "dataset_path": "EleutherAI/lambada_openai", "output_type": "loglikelihood"}
    (tasks / "far.yaml").write_text(json.dumps(remote))
    faults = {
        "data of choice not found: Unable to find": [*local, "--tasks", "choice"],
        "data of far not found: ": [*local, "--tasks", "far"],
        "task was 'rollin'; it must be one that the harness knows; did you mean 'rolling'?": [
            *local,
            "--tasks",
            "rollin",
        ],
        "lengths had 512; RULER's texts must have at least 1024 tokens": [*local, "--tasks", "far", "--lengths", "512"],
        "limit was 0; it must be at least 1": [*local, "--tasks", "far", "--limit", "0"],
        "tasks was empty": [*local, "--tasks", ","],
        "run folder 'nowhere' not found": ["nowhere", "--tasks", "far"],
    }
    for message, words in faults.items():
        assert command.main(words) == 2
        assert message in capsys.readouterr().err, message
    with pytest.raises(ValueError, match="batch_size was 'auto'; it must be a whole number"):
        RunLM(run, batch_size="auto")
    hmt = {"segment": 8, "sensory": 2, "recall": "half"}
    half = build("tiny/hmt", **{"model.hmt": hmt, "model.dim": 16, "model.layers": 1})
    with pytest.raises(ValueError, match="hmt.recall of the model was 'half'"):
        RunLM(Run(run.folder, run.config, half, run.tokenizer, run.device)).loglikelihood(asking(("a", "b")), True)
