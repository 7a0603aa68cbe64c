"""Evaluate a trained run: ``python -m palimpsest.eval RUN``. Writes eval.json, eval.md and eval.png into its folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from . import report
from .choose import check_tasks, names, options
from .harness import Plan, evaluate, open_run, pick_device, reported, write
from .rechunk import at_chunk_size
from .tasks import TASKS


def parser() -> argparse.ArgumentParser:
    """The command line; what is not given is taken from the run's ``eval`` section."""
    made = argparse.ArgumentParser("palimpsest-eval", description=__doc__)
    made.add_argument("run", help="run folder, with model.safetensors, config.json and config.yaml")
    made.add_argument(
        "--tasks",
        help=f"comma-separated, of {', '.join(names())} (default {','.join(TASKS)}; of a run trained on a task, that)",
    )
    made.add_argument(
        "--set", action="append", default=[], metavar="TASK.OPTION=VALUE", help="an option of a task, e.g. mqar.seed=1"
    )
    made.add_argument("--tokenizer", help="read a model trained on a task as text of this tokenizer, e.g. bytes")
    made.add_argument("--factor", type=int, help="longest text in training contexts (default 8)")
    made.add_argument("--tokens", type=int, help="held-out tokens to read, about")
    made.add_argument("--batch", type=int, help=f"rows read side by side (default {Plan.batch})")
    made.add_argument("--examples", type=int, help=f"questions per cell (default {Plan.examples})")
    made.add_argument("--seed", type=int, help=f"of the questions (default {Plan.seed})")
    made.add_argument(
        "--chunk-size",
        type=int,
        help="ask the neural memories at this chunk size, and show the loss at that of the training beside it",
    )
    made.add_argument("--out", help="folder for the results (default: the run folder)")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, write, print the tables; 0 when done, 2 for bad input."""
    args = parser().parse_args(argv)
    with reported() as outcome:
        asked = None if args.tasks is None else check_tasks([name.strip() for name in args.tasks.split(",")])
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads was {args.threads}; it must be at least 1")
            torch.set_num_threads(args.threads)
        run = open_run(args.run, pick_device(args.device), args.tokenizer)
        own = run.config.data.task
        tasks = tuple(asked or (TASKS if own is None else (own,)))
        changed = {name: getattr(args, name) for name in ("factor", "tokens", "batch", "examples", "seed")}
        plan = Plan.of(run.config.eval, tasks=tasks, options=options(args.set, tasks), **changed)
        content = evaluate(run, plan) if args.chunk_size is None else at_chunk_size(run, plan, args.chunk_size)
        print(report.evaluation(content))
        for path in write(Path(args.out) if args.out else run.folder, content):
            print(path)
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())
