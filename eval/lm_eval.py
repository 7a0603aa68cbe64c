"""Tasks of the lm-evaluation-harness: ``python -m palimpsest.eval.lm_eval RUN --tasks lambada_openai,hellaswag``.

It needs the extra ``lm-eval``, and the data that a task names: downloaded by the package datasets, or in its cache
(HF_HOME) from an earlier run, which HF_DATASETS_OFFLINE=1 keeps to. Tasks of one's own: ``--include FOLDER`` of YAML
files. RULER's texts (``niah_single_1`` …) are made on the spot, for each of ``--lengths``; their words come from the
packages wonderwords and nltk, and all but the first and ``niah_multikey_2`` and ``_3`` of them need essays to download.

Writes lm_eval.json into the run's folder.
"""

import argparse
import difflib
import importlib.util
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import record, report
from .harness import Run, open_run, pick_device, reported


@dataclass(frozen=True)
class Asked:
    """What to run. ``lengths``: tokens of RULER's texts; ``limit``: documents of each task (None: all); ``shots``:
    worked examples before each question (None: as the task has it); ``bootstrap``: samples behind the standard errors
    that have no formula; ``include``: a folder of further tasks; ``shipped``: also know those of the harness."""

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    batch: int = 8
    lengths: tuple[int, ...] = (4096,)
    bootstrap: int = 1000
    include: str | None = None
    shipped: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"limit": 1, "shots": 0, "bootstrap": 0}
        for name, most in least.items():
            value = getattr(self, name)
            if value is not None and value < most:
                raise ValueError(f"{name} was {value}; it must be at least {most}")
        if not self.tasks:
            raise ValueError("tasks was empty; it must name at least one")
        if min(self.lengths) < SHORTEST:
            raise ValueError(f"lengths had {min(self.lengths)}; RULER's texts must have at least {SHORTEST} tokens")


SHORTEST = 1024  # RULER's generator looks forever for a text shorter than its shortest, of some 900 bytes


def load_tasks(asked: Asked, tokenizer: str | Path) -> dict[str, Any]:
    """The tasks, with their data. ``tokenizer``: a folder from which RULER's tasks take theirs.

    Raises:
        ValueError: for an unknown task, with the nearest known one.
        FileNotFoundError: where a task's data cannot be had, saying how it can.
    """
    from lm_eval.tasks import TaskManager

    about = {"tokenizer": str(tokenizer), "max_seq_lengths": list(asked.lengths)}
    manager = TaskManager(include_path=asked.include, include_defaults=asked.shipped, metadata=about)
    for name in asked.tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"task was {name!r}; it must be one that the harness knows{hint}")
    random.seed(asked.seed)
    np.random.seed(asked.seed)
    try:
        loaded = manager.load(list(asked.tasks))
    except OSError as error:  # no connection, offline, or no such files
        raise FileNotFoundError(
            f"data of {', '.join(asked.tasks)} not found: {str(error).splitlines()[0]}; run this once with a network, "
            "or copy the cache of a machine that did (HF_HOME) and set HF_DATASETS_OFFLINE=1"
        ) from error
    for task in loaded["tasks"].values():
        if asked.shots is not None:
            task.set_config(key="num_fewshot", value=asked.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=asked.seed)
    return dict(loaded)


def evaluate(run: Run, asked: Asked) -> dict[str, Any]:
    """The record of the tasks on a run: lm_eval.json's content, with the harness' own ``results`` and ``versions``."""
    from lm_eval.evaluator import evaluate as run_tasks

    from .export import hugging_face_tokenizer
    from .lm_eval_model import RunLM

    began = time.perf_counter()
    model = RunLM(run, asked.batch)
    with tempfile.TemporaryDirectory() as folder:
        hugging_face_tokenizer(run.tokenizer).save_pretrained(folder)
        tasks = load_tasks(asked, folder)
    found = run_tasks(model, tasks, limit=asked.limit, bootstrap_iters=asked.bootstrap, log_samples=False)
    return {
        "run": str(run.folder),
        "limit": asked.limit,
        "results": found["results"],
        "task_versions": found["versions"],
        "shots": found["n-shot"],
        "documents": {name: count["effective"] for name, count in found["n-samples"].items()},
        **record.provenance(run.device, time.perf_counter() - began),
    }


def table(content: dict[str, Any]) -> str:
    """The numbers of each task, in Markdown."""
    rows = []
    for task, numbers in content["results"].items():
        for key, value in numbers.items():
            metric, _, how = key.partition(",")
            asked = isinstance(value, float | int) and value != -1  # RULER's way to say: no texts of this length
            if not asked or not how or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{how}")
            shown = report.number(error, 4) if isinstance(error, float) else report.number(None)
            rows.append([task, metric, report.number(value, 4), shown, str(content["documents"].get(task, ""))])
    return report.table(["task", "metric", "value", "std. error", "documents"], rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("palimpsest-lm-eval", description=__doc__)
    made.add_argument("run", help="run folder, with model.safetensors, config.json and config.yaml")
    made.add_argument("--tasks", required=True, help="comma-separated names of the harness' tasks, groups or tags")
    made.add_argument("--limit", type=int, help="documents of each task (default: all)")
    made.add_argument("--shots", type=int, help="worked examples before each question (default: the task's own)")
    made.add_argument("--batch", type=int, default=Asked.batch, help=f"texts side by side (default {Asked.batch})")
    made.add_argument("--lengths", default="4096", help="tokens of RULER's texts, comma-separated (default 4096)")
    made.add_argument(
        "--bootstrap", type=int, default=Asked.bootstrap, help="samples for standard errors; 0: no errors"
    )
    made.add_argument("--include", help="a folder with YAML files of further tasks")
    made.add_argument(
        "--only-include", action="store_true", help="know no tasks but these: the harness' 14,000 take 20 s"
    )
    made.add_argument("--seed", type=int, default=Asked.seed, help="of the texts that are made and examples chosen")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, write, print the table; 0 when done, 2 for bad input."""
    args = parser().parse_args(argv)
    with reported() as outcome:
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("the package lm_eval is not installed: pip install 'palimpsest[lm-eval]'")
        names = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
        lengths = tuple(int(length) for length in args.lengths.split(","))
        chosen = {"include": args.include, "shipped": not args.only_include}
        numbers = {name: getattr(args, name) for name in ("limit", "shots", "batch", "bootstrap", "seed")}
        run = open_run(args.run, pick_device(args.device))
        content = evaluate(run, Asked(names, lengths=lengths, **chosen, **numbers))
        print(table(content))
        record.write_json(run.folder / "lm_eval.json", content)
        print(run.folder / "lm_eval.json")
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())
