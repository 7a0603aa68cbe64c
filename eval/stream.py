"""Reads a long text through a trained model in constant memory, and shows that it is constant.

    python -m palimpsest.eval.stream RUN [--tokens 1000000] [--chunk 1024]

The training text of the run, from its beginning, goes through the model piece by piece with its state carried along.
Every tenth of the way a line says how far it is, the loss since the last line, the size of the state, and the memory
of the process; the state and the memory after the first line must be those after the last.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.lm import stream
from ..train.data import prepare
from ..train.launch import keep_freed_memory
from . import record, report
from .harness import Run, open_run, pick_device, reported

PARTS = 10


def resident(device: torch.device) -> int:
    """Bytes of memory that the model's device holds for this process: the GPU's allocator, or resident pages."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def measure(run: Run, tokens: int, chunk: int) -> dict[str, Any]:
    """Stream ``tokens`` tokens; a record for each tenth.

    Raises:
        ValueError: when the text is shorter than that.
    """
    split = prepare(run.config.data).split("train")
    if not 2 <= tokens <= split.tokens:
        raise ValueError(f"tokens was {tokens:,}; it must lie between 2 and the {split.tokens:,} of the training text")
    text = torch.from_numpy(np.asarray(split.read(0, tokens)))[None].to(run.device)
    rows: list[dict[str, Any]] = []
    losses: list[float] = []
    counted = 0
    sizes: list[int] = []
    seen = last = 0
    began = lap = time.perf_counter()
    for loss, state in stream(run.model, text, chunk):
        losses.append(float(loss.double().nansum()))  # NaN is what a model must not be judged by
        counted += int((~loss.isnan()).sum())
        seen += loss.shape[1]
        sizes.append(state.bytes)
        if seen * PARTS >= (len(rows) + 1) * (tokens - 1):
            now = time.perf_counter()
            rows.append(
                {
                    "tokens": seen,
                    "bits_per_token": round(sum(losses) / max(counted, 1) / math.log(2), 4),
                    "state_bytes": state.bytes,
                    "process_bytes": resident(run.device),
                    "tokens_per_second": round((seen - last) / (now - lap)),
                }
            )
            print(report.table(list(rows[-1]), [[f"{x:,}" for x in rows[-1].values()]]).splitlines()[-1], flush=True)
            losses, counted, last, lap = [], 0, seen, now
    memory = [row["process_bytes"] for row in rows]
    return {
        "tokens": tokens,
        "chunk": chunk,
        "rows": rows,
        "state_bytes": {"least": min(sizes), "most": max(sizes)},
        "process_growth": round(memory[-1] / memory[0] - 1, 4),
        "text_bytes": text.nbytes,
        "median_tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
        "seconds_of_streaming": round(time.perf_counter() - began, 1),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("palimpsest.eval.stream", description=__doc__.splitlines()[0])
    made.add_argument("run", help="folder of a finished run")
    made.add_argument("--tokens", type=int, default=1_000_000)
    made.add_argument("--chunk", type=int, default=1024, help="tokens that go through the model at a time")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument("--out", help="a JSON record")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Stream, print, and write the record with ``--out``; 0 when done, 2 for bad input."""
    args = parser().parse_args(argv)
    with reported() as outcome:
        began = time.perf_counter()
        device = pick_device(args.device)
        keep_freed_memory()
        run = open_run(args.run, device)
        columns = ("tokens", "bits per token", "state bytes", "process bytes", "tokens/s")
        print(report.table(list(columns), []).splitlines()[0])
        found = measure(run, args.tokens, args.chunk)
        state = found["state_bytes"]
        print(
            f"{found['tokens']:,} tokens: the state had {state['least']:,} to {state['most']:,} bytes, "
            f"the process grew by {found['process_growth']:.1%} from the first line to the last"
        )
        if args.out:
            about = {"run": Path(args.run).name, "parameters": sum(p.numel() for p in run.model.parameters())}
            seconds = time.perf_counter() - began
            record.write_json(Path(args.out), about | found | record.provenance(device, seconds))
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
