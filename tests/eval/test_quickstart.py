"""The quickstart on a model and a text of a few kilobytes: what it leaves, and that it goes on where it was stopped."""

import json
import signal

import pytest
from safetensors.torch import load_file

from palimpsest.eval import harness, plots, quickstart
from palimpsest.eval.match import parameters
from palimpsest.train.config import read_config

FILES = {
    "comparison.json",
    "comparison.md",
    "comparison.png",
    "config.json",
    "config.yaml",
    "eval.json",
    "eval.md",
    "eval.png",
    "loss.png",
    "metrics.jsonl",
    "model.safetensors",
    "sample.txt",
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "SAMPLE_TOKENS", 40)
    text = "".join(f"def f{i}(x):\n    return x * {i * i % 97} + {i % 7}\n\n" for i in range(1500))
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.py").write_text(text[i * 8000 : (i + 1) * 8000], encoding="utf-8")
    return read_config("configs/quickstart.yaml", SMALL)


SMALL = {
    "model.dim": 16,
    "model.layers": 1,
    "model.mixer.heads": 2,
    "model.mixer.window": 8,
    "model.mixer.memory.heads": 2,
    "model.mixer.memory.expansion": 1,
    "model.mixer.memory.chunk_size": 8,
    "data": {"source": "text", "path": "text", "validation_fraction": 0.2},
    "train.steps": 6,
    "train.warmup_steps": 2,
    "train.batch_size": 2,
    "train.seq_len": 32,
    "train.validate_every": 3,
    "train.checkpoint_every": 2,
    "eval.tokens": 1024,
}


def outcome(folder):
    """The numbers of a finished quickstart."""
    compared = json.loads((folder / "comparison.json").read_text())
    weights = [load_file(part / "model.safetensors") for part in (folder, folder / "window_attention")]
    return compared["results"], (folder / "sample.txt").read_text(), weights


def same(a, b):
    """Bit for bit."""
    weights = all(x[name].equal(y[name]) for x, y in zip(a[2], b[2], strict=True) for name in x)
    return a[:2] == b[:2] and weights


def test_the_baseline_differs_in_its_mixer_alone_and_has_as_many_parameters():
    mine = read_config("configs/quickstart.yaml")
    other = quickstart.baseline(mine)
    counts = [parameters(each.plain()) for each in (mine, other)]
    assert abs(counts[0] - counts[1]) <= 0.01 * counts[0]
    assert 1_000_000 <= counts[0] <= 2_000_000 and mine.train.seq_len >= 512
    a, b = mine.plain(), other.plain()
    assert b["model"]["mixer"][0]["kind"] == "window_attention"
    assert {
        b["model"]["mixer"][0][key] == a["model"]["mixer"][0][key] for key in ("heads", "window", "persistent")
    } == {True}
    for section in (a, b):
        section["model"].pop("mixer"), section["model"].pop("ffn_hidden")
        section["train"].pop("out"), section.pop("name")
    assert a == b


def test_it_leaves_everything_and_says_when_it_is_complete(config, capsys):
    assert quickstart.run(config) == 0
    said, folder = capsys.readouterr().out, config.folder
    assert {path.name for path in folder.iterdir()} >= FILES
    assert any((folder / "checkpoints").iterdir()) and any((folder / "tensorboard").iterdir())
    of_both = FILES - {"comparison.json", "comparison.md", "comparison.png", "loss.png", "sample.txt"}
    assert {path.name for path in (folder / "window_attention").iterdir()} >= of_both
    assert "Complete." in said and "What to try next" in said and "is ahead by" in said
    assert (folder / "sample.txt").read_text().splitlines()[1].startswith("def ")
    table = (folder / "comparison.md").read_text()
    assert "| titans_mag | window_attention |" in table.replace("  ", " ").replace("  ", " ")
    before = outcome(folder)
    assert quickstart.run(config) == 0
    assert "Nothing was left to do" in capsys.readouterr().out
    assert same(before, outcome(folder))


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


def kill_in_training(monkeypatch, which):
    calls, real = [], quickstart.train

    def train(config):
        calls.append(config)

        def die(record):
            if len(calls) == which and record["step"] == 5:
                raise Killed

        return real(config, die)

    monkeypatch.setattr(quickstart, "train", train)


def kill_in(module, name):
    def plant(monkeypatch):
        def die(*args, **kwargs):
            raise Killed

        monkeypatch.setattr(module, name, die)

    return plant


@pytest.mark.parametrize(
    "plant",
    [
        lambda patch: kill_in_training(patch, 1),
        lambda patch: kill_in_training(patch, 2),
        kill_in(harness, "write"),
        kill_in(plots, "comparison"),
        kill_in(quickstart, "write_sample"),
    ],
    ids=["first model", "second model", "evaluation", "comparison", "sample"],
)
def test_killed_anywhere_it_goes_on_and_ends_the_same(config, plant, reference, capsys):
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises(Killed):
            quickstart.run(config)
    assert quickstart.run(config) == 0
    assert "Complete." in capsys.readouterr().out
    assert same(outcome(config.folder), reference)


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reference")


@pytest.fixture
def reference(config, reference_folder, monkeypatch, tmp_path):
    """The outcome of a run that nothing stopped, on the same text."""
    folder = reference_folder / "run"
    if not folder.exists():
        content = config.plain()
        content["train"]["out"] = str(folder)
        assert quickstart.run(read_config(content)) == 0
    return outcome(folder)


def test_asked_to_stop_it_says_how_to_go_on(config, monkeypatch, capsys):
    real = quickstart.train
    stop = lambda record: signal.raise_signal(signal.SIGTERM) if record["step"] == 3 else None  # noqa: E731
    monkeypatch.setattr(quickstart, "train", lambda each: real(each, stop))
    assert quickstart.run(config) == 1
    assert "Stopped at step 3; the same command goes on from there." in capsys.readouterr().out


def test_other_values_in_the_same_folder_are_refused(config, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_in_training(patch, 1)
        quickstart.run(config)
    arguments = [f"{key}={json.dumps(value)}" for key, value in (SMALL | {"train.lr": 0.5}).items()]
    assert quickstart.main(arguments) == 2
    assert "train.lr" in capsys.readouterr().err


def test_a_config_without_memory_is_refused(capsys):
    assert quickstart.main(["configs/tiny/transformer.yaml"]) == 2
    assert "model.mixer was attention" in capsys.readouterr().err


def test_the_verdict_says_when_it_is_too_close():
    def result(*rows):
        return {"by_row": list(rows)}

    results = {"a": {"within": result(2.0, 2.1), "beyond": result(1.0, 1.2)}}
    results["b"] = {"within": result(2.1, 2.0), "beyond": result(1.5, 1.71)}
    within, beyond = quickstart.verdict(results).split("\n")
    assert within.endswith("which is too close to call.")
    assert beyond.startswith("Beyond it a is ahead by 0.505 ± 0.005")
