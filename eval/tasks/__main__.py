"""What tasks there are, and what one of them asks.

    python -m palimpsest.eval.tasks
    python -m palimpsest.eval.tasks NAME [key=value ...]

Without a name, all tasks with a line each. With one: its text, the groups of its splits, and an example; keys are those
of ``data.options``, ``python -m palimpsest.eval.tasks mad kind=fuzzy_recall``. Beside each group stand the examples
that this machine makes of it in a second, on one core.
"""

import argparse
import importlib
import inspect
import sys
import time
from collections.abc import Sequence

import torch

from ...models.config import ConfigError, parse_override
from ...train.examples import IGNORE, Group, Task, open_task
from ..choose import TEXT, check_tasks, names

SHOWN = 40  # tokens of an example
PROBE = 0.2  # seconds for which generation is timed


def summary(name: str) -> str:
    """The first sentence of a task's text."""
    text = inspect.cleandoc(importlib.import_module(f"{__package__}.{name}").__doc__ or "")
    return " ".join(text.split("\n\n")[0].split())


def speed(group: Group) -> float:
    """Examples per second, of a batch that grows until it takes long enough to be timed, or is the whole group."""
    count = 1
    while True:
        began = time.perf_counter()
        group.read(0, count)
        took = time.perf_counter() - began
        if took > PROBE or count == group.count:
            return count / took
        count = min(4 * count, group.count)


def example(group: Group) -> list[str]:
    """The end of a group's first example, where something is asked: tokens and labels below each other."""
    tokens, labels = (part[0] for part in group.read(0, 1))
    stop = int((labels != IGNORE).nonzero().max()) + 1
    begin = max(0, stop - SHOWN)
    rows = [[str(x) if x != IGNORE else "-" for x in part[begin:stop].tolist()] for part in (tokens, labels)]
    width = max(len(x) for row in rows for x in row)
    shown = [" ".join(x.rjust(width) for x in row) for row in rows]
    cut = f" (tokens {begin} to {stop - 1} of {group.length})" if stop - begin < group.length else ""
    return [f"the first example of {group.name}{cut}", f"  tokens {shown[0]}", f"  labels {shown[1]}"]


def describe(task: Task) -> list[str]:
    """The vocabulary, groups and an example of a task."""
    lines = [f"{task.vocab_size} tokens", "", "split       group             length  examples  labels  examples/s"]
    for split, groups in (("train", task.train), ("validation", task.validation), ("test", task.test)):
        for group in groups:
            asked = int((group.read(0, 1)[1] != IGNORE).sum())
            lines.append(
                f"{split:<11} {group.name:<16} {group.length:>7,} {group.count:>9,} {asked:>7,} {speed(group):>11,.0f}"
            )
    return [*lines, "", *example([*task.test, *task.train][0])]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = inspect.cleandoc(__doc__ or "").split("\n\n")
    made = argparse.ArgumentParser("python -m palimpsest.eval.tasks", description=text[0], epilog=text[2])
    made.add_argument("task", nargs="?", metavar="NAME", help="a task; without one, all are listed")
    made.add_argument("options", nargs="*", metavar="key=value", help="options of the task")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    told = parser().parse_args(arguments)
    torch.set_num_threads(1)
    if told.task is None:
        for name in names():
            print(f"{name:<18} {summary(name)}")
        return 0
    try:
        check_tasks([told.task])
        if told.task in TEXT:
            if told.options:
                raise ValueError(f"{told.task} is about text; its options are those of palimpsest.eval --set")
            print(inspect.cleandoc(TEXT[told.task].__doc__ or ""))
            return 0
        task = open_task(told.task, dict(parse_override(item) for item in told.options))
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(inspect.cleandoc(importlib.import_module(f"{__package__}.{told.task}").__doc__ or ""), end="\n\n")
    print("\n".join(describe(task)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
