"""Kills training at random moments and starts it again, until it has been killed often, and compares what was learnt.

    python -m palimpsest.train.stress [--kills 50] [--processes 1,2] [--out runs/stress]

A tiny model is trained alone and in two processes with FSDP2, each with checkpoints that the loop writes and with
checkpoints that a thread writes. Of each way a run that nobody disturbs comes first; then runs whose processes get
SIGKILL at a moment drawn evenly over the length of such a run (one process at random, the others when it is seen).
Checked after every kill: the run goes on from the newest whole checkpoint that was there. Checked at every end: the
weights are the undisturbed run's bit for bit, and so is every number in metrics.jsonl but for speeds.

Exit code 0 when all of it held, else 1.
"""

import argparse
import random
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import Checkpointer, damages, step_of
from .metrics import read_metrics
from .processes import TIMES, Life, live, tiny_run

EVERY = 5
AGAIN, TOLD = re.compile(r"going on after step (\d+)"), re.compile(r"^step (\d+)/", re.MULTILINE)


@dataclass
class Tally:
    """What happened to the runs of one way of training."""

    way: str
    kills: int = 0
    ends: int = 0
    done: int = 0  # updates that were finished and told of, in all lives
    repeated: int = 0  # of these, updates that an earlier life had done
    most: int = 0  # the most that one life repeated
    faults: list[str] = field(default_factory=list)


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    whole = [path for path in Checkpointer(folder / "checkpoints").list() if not damages(path)]
    return step_of(whole[0]) if whole else 0


def learnt(folder: Path) -> tuple[bytes, list[dict[str, object]]]:
    """The final weights, as bytes, and all that metrics.jsonl says but for speeds."""
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(folder)]
    return (folder / "model.safetensors").read_bytes(), records


def torment(way: str, arguments: list[str], processes: int, kills: int, out: Path, draw: random.Random) -> Tally:
    """Kill runs ``kills`` times, and see each one to its end."""
    out.mkdir(parents=True)
    tally, log, furthest = Tally(way), out / "log", 0
    calm = live([*arguments, f"train.out={out / 'calm'}"], processes, log)
    if any(calm.codes):
        raise RuntimeError(f"the undisturbed run failed with {calm.codes}: {calm.output}")
    expected, folder = learnt(out / "calm"), out / "run"
    length = calm.seconds
    while True:
        deadly = tally.kills < kills
        kill = (draw.uniform(0, length), draw.randrange(processes)) if deadly else None
        before = newest(folder)
        life = live([*arguments, f"train.out={folder}"], processes, log, kill)
        furthest = _account(tally, life, before, furthest)
        if not any(life.codes):
            tally.ends, furthest = tally.ends + 1, 0
            if learnt(folder) != expected:
                tally.faults.append(f"the end after {tally.kills} kills is another one")
            shutil.rmtree(folder)
            if not deadly:
                return tally


def _account(tally: Tally, life: Life, before: int, furthest: int) -> int:
    """Count a life that began with a whole checkpoint of step ``before`` in a run that had come to update ``furthest``;
    returns how far it has come now."""
    if (found := AGAIN.search(life.output)) is not None and int(found[1]) != before:
        tally.faults.append(f"went on from step {found[1]}, with a whole checkpoint of step {before}")
    told = [int(step) for step in TOLD.findall(life.output)]
    repeated = sum(step <= furthest for step in told)
    tally.done, tally.repeated, tally.most = (
        tally.done + len(told),
        tally.repeated + repeated,
        max(tally.most, repeated),
    )
    if told and told[0] != before + 1:
        tally.faults.append(f"began with update {told[0]}, with a whole checkpoint of step {before}")
    if any(life.codes):
        tally.kills += 1
        if -signal.SIGKILL not in life.codes:
            tally.faults.append(f"ended by itself with {life.codes}: {life.output[-500:]}")
    return max([furthest, *told])


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all, shared evenly among the ways of training")
    parser.add_argument("--processes", default="1,2", help="numbers of processes")
    parser.add_argument("--updates", type=int, default=40, help="of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/stress"))
    args = parser.parse_args(words)
    config = tiny_run(args.out, steps=args.updates, checkpoint_every=EVERY, validate_every=20, validation_batches=2)
    ways = [(int(size), late) for size in args.processes.split(",") for late in (False, True)]
    draw, tallies = random.Random(args.seed), []
    print("| processes | checkpoints | kills | runs to the end | updates done | repeated | most at once | equal |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for number, (size, late) in enumerate(ways):
        kills = args.kills * (number + 1) // len(ways) - args.kills * number // len(ways)
        arguments = [
            str(config),
            f"train.async_checkpoint={str(late).lower()}",
            *(["train.parallel=fsdp"] if size > 1 else []),
        ]
        way = f"| {size}{', FSDP2' if size > 1 else ''} | {'by a thread' if late else 'by the loop'} |"
        tally = torment(way, arguments, size, kills, args.out / f"{size}-{late}", draw)
        tallies.append(tally)
        numbers = f"{tally.kills} | {tally.ends} | {tally.done} | {tally.repeated} | {tally.most}"
        print(f"{way} {numbers} | {'no' if tally.faults else 'yes'} |", flush=True)
        for fault in tally.faults:
            print(f"FAULT: {fault}", file=sys.stderr)
    print(f"{sum(tally.kills for tally in tallies)} kills, a checkpoint every {EVERY} of {args.updates} updates")
    return int(any(tally.faults for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
