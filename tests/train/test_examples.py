"""Tasks in the place of text: every example once an epoch, batches of a step alone, answers counted, errors named."""

import sys
from collections.abc import Iterator

import pytest
import torch

from palimpsest.models import build
from palimpsest.models.config import ConfigError
from palimpsest.train import read_config, read_metrics, train
from palimpsest.train.data import DataConfig, prepare
from palimpsest.train.examples import ExampleSplit, Group, TaskCorpus, accuracy, answered, open_task, scores
from palimpsest.train.sources import DataError

IGNORE = -100


def numbered(name: str, length: int, count: int, base: int) -> Group:
    """Examples whose every token is the example's number; the last position is asked."""

    def read(start: int, some: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = (base + torch.arange(start, start + some))[:, None].expand(some, length).contiguous()
        labels = torch.full_like(tokens, IGNORE)
        labels[:, -1] = tokens[:, -1]
        return tokens, labels

    return Group(name, length, count, read)


GROUPS = [numbered("a", 4, 10, 0), numbered("b", 6, 7, 100)]


def epoch(split: ExampleSplit, number: int, seed: int = 3, size: int = 3) -> Iterator[torch.Tensor]:
    count = split.batches(batch_size=size, seq_len=6)
    for step in range(number * count, (number + 1) * count):
        yield split.batch(step, seed=seed, batch_size=size, seq_len=6).tokens


def test_an_epoch_has_no_example_twice_and_another_order_each_time() -> None:
    split = ExampleSplit("train", GROUPS)
    orders = []
    for number in range(3):
        batches = list(epoch(split, number))
        assert sorted(batch.shape[1] for batch in batches) == [4, 4, 4, 6, 6]
        seen = [int(x) for batch in batches for x in batch[:, 0]]
        assert len(set(seen)) == len(seen) == 15
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    assert [int(x) for batch in epoch(split, 0, seed=4) for x in batch[:, 0]] != orders[0]


def test_over_many_epochs_every_example_is_read() -> None:
    split = ExampleSplit("train", GROUPS)
    seen = {int(x) for number in range(12) for batch in epoch(split, number) for x in batch[:, 0]}
    assert seen == set(range(10)) | set(range(100, 107))


def test_rows_are_those_of_the_whole_batch() -> None:
    split = ExampleSplit("train", GROUPS)
    for step in range(8):
        whole = split.batch(step, seed=1, batch_size=4, seq_len=6)
        part = split.batch(step, seed=1, batch_size=4, seq_len=6, rows=range(1, 3))
        assert torch.equal(part.tokens, whole.tokens[1:3]) and torch.equal(part.targets, whole.targets[1:3])


def test_validation_asks_every_example_once() -> None:
    split = ExampleSplit("validation", GROUPS)
    asked: list[int] = []
    for step in range(split.batches(batch_size=4, seq_len=6) + 2):  # and nothing past the end
        batch = split.batch(step, seed=9, batch_size=4, seq_len=6)
        assert batch.tokens.shape[0] == 4
        asked += batch.targets[batch.targets != IGNORE].tolist()
    assert asked == [*range(10), *range(100, 107)]


def test_answers_are_counted_where_something_is_asked() -> None:
    labels = torch.tensor([[IGNORE, 2, 1], [0, IGNORE, IGNORE]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 2, 2], [0, 1, 1]]), 3).float()
    assert [int(x) for x in answered(logits, labels)] == [2, 3]

    class Echo(torch.nn.Module):
        """Says each token again, but never a number from 5 on."""

        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, state: None, return_state: bool) -> object:
            assert state is None and not return_state
            return type("Output", (), {"logits": torch.nn.functional.one_hot(x.clamp(max=5), 128).float(), "state": 0})

    assert accuracy(Echo(), GROUPS[0], tokens=12) == 0.6


