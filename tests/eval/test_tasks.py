"""The list of tasks, and what the command shows of one."""

import re

import pytest
import torch

from palimpsest.eval.choose import TEXT, names
from palimpsest.eval.tasks import __main__ as command
from palimpsest.train.examples import Group

MADE = {
    "associative",
    "ballet",
    "disjoint",
    "mad",
    "mqar",
    "needle",
    "permanence",
    "rapid_words",
    "regular_languages",
}


def test_all_tasks_are_listed_with_a_line_each(capsys) -> None:
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names() and {*MADE, *TEXT} <= set(names())
    assert all(re.match(r"\w+ +\S.{20,}", line) for line in lines)


def test_a_task_is_shown_with_its_groups_and_an_example(capsys) -> None:
    assert command.main(["associative", "test=[[3, 2, 40]]", "train=[[60, 2, 4]]", "validation=[]", "value=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Associative retrieval") and "19 tokens" in shown
    assert re.search(r"train +60x2 +364 +4 +2 +[\d,]+\n", shown) and re.search(r"test +3x2 +22 +40 +2 +[\d,]+\n", shown)
    tokens, labels = re.search(r"the first example of 3x2\n  tokens (.*)\n  labels (.*)\n", shown).groups()
    assert len(tokens.split()) == 22 and labels.split()[:-2] == ["-"] * 20


def test_a_long_example_is_shown_where_it_asks() -> None:
    labels = torch.full((1, 100), -100)
    labels[0, 70] = 5
    lines = command.example(Group("long", 100, 1, lambda start, count: (torch.arange(100)[None], labels)))
    assert lines[0] == "the first example of long (tokens 31 to 70 of 100)"
    assert lines[1].split()[1:] == [str(x) for x in range(31, 71)] and lines[2].split()[-1] == "5"


def test_a_text_task_says_what_it_is(capsys) -> None:
    assert command.main(["passkey"]) == 0
    assert capsys.readouterr().out.startswith(TEXT["passkey"].__doc__.splitlines()[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mqra"], "task was 'mqra'; it must be one of .*did you mean 'mqar'"),
        (["mad", "kind=recall"], "mad refuses: kind was 'recall'"),
        (["mad", "kinds=1"], "data.options had the key 'kinds'; mad takes kind, train"),
        (["needle", "gap"], "override was 'gap'; it must be key=value"),
        (["niah", "a=1"], "niah is about text"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, capsys) -> None:
    assert command.main(arguments) == 2
    assert re.search(words, capsys.readouterr().err)
