"""What a run learns on several processes, beside what it learns on one.

    python -m palimpsest.train.equivalence [--processes 1,2,4] [--out runs/equivalence]

The same tiny run, of the same global batches, is trained alone, and with DDP and FSDP2 (sharded over all, and in two
replicas) on each number of processes. The table says, against the run alone: the largest relative difference of the
loss of any update, and the difference of all final weights together, as a root mean square relative to the weights'.
Sums of gradients in another order of float32 are the only cause; the same way of spreading twice gives the same bits.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from .metrics import read_metrics
from .processes import live, tiny_run

STEPS = 20


def difference(folder: Path, alone: Path) -> tuple[float, float]:
    """(largest relative difference of a loss, RMS difference of the weights relative to their RMS) of two runs."""
    from safetensors.numpy import load_file

    pairs = zip(read_metrics(folder), read_metrics(alone), strict=True)
    loss = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)
    ours, theirs = load_file(folder / "model.safetensors"), load_file(alone / "model.safetensors")
    off = sum(float(((ours[name].astype("f8") - theirs[name]) ** 2).sum()) for name in theirs)
    size = sum(float((theirs[name].astype("f8") ** 2).sum()) for name in theirs)
    return loss, math.sqrt(off / size)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes; 1 is always run")
    parser.add_argument("--out", type=Path, default=Path("runs/equivalence"))
    args = parser.parse_args(words)
    config = tiny_run(args.out, steps=STEPS, checkpoint_every=0, validate_every=0)
    sizes = sorted({1, *map(int, args.processes.split(","))})
    ways = [(size, kind, "null") for size in sizes[1:] for kind in ("ddp", "fsdp")]
    ways += [(size, "fsdp", str(size // 2)) for size in sizes[1:] if size >= 4 and size % 2 == 0]
    print(
        f"| processes | spread by | loss, largest of {STEPS} updates | final weights |\n|---|---|---|---|", flush=True
    )
    for size, kind, shard in [(1, "none", "null"), *ways]:
        out = args.out / f"{size}-{kind}-{shard}"
        words = [str(config), f"train.parallel={kind}", f"train.fsdp_shard={shard}", f"train.out={out}"]
        life = live(words, size, args.out / "log")
        if any(life.codes):
            print(life.output, file=sys.stderr)
            return 1
        if size == 1:
            continue
        loss, weights = difference(out, args.out / "1-none-null")
        name = {"none": "nothing", "ddp": "DDP", "fsdp": "FSDP2"}[kind]
        name += "" if shard == "null" else f", {size // int(shard)} replicas of {shard} shards"
        print(f"| {size} | {name} | {loss:.1e} | {weights:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
