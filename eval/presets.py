"""All presets of a size side by side, as a page: ``docs/presets.md``.

    python -m palimpsest.eval.ablate ablations/presets_text
    python -m palimpsest.eval.presets --text runs/ablations/presets_text/results.json --out docs/presets.md

``--text``, ``--mqar`` and ``--mad`` take ``results.json`` of ablations on text, on MQAR and on MAD's skills whose arms
are named like presets; what they lack is a dash. Skills are a table of their own. Sizes and kernels are counted from
the presets themselves. Training speed is measured here, all presets in turn and ``--rounds`` times, as a ratio to the
first.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..configs import HERE
from ..models.config import load_config
from ..models.describe import describe
from ..train.throughput import measure
from . import record
from .harness import reported
from .report import number, table

FIRST = "transformer"
#: Operations that tell presets apart; norms and convolutions nearly all have.
MEMORIES = ("neural_memory", "delta_rule", "linear_attention", "window_attention", "chunk_attention", "select_chunks")
#: Titles of the columns that ablations fill, and the measure that each shows.
COLUMNS = {"text": ("Held-out loss (nats)", "validation_loss"), "mqar": ("MQAR accuracy", "mean")}
Results = Sequence[Mapping[str, Any]]


def names(size: str) -> list[str]:
    """Presets of a size, the one that speed is compared with first.

    Raises:
        ValueError: for a size that has none, or not that one.
    """
    found = sorted(path.stem for path in (HERE / size).glob("*.yaml"))
    if FIRST not in found:
        sizes = sorted(path.parent.name for path in HERE.glob(f"*/{FIRST}.yaml"))
        raise ValueError(f"size was {size!r}; it must be one of {', '.join(sizes)}")
    return [FIRST, *(name for name in found if name != FIRST)]


def path_of(kernels: Sequence[str]) -> str:
    """What a GPU runs a preset's memories and attention with, from the lines of
    :class:`palimpsest.models.describe.Description`: Triton, or plain torch and what is in the kernels' way; and GPUs
    that run plain torch where others have kernels."""
    marked = ": plain torch, for "
    reasons = {line.split(marked)[1].split(";")[0] for line in kernels if line.startswith(MEMORIES) and marked in line}
    if reasons:
        return f"plain torch: {', '.join(sorted(reasons)).replace(' was ', ' ')}"
    marked = ": Triton, but "
    others = {line.split(marked)[1] for line in kernels if line.startswith(MEMORIES) and marked in line}
    return "; ".join(["Triton", *sorted(others)])


def speeds(presets: Sequence[str], size: str, rounds: int, steps: int, batch: int, length: int) -> dict[str, float]:
    """Tokens per second of training each preset over those of the first: the median over rounds, each of which takes
    all presets in turn, so that what else the machine does falls on all alike."""
    taken: dict[str, list[float]] = {name: [] for name in presets}
    for _ in range(rounds):
        for name in presets:
            content = load_config(HERE / size / f"{name}.yaml")
            found = measure(content, torch.device("cpu"), steps, batch, length)
            taken[name].append(found["tokens_per_second"])
    first = taken[presets[0]]
    return {name: statistics.median(x / y for x, y in zip(own, first, strict=True)) for name, own in taken.items()}


def scores(results: Results, wanted: str) -> dict[str, str]:
    """Mean ± standard deviation of a measure by arm; of an arm in several ablations the first.

    Raises:
        ValueError: for results without that measure.
    """
    shown: dict[str, str] = {}
    for one in results:
        for arm in one["summary"]:
            found = arm["measures"].get(wanted)
            if found is None:
                known = ", ".join(arm["measures"])
                raise ValueError(f"results of {one['ablation']['name']!r} have {known}; they must have {wanted}")
            spread = "" if found["sd"] is None else f" ± {found['sd']:.3f}"
            shown.setdefault(arm["arm"], number(found["mean"]) + spread)
    return shown


def skill(results: Mapping[str, Any]) -> str:
    """Which of MAD's an ablation was about.

    Raises:
        ValueError: for one that was about none.
    """
    try:
        return str(results["ablation"]["set"]["data"]["options"]["kind"])
    except (KeyError, TypeError):
        raise ValueError(
            f"--mad had results of {results['ablation']['name']!r}; they must be of a skill of MAD"
        ) from None


def skills(size: str, results: Results) -> list[str]:
    """The table of MAD's skills in Markdown, a column for each, and what the ablations were."""
    names_of = list(dict.fromkeys(map(skill, results)))
    columns = [scores([one for one in results if skill(one) == name], "mean") for name in names_of]
    rows = [[preset, *(column.get(preset, "–") for column in columns)] for preset in names(size)]
    head = "Share of right answers in the skills of MAD (Poli et al., 2024):"
    return [head, table(["preset", *(name.replace("_", " ") for name in names_of)], rows), *map(told, results)]


