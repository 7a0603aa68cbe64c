"""A pool of processes: what is done is skipped, what fails is started once more; Ctrl-C or SIGTERM stops all in good
order, and a kill takes the processes with it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .live import Table, clock

ATTEMPTS = 2


@dataclass
class Job:
    """A command that leaves ``result`` behind; what it prints goes to ``log``, how it gets on (of ``steps``) is read
    from ``metrics``."""

    label: str
    command: list[str]
    result: Path
    log: Path
    metrics: Path | None = None
    steps: int = 0
    attempts: int = 0
    slot: int = 0
    since: float = field(default=0.0, compare=False)


def end_with_parent() -> None:
    """In a job: end as by SIGTERM when the sweep that started it is gone, however that ended.

    Its end of the pipe that is this process's standard input then closes.
    """

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock the interpreter would want at its end
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _start(job: Job, threads: int, devices: Sequence[str]) -> subprocess.Popen:
    job.attempts, job.since = job.attempts + 1, time.monotonic()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    gpu = {"CUDA_VISIBLE_DEVICES": devices[job.slot % len(devices)]} if devices else {}
    # A process group of its own: Ctrl-C in the terminal reaches this process, which then asks each child in turn.
    with job.log.open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | gpu,
            start_new_session=True,
        )


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")


def sweep(
    jobs: Sequence[Job], at_once: int, poll: float = 0.2, devices: Sequence[str] = (), table: Table | None = None
) -> list[str]:
    """Run all jobs, ``at_once`` at a time; the labels of those that failed twice, with their last words.

    ``devices``: the GPUs, by the names that CUDA_VISIBLE_DEVICES takes; each job sees one, the one used least.

    Raises:
        KeyboardInterrupt: after the children have been asked to stop and have stopped.
    """
    left = [job for job in jobs if not job.result.exists()]
    done, whole, began = len(jobs) - len(left), len(jobs), time.monotonic()
    table = table or Table()
    where = f" on {len(devices)} GPU{'s' if len(devices) > 1 else ''}" if devices else ""
    table.say(f"{whole} runs, {done} of them done before, {at_once} at a time{where}")
    threads = max(1, (os.cpu_count() or 1) // at_once)
    running: dict[subprocess.Popen, Job] = {}
    failed = []
    former = signal.signal(signal.SIGTERM, _stop)
    try:
        while left or running:
            while left and len(running) < at_once:
                job = left.pop(0)
                job.slot = min(set(range(at_once)) - {other.slot for other in running.values()})
                running[_start(job, threads, devices)] = job
            time.sleep(poll)
            for child in [child for child in running if child.poll() is not None]:
                job = running.pop(child)
                if child.stdin is not None:
                    child.stdin.close()
                if child.returncode == 0 and job.result.exists():
                    done += 1
                    table.say(f"[{done}/{whole}] {job.label}: {time.monotonic() - job.since:.0f} s")
                elif job.attempts < ATTEMPTS:
                    table.say(f"{job.label}: exit code {child.returncode}, started again ({job.log})")
                    left.append(job)
                else:
                    failed.append(f"{job.label}: exit code {child.returncode}: {_last_line(job.log)} ({job.log})")
            passed = clock(time.monotonic() - began)
            table.show(list(running.values()), f"{done} of {whole} done, {len(failed)} failed, {passed}")
    except KeyboardInterrupt:
        print("stopping; the same command goes on from here", file=sys.stderr, flush=True)
        raise
    finally:
        table.clear()
        signal.signal(signal.SIGTERM, former)
        for child in running:
            child.send_signal(signal.SIGTERM)
        for child in running:
            child.wait()
    return failed
