"""What the tests of training share: a tiny config, a runner of training processes, and what a run learnt."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from palimpsest.train import read_metrics

SERVER = Path(__file__).parent / "train" / "train_server.py"
MODEL = {
    "vocab_size": 256,
    "dim": 16,
    "layers": 2,
    "mixer": [
        {"kind": "window_attention", "heads": 2, "window": 8},
        {"kind": "titans_mag", "heads": 2, "window": 8, "persistent": 2, "memory": {"heads": 2, "chunk_size": 8}},
    ],
}
STEPS = 16
TRAIN = {
    "steps": STEPS,
    "batch_size": 4,
    "seq_len": 16,
    "warmup_steps": 3,
    "lr": 0.01,
    "log_every": 1,
    "diagnostics_every": 5,
    "validate_every": 6,
    "validation_batches": 2,
    "checkpoint_every": 3,
    "threads": 1,
    "tensorboard": False,
    "device": "cpu",
}


@dataclass
class Result:
    """How the processes of one call ended."""

    codes: list[int]
    output: str
    seconds: float


class Runner:
    """Runs ``python -m palimpsest.train`` as forked processes; see train_server.py."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        pipe = subprocess.PIPE
        self.server = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=pipe, stdout=pipe, text=True, env=environment, cwd=folder
        )

    def __call__(
        self,
        *arguments: str,
        processes: int = 1,
        signal: int | None = None,
        after: float = 0.0,
        when: str = "",
        prelude: str = "",
        cwd: Path | None = None,
    ) -> Result:
        """Run to the end; ``signal`` is sent to all after so many seconds and ``when`` that text has been printed."""
        self.count += 1
        log = self.folder / f"log-{self.count}"
        order = {
            "arguments": [str(argument) for argument in arguments],
            "processes": processes,
            "signal": signal,
            "after": after,
            "when": when,
            "prelude": prelude,
            "log": str(log),
            "cwd": str(cwd or self.folder),
        }
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return Result(answer["codes"], log.read_text() if log.exists() else "", answer["seconds"])

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=30)


CHECK = """
import json, torch
from palimpsest.train import parallel
from palimpsest.train.sequence import check
parallel.start("cpu")
found = {ways}
if rank == 0:
    plain = {{way: {{name: vars(x) for name, x in each.items()}} for way, each in found.items()}}
    json.dump(plain, open(r"{path}", "w"))
raise SystemExit(0)
"""


def cases(names: list[str]) -> str:
    """The text of some of the check's cases, for :func:`checked`."""
    return f"{{name: check.CASES[name] for name in {names}}}"


def checked(run: Runner, folder: Path, ways: dict[str, str]) -> dict:
    """Results by way and mixer of ``palimpsest.train.sequence.check.work``, called in four processes: a way is the text
    of its arguments."""
    path = folder / "found.json"
    calls = ", ".join(f"{way!r}: check.work({arguments})" for way, arguments in ways.items())
    result = run(processes=4, prelude=CHECK.format(ways="{" + calls + "}", path=path))
    assert result.codes == [0] * 4, result.output
    return json.loads(path.read_text())


TIMES = ("tokens_per_second", "mfu", "peak_memory")


def learnt(folder: Path) -> list[dict]:
    """What metrics.jsonl says, apart from how fast it was."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read_metrics(folder)]
