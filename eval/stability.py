"""Does every preset train, whatever its chunks and its depth? A thousand updates of each.

    python -m palimpsest.eval.stability --out runs/stability

Each preset of a size as it is, with chunks of every size that is asked for, and with every depth, one of the two
changed at a time. What a preset has none of is a dash: no memory; or one of a single matrix, or gated, which has no
other depth. Of several memories in a preset all are changed, but for the chunks of TNT's local one, which stay short.
Depth 1 is a linear memory with the other's LayerNorm and residual.

A run whose loss or gradient is once not finite has failed: ``train.max_bad_steps=1``. The same command goes on where it
was stopped; ``--done stability.json`` counts what another machine or day has finished as done. Results:
``stability.json`` and ``stability.md`` in the folder.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ..models.config import parse_override
from ..train import read_config, read_metrics
from . import presets, record
from .ablate import Ablation, Planned, job, plan
from .harness import reported
from .report import number, table
from .sweep import sweep

CHUNKS = (16, 64, 256)
DEPTHS = (1, 2, 3, 4)
OWN = "as it is"


def memories(section: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every neural memory in a part of a resolved config, and the key it stands under."""
    if isinstance(section, dict):
        if "network" in section:
            yield key, section
        for name, value in section.items():
            yield from memories(value, name)
    elif isinstance(section, list):
        for value in section:
            yield from memories(value, key)


def chunked(key: str, memory: Mapping[str, Any], size: int) -> dict[str, Any]:
    """What gives a memory other chunks."""
    return {} if key == "local" else {"chunk_size": size}


