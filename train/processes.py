"""A tiny run and the processes that it runs in: forked, so that they start in no time, and killed as any process is.

For commands that run training over and over (``palimpsest.train.stress``, ``palimpsest.train.equivalence``). The parent
imports everything once and computes nothing with torch itself, whose threads would not survive a fork.
"""

import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch._dynamo
import torch.distributed.fsdp  # noqa: F401  (imported before the forks, like what a run imports when it begins)
import yaml

from .__main__ import main as train_main

MODEL = {
    "vocab_size": 256,
    "dim": 16,
    "layers": 2,
    "mixer": [
        {"kind": "window_attention", "heads": 2, "window": 8},
        {"kind": "titans_mag", "heads": 2, "window": 8, "persistent": 2, "memory": {"heads": 2, "chunk_size": 8}},
    ],
}
TRAIN: dict[str, Any] = {
    "batch_size": 4,
    "seq_len": 16,
    "warmup_steps": 5,
    "lr": 0.01,
    "log_every": 1,
    "diagnostics_every": 0,
}
TRAIN |= {"threads": 1, "tensorboard": False, "device": "cpu"}
TIMES = ("tokens_per_second", "mfu", "peak_memory")
"""What a record says of a run's speed, which no two runs share."""


@dataclass
class Life:
    """How the processes of one start ended: their exit codes, what they printed, and after how many seconds."""

    codes: list[int]
    output: str
    seconds: float


def tiny_run(folder: Path, **train: Any) -> Path:
    """A config of a model of dim 16 on random words, in ``folder``; returns its path.

    What an earlier call and its runs left there is removed.

    Raises:
        FileExistsError: for a folder with anything else in it.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "tiny.yaml").is_file():
            raise FileExistsError(f"{folder} has other things in it; choose a new folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    for number in range(8):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=600)), encoding="utf-8")
    data = {"source": "text", "path": str(folder / "*.txt"), "folder": str(folder / "tokens")}
    content = {"name": "tiny", "seed": 1, "model": MODEL, "data": data | {"validation_fraction": 0.2}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content | {"train": TRAIN | train}), encoding="utf-8")
    return path


def live(arguments: Sequence[str], processes: int, log: Path, kill: tuple[float, int] | None = None) -> Life:
    """Run ``palimpsest-train`` with these arguments in so many processes, to the end or to a kill.

    Args:
        kill: (seconds from the start, rank): SIGKILL to that process then; to the others as soon as it is seen, as
            ``torchrun`` does.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log.unlink(missing_ok=True)
    begin = time.monotonic()
    running = {_fork(arguments, rank, processes, port, log): rank for rank in range(processes)}
    codes = [0] * processes
    while running:
        for pid, rank in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            elif kill is None or time.monotonic() - begin < kill[0]:
                continue
            elif rank == kill[1] or -signal.SIGKILL in codes:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return Life(codes, log.read_text(encoding="utf-8") if log.exists() else "", time.monotonic() - begin)


def _fork(arguments: Sequence[str], rank: int, processes: int, port: int, log: Path) -> int:
    """One training process of its own; its output is appended to the log."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if processes > 1:
            size = str(processes)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = train_main(list(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