def told(results: Mapping[str, Any]) -> str:
    """What an ablation was, and where it ran."""
    ablation, runs = results["ablation"], results["runs"]
    command = results.get("command") or f"python -m palimpsest.eval.ablate ablations/{ablation['name']}"
    minutes = sum(run["seconds"] for run in runs) / 60
    return (
        f"`{command}`: {' '.join(ablation['about'].split())} {len(runs)} runs, seeds "
        f"{', '.join(map(str, ablation['seeds']))}, {minutes:.0f} minutes of one process on {record.places(runs)}."
    )


def page(size: str, given: Mapping[str, Results], mad: Results, ratios: Mapping[str, float], how: str) -> str:
    """The page in Markdown; ``given``: results by column, ``mad``: those by skill, ``ratios``: speeds by preset,
    ``how`` they were taken."""
    columns = {key: scores(results, COLUMNS[key][1]) for key, results in given.items() if results}
    titles = ["preset", "parameters", "state bytes", "FLOPs/token", *(COLUMNS[key][0] for key in columns)]
    rows = []
    for name in names(size):
        found = describe(f"{size}/{name}")
        sizes = [f"{found.parameters:,}", f"{found.state_bytes:,}", f"{found.flops_per_token:,.0f}"]
        own = [column.get(name, "–") for column in columns.values()]
        rows.append([name, *sizes, *own, *([number(ratios[name], 2)] if ratios else []), path_of(found.kernels)])
    titles += [f"speed ({FIRST} = 1)"] if ratios else []
    parts = [
        "# Presets",
        f"Every file of `configs/{size}/` as it is. State bytes of one sequence, and FLOPs of a token's forward and "
        "backward, at its training length. Kernels: what a GPU runs its memories and attention with, and what stands "
        "in the way of Triton; sizes and kernels by `python -m palimpsest.models.describe`.",
        table([*titles, "kernels"], rows),
    ]
    parts += [f"{COLUMNS[key][0]}: {told(one)}" for key in columns for one in given[key]]
    if columns or mad:
        parts.append("Mean ± standard deviation over seeds; of several learning rates the best on validation.")
    parts += skills(size, mad) if mad else []
    return "\n\n".join([*parts, *([f"Speed: {how}"] if ratios else [])]) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "palimpsest-presets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--text", type=Path, nargs="*", default=[], help="results.json of ablations on text")
    made.add_argument("--mqar", type=Path, nargs="*", default=[], help="results.json of ablations on MQAR")
    made.add_argument("--mad", type=Path, nargs="*", default=[], help="results.json of ablations on skills of MAD")
    made.add_argument("--size", default="tiny", help="a folder of configs/")
    made.add_argument("--rounds", type=int, default=3, help="rounds of the speed measurement; 0: none")
    made.add_argument("--steps", type=int, default=5, help="timed updates of a preset a round")
    made.add_argument("--batch", type=int, default=4, help="sequences an update")
    made.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    made.add_argument("--out", type=Path, help="file to write the page to")
    return made


def read(paths: Sequence[Path]) -> Results:
    """What ablations wrote."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and print it; 2 for bad input."""
    args = parser().parse_args(argv)
    with reported() as outcome:
        given = {key: read(getattr(args, key)) for key in COLUMNS}
        mad = read(args.mad)
        measured = (args.rounds, args.steps, args.batch, args.length)
        ratios = speeds(names(args.size), args.size, *measured) if args.rounds > 0 else {}
        where = record.provenance(torch.device("cpu"), 0.0)
        how = (
            f"updates of {args.batch} × {args.length} tokens in float32 on a CPU, where all run plain torch: median of "
            f"{args.rounds} rounds of {args.steps} updates; {where['machine']['cpu']}, {where['machine']['threads']} "
            f"threads, torch {where['versions']['torch']}, {where['date'][:10]}."
        )
        content = page(args.size, given, mad, ratios, how)
        if args.out:
            record.write_text(args.out, content)
        print(content)
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())