def deeper(key: str, memory: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """What makes an mlp's memory one of another depth."""
    if memory["network"] != "mlp" or depth == (memory["depth"] or 2):
        return {}
    kept = {name: True if memory[name] is None else memory[name] for name in ("norm", "residual")}
    return {"network": "linear", "depth": None, **kept} if depth == 1 else {"depth": depth}


def length_of(variant: Any, least: int) -> int:
    """Tokens of a sequence: a chunk and a half of the longest at least, so that one is read that another wrote."""
    return max([least, *(3 * memory["chunk_size"] // 2 for key, memory in memories(variant) if key != "local")])


def changed(mixer: Any, change: Callable[[str, Mapping[str, Any], int], dict[str, Any]], to: int) -> dict[str, Any]:
    """The key of a config that changes each of its memories; {} when none changes."""
    copy = deepcopy(mixer)
    for key, memory in memories(copy):
        memory.update(change(key, memory, to))
    return {} if copy == mixer else {"model.mixer": copy}


def variants(mixer: Any, chunks: Sequence[int], depths: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What there is of a preset's mixer: its name in the table, and the key that differs from the preset."""
    found = [memory for _, memory in memories(mixer)]
    made: dict[str, dict[str, Any]] = {OWN: {}}
    if found:
        made |= {f"chunk {size}": changed(mixer, chunked, size) for size in chunks}
    if any(memory["network"] == "mlp" for memory in found):
        made |= {f"depth {depth}": changed(mixer, deeper, depth) for depth in depths}
    return made


def planned(args: argparse.Namespace) -> list[tuple[str, str, Planned]]:
    """Preset, variant and run of everything there is to do; variants that are one another share a run.

    Raises:
        ConfigError: for a preset that cannot be so changed.
        ValueError: for a preset that is none, or a size that has none.
    """
    known = presets.names(args.size)
    chosen = args.presets or known
    for name in chosen:
        if name not in known:
            raise ValueError(f"--presets had {name!r}; it must be of {', '.join(known)}")
    told = []
    for name in chosen:
        base = f"{args.size}/{name}"
        own = read_config(base).plain()["model"]["mixer"]
        for variant, changes in variants(own, args.chunks, args.depths).items():
            if args.changed and not changes:
                continue
            length = length_of(changes.get("model.mixer", own), args.length)
            told.append((name, variant, {"base": base, "train.seq_len": length, **changes}))
    train = {
        "steps": args.steps,
        "batch_size": args.batch,
        "warmup_steps": min(50, args.steps),
        "max_bad_steps": 1,
        "validate_every": args.steps,
        "validation_batches": 16,
        "checkpoint_every": args.steps,
        "diagnostics_every": args.steps,
        "tensorboard": False,
        "threads": 1,
    }
    ablation = Ablation(
        name="stability",
        set={**{f"train.{key}": value for key, value in train.items()}, **dict(map(parse_override, args.set))},
        arms={f"{name}, {variant}": changes for name, variant, changes in told},
        seeds=[0],
    )
    runs = plan(ablation, args.out)
    return [(name, variant, run) for (name, variant, _), run in zip(told, runs, strict=True)]


def outcome_of(run: Planned) -> dict[str, Any]:
    """How far a run came, its last held-out loss and the largest gradient norm of its updates that were logged."""
    steps = validation = 0.0
    norms: list[float] = []
    for line in read_metrics(run.folder) if (run.folder / "metrics.jsonl").exists() else ():
        steps = max(steps, line["step"])
        norms += [line["grad_norm"]] if line.get("grad_norm") is not None else []
        validation = line.get("validation_loss", validation)
    finite = bool(norms) and all(map(math.isfinite, norms))
    return {
        "finished": record.result_of(run.folder, None).exists(),
        "finite": finite,
        "steps": int(steps),
        "validation_loss": validation or None,
        "largest_grad_norm": max(norms) if finite else None,
    }


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a command have alike."""
    return {key: getattr(args, key) for key in ("size", "steps", "batch", "length", "set")}


def done_elsewhere(args: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of the runs that ``--done`` says are finished, by (preset, variant).

    Raises:
        ValueError: for a file that is no stability.json, or whose runs were made under other conditions.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in args.done:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            then, found = content["conditions"], content["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--done was {path}; it must be a stability.json: {error!r}") from None
        if then != conditions(args):
            raise ValueError(f"--done was {path}, whose runs were of {then}; they must be of {conditions(args)}")
        rows |= {(row["preset"], row["variant"]): row for row in found if row["finished"]}
    return rows


def cell(found: Mapping[str, Any] | None) -> str:
    """A variant in the table."""
    if found is None:
        return "–"
    if not found["finite"] and found["steps"]:
        return f"**not finite at {found['steps']}**"
    if not found["finished"]:
        return "not done"
    return f"{number(found['validation_loss'], 2)} ({number(found['largest_grad_norm'], 1)})"


def page(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace, how: str) -> str:
    """The table in Markdown."""
    titles = [
        *([] if args.changed else [OWN]),
        *(f"chunk {size}" for size in args.chunks),
        *(f"depth {depth}" for depth in args.depths),
    ]
    by = {(row["preset"], row["variant"]): row for row in rows}
    names = list(dict.fromkeys(row["preset"] for row in rows))
    cells = [[name, *(cell(by.get((name, title))) for title in titles)] for name in names]
    good = len({row["folder"] for row in rows if row["finished"]})
    runs = len({row["folder"] for row in rows})
    return "\n\n".join(
        [
            f"{good} of {runs} runs trained {args.steps} updates of {args.batch} × {args.length} bytes of Python "
            f"source (of a chunk and a half where that is more), every loss and every gradient finite. Held-out loss "
            f"in nats a byte; in brackets the largest norm of the gradient, before it is clipped, of the updates that "
            f"were logged. Seed 0.",
            table(["preset", *titles], cells),
            how,
        ]
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "palimpsest-stability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=Path("runs", "stability"), help="folder of the runs and the results")
    made.add_argument("--size", default="tiny", help="a folder of configs/")
    made.add_argument("--presets", nargs="+", help="some of its presets (default: all)")
    made.add_argument("--chunks", type=int, nargs="*", default=list(CHUNKS), help="chunk sizes")
    made.add_argument("--depths", type=int, nargs="*", default=list(DEPTHS), help="numbers of layers of mlp memories")
    made.add_argument("--changed", action="store_true", help="leave out the presets as they are")
    made.add_argument("--steps", type=int, default=1000, help="updates of a run")
    made.add_argument("--batch", type=int, default=1, help="sequences an update")
    made.add_argument("--length", type=int, default=256, help="tokens of a sequence, if a chunk and a half are no more")
    made.add_argument("--jobs", type=int, default=record.cores(), help="runs at a time")
    made.add_argument("--set", action="append", default=[], metavar="key=value", help="for all runs: data.source=text")
    made.add_argument(
        "--done", type=Path, action="append", default=[], help="a stability.json whose runs count as done"
    )
    made.add_argument("--report", action="store_true", help="train nothing: report what is done")
    return made


def check(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Train what is not done yet, write and print the results; 1 while a run has not come to its end."""
    entries, done = planned(args), done_elsewhere(args)
    jobs = {run.folder: job(run, None) for name, variant, run in entries if (name, variant) not in done}
    failed = [] if args.report else sweep(list(jobs.values()), args.jobs)
    rows = [
        done.get((name, variant)) or {"preset": name, "variant": variant, "folder": run.folder.name, **outcome_of(run)}
        for name, variant, run in entries
    ]
    about = record.provenance(torch.device("cpu"), 0.0)
    about["command"] = shlex.join(["python", "-m", "palimpsest.eval.stability", *command])
    how = (
        f"`{about['command']}`; {about['machine']['cpu']}, Python {about['versions']['python']}, torch "
        f"{about['versions']['torch']}, {about['date'][:10]}."
    )
    content = page(rows, args, how)
    record.write_json(args.out / "stability.json", {**about, "conditions": conditions(args), "rows": rows})
    record.write_text(args.out / "stability.md", content + "\n")
    print(content)
    for label in failed:
        print(f"failed: {label}", file=sys.stderr)
    return 0 if all(row["finite"] and row["finished"] for row in rows) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every run came to its end and was finite, 1 when one did not, 2 for bad input."""
    args = parser().parse_args(argv)
    code = 0
    with reported() as outcome:
        code = check(args, sys.argv[1:] if argv is None else argv)
    return outcome.code or code


if __name__ == "__main__":
    raise SystemExit(main())