def numbers(start: int, some: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples of 13 tokens in which every third position is asked."""
    tokens = (torch.arange(13) * 5 + torch.arange(start, start + some)[:, None] * 7) % 16
    labels = torch.where(torch.arange(13) % 3 == 0, (tokens + 1) % 16, IGNORE)
    return tokens, labels


def test_a_group_is_judged_the_same_in_pieces_as_at_once() -> None:
    memory = {"heads": 2, "expansion": 1, "chunk_size": 4}
    mixer = {"kind": "titans_mag", "heads": 2, "window": 5, "persistent": 2, "memory": memory}
    torch.manual_seed(2)
    model = build({"model": {"vocab_size": 16, "dim": 16, "layers": 1, "mixer": mixer, "init_std": 0.5}})
    seen = []

    def judge(logits: torch.Tensor, where: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(where)
        wanted = torch.cat([numbers(int(row), 1)[1][0, at][None] for row, at in where])
        return {"loss": torch.nn.functional.cross_entropy(logits, wanted, reduction="none")}

    group = Group("numbers", 13, 9, numbers, judge)
    whole = scores(model, group, tokens=9 * 13)
    with torch.no_grad():
        output = model(*numbers(0, 9)[:1], targets=numbers(0, 9)[1])
    assert whole["loss"] == pytest.approx(float(output.loss), rel=1e-5) and 0 < whole["accuracy"] < 1
    for stream, tokens in ((4, 4096), (5, 25), (50, 50)):
        seen.clear()
        assert scores(model, group, stream=stream, tokens=tokens) == pytest.approx(whole, rel=1e-4), "rounding"
        assert sorted(map(tuple, torch.cat(seen).tolist())) == [(i, t) for i in range(9) for t in range(0, 13, 3)]
    assert accuracy(model, group) == whole["accuracy"]


def test_scores_refuse_what_they_cannot_read() -> None:
    model, silent = torch.nn.Linear(1, 1), Group("silent", 4, 0, numbers)
    with pytest.raises(ValueError, match="stream was 0; it must be at least 1"):
        scores(model, silent, stream=0)
    with pytest.raises(ValueError, match="group silent of 0 examples had no label"):
        scores(model, silent)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nothing_here", {}, "data.task was 'nothing_here'; it must name a module with a function task"),
        ("palimpsest.train.split", {}, "data.task was 'palimpsest.train.split'"),
        (
            "mqar",
            {"pears": 3},
            "data.options had the key 'pears'; mqar takes train, validation, test, vocabulary, seed",
        ),
        ("mqar", {"vocabulary": 7}, "mqar refuses: vocabulary was 7"),
    ],
)
def test_bad_tasks(name: str, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_task(name, options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"source": "task"}}, "data.task was None; with data.source 'task' it must name a task"),
        ({"data": {"task": "mqar"}}, "data.task was 'mqar'; with data.source 'stdlib' it must be null"),
        ({"data": {"options": {"seed": 1}}}, "data.options was .* must be empty without data.task"),
    ],
)
def test_bad_keys(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_config({"name": "x", "model": {"vocab_size": 8, "dim": 8, "layers": 1, "mixer": "attention"}, **changes})


def test_a_task_is_no_corpus_of_text() -> None:
    with pytest.raises(DataError, match="data.task was 'mqar'; it must be null where text is wanted"):
        prepare(DataConfig(source="task", task="mqar"))


def test_examples_that_do_not_fit_are_refused() -> None:
    split = ExampleSplit("train", GROUPS)
    with pytest.raises(DataError, match="train.seq_len was 5; it must be at least 6, the longest train example"):
        split.windows(5)
    with pytest.raises(DataError, match="train.batch_size was 8; it must be at most 7, the examples of b"):
        split.batches(batch_size=8, seq_len=6)
    with pytest.raises(DataError, match="the validation split of the task is empty"):
        ExampleSplit("validation", [])


ECHO = """
import torch
from palimpsest.train.examples import Group, Task

def task(vocabulary=16, never=False):
    def read(start, some):
        tokens = (torch.arange(8) * 5 + torch.arange(start, start + some)[:, None] * 3) % vocabulary
        labels = (tokens + 1) % vocabulary
        labels[:, ::2] = -100
        return tokens, labels
    groups = [Group("echo", 8, 48, read)]
    def wrong(start, some):
        tokens, labels = read(start, some)
        return tokens, torch.where(labels < 0, labels, (labels + 1) % vocabulary)
    held = [Group("echo", 8, 20, read), Group("never", 8, 10, wrong)] if never else groups
    return Task("echo", vocabulary, groups, held, groups)
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """A run of a task of one's own: to every other token the answer is the next number."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "echo.py").write_text(ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"batch_size": 16, "seq_len": 8, "lr": 2e-2, "device": "cpu", "warmup_steps": 0, "threads": 1}

    def make(**changes):
        return read_config(
            {
                "name": "echo",
                "model": {"vocab_size": 16, "dim": 16, "layers": 1, "mixer": {"kind": "attention", "heads": 1}},
                "data": {"source": "task", "task": "own.echo"},
                "train": {"out": str(tmp_path / "run"), "tensorboard": False, **settings, **changes},
            }
        )

    yield make
    for name in ("own", "own.echo"):
        sys.modules.pop(name, None)


def test_a_run_learns_a_task_and_says_how_much_is_right(echo, tmp_path) -> None:
    train(echo(steps=60, validate_every=30))
    first, last = (record for record in read_metrics(tmp_path / "run") if "validation_loss" in record)
    assert first["validation_accuracy"] <= last["validation_accuracy"] and last["validation_accuracy"] > 0.95
    assert last["validation_loss"] < first["validation_loss"] and "validation_bits_per_byte" not in last


def test_validation_tells_each_group_apart(echo, tmp_path) -> None:
    config = echo(steps=60, validate_every=30)
    config = config.model_copy(update={"data": config.data.model_copy(update={"options": {"never": True}})})
    train(config)
    last = read_metrics(tmp_path / "run")[-1]
    each = {name: last[f"validation_accuracy/{name}"] for name in ("echo", "never")}
    assert each["echo"] > 0.95 and each["never"] < 0.05
    assert last["validation_accuracy"] == pytest.approx((20 * each["echo"] + 10 * each["never"]) / 30, rel=1e-12)


def test_a_vocabulary_that_is_too_small_is_refused(echo) -> None:
    config = echo(steps=1)
    small = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 15})})
    with pytest.raises(ConfigError, match="was 15; it must be at least 16, the number of ids of data.task 'own.echo'"):
        train(small)


def test_options_name_a_task_in_the_checksum() -> None:
    assert TaskCorpus("mqar", {"seed": 1}).checksum != TaskCorpus("mqar", {"seed": 2}).checksum
