"""What the loop costs beside the model: its updates, and bare ones of the same model, in turns in one process.

    python -m palimpsest.train.overhead configs/tiny/titans_mag.yaml [--steps 40] [--batch 4] [--length 256]

A bare update is forward, backward and the optimizer's step on tokens that are already there. An update of the loop is
all that ``palimpsest-train`` does from one batch to the next: reading it, seeding, clipping, judging the loss, the
update, metrics and progress at their default intervals. Each follows a bare one, so that both meet the same machine;
the ratio is bare time / loop time, and its median over the pairs is what is told: by the clock, and by the processor
time of this process, which other work on the machine disturbs less.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import launch, optim, parallel
from .checkpoint import Checkpointer
from .config import read_config
from .interrupt import Interrupt
from .loop import Run
from .metrics import MetricLog, Progress
from .processes import tiny_run
from .split import Batch

WARMUP = 5
Times = tuple[float, float]  # by the clock, and of the processor: seconds


class Timed(Run):
    """A run that makes a bare update before each of its own, and times both."""

    bare: Callable[[], None]
    pairs: list[tuple[Times, Times]]
    since: Times | None = None
    taken: Times

    def fetch(self, step: int) -> tuple[list[Batch], int, bool]:
        """The loop asks for its next batch, so its last update is over."""
        self.turn()
        return super().fetch(step)

    def turn(self) -> None:
        """Note the loop's last update, and make the next bare one."""
        if self.since is not None:
            self.pairs.append((self.taken, _passed(self.since)))
        begin = _now()
        self.bare()
        self.taken, self.since = _passed(begin), _now()


def _now() -> Times:
    return time.perf_counter(), time.process_time()


def _passed(since: Times) -> Times:
    clock, processor = _now()
    return clock - since[0], processor - since[1]


def bare_update(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    """Forward, backward and the optimizer's step."""
    optimizer.zero_grad()
    model(tokens[:, :-1], targets=tokens[:, 1:].contiguous()).loss.backward()
    optimizer.step()


def measure(preset: str, steps: int, batch: int, length: int) -> dict[str, float]:
    """Times of bare updates and of the loop's.

    Returns:
        bare and loop, median seconds of an update; ratio, the median of bare / loop; low and high, its quartiles;
        processor, that median by processor time.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = read_config(tiny_run(Path(folder))).data.model_dump()
        settings: dict[str, Any] = {"steps": WARMUP + steps, "warmup_steps": 5, "batch_size": batch, "seq_len": length}
        settings |= {"validate_every": 0, "diagnostics_every": 0, "checkpoint_every": 0, "tensorboard": False}
        settings |= {"device": "cpu", "out": folder}
        config = read_config(preset, {"data": data, **{f"train.{key}": value for key, value in settings.items()}})
        world = parallel.start("cpu")
        launch.keep_freed_memory()
        corpus = launch.corpus(config, world)
        twin, *_, twins = launch.model(config, world)
        optim.set_learning_rate(twins, 1e-5)
        core, model, optimizer = launch.model(config, world)
        tokens = torch.randint(config.model.vocab_size, (batch, length + 1))
        saver, metrics = Checkpointer(folder), MetricLog(Path(folder), 0, tensorboard=False)
        with Interrupt() as interrupt, Progress(WARMUP + steps, 0, silent=True) as progress:
            run = Timed(
                config, world, Path(folder), core, model, optimizer, corpus, saver, metrics, progress, interrupt
            )
            run.pairs, run.bare = [], lambda: bare_update(twin, twins, tokens)
            run.loop()
            run.turn()
        metrics.close()
    pairs = run.pairs[WARMUP:]
    low, middle, high = statistics.quantiles([bare[0] / loop[0] for bare, loop in pairs], n=4)
    bare, loop = (statistics.median(times[0] for times in side) for side in zip(*pairs, strict=True))
    processor = statistics.median(bare[1] / loop[1] for bare, loop in pairs)
    return {"bare": bare, "loop": loop, "ratio": middle, "low": low, "high": high, "processor": processor}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    for preset in args.presets:
        row = measure(preset, args.steps, args.batch, args.length)
        times = f"bare {1e3 * row['bare']:.1f} ms, loop {1e3 * row['loop']:.1f} ms"
        ratio = f"bare / loop {row['ratio']:.3f} (quartiles {row['low']:.3f} to {row['high']:.3f})"
        ratio += f", by processor time {row['processor']:.3f}"
        print(f"{preset}: {args.batch} × {args.length} tokens, {args.steps} pairs: {times}, {ratio}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
