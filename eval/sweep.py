"""A pool of processes: what is done is skipped, what fails is started once more; Ctrl-C or SIGTERM stops all in good
order."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ATTEMPTS = 2


@dataclass
class Job:
    """A command that leaves ``result`` behind; what it prints goes to ``log``."""

    label: str
    command: list[str]
    result: Path
    log: Path
    attempts: int = 0
    since: float = field(default=0.0, compare=False)


def _start(job: Job, threads: int) -> subprocess.Popen:
    job.attempts, job.since = job.attempts + 1, time.monotonic()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # A process group of its own: Ctrl-C in the terminal reaches this process, which then asks each child in turn.
    with job.log.open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
        )


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")


def sweep(jobs: Sequence[Job], at_once: int, poll: float = 0.2) -> list[str]:
    """Run all jobs, ``at_once`` at a time; the labels of those that failed twice, with their last words.

    Raises:
        KeyboardInterrupt: after the children have been asked to stop and have stopped.
    """
    left = [job for job in jobs if not job.result.exists()]
    done, whole = len(jobs) - len(left), len(jobs)
    print(f"{whole} runs, {done} of them done before, {at_once} at a time", flush=True)
    threads = max(1, (os.cpu_count() or 1) // at_once)
    running: dict[subprocess.Popen, Job] = {}
    failed = []
    former = signal.signal(signal.SIGTERM, _stop)
    try:
        while left or running:
            while left and len(running) < at_once:
                job = left.pop(0)
                running[_start(job, threads)] = job
            time.sleep(poll)
            for child in [child for child in running if child.poll() is not None]:
                job = running.pop(child)
                if child.returncode == 0 and job.result.exists():
                    done += 1
                    print(f"[{done}/{whole}] {job.label}: {time.monotonic() - job.since:.0f} s", flush=True)
                elif job.attempts < ATTEMPTS:
                    print(f"{job.label}: exit code {child.returncode}, started again ({job.log})", flush=True)
                    left.append(job)
                else:
                    failed.append(f"{job.label}: exit code {child.returncode}: {_last_line(job.log)} ({job.log})")
    except KeyboardInterrupt:
        print("stopping; the same command goes on from here", file=sys.stderr, flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, former)
        for child in running:
            child.send_signal(signal.SIGTERM)
        for child in running:
            child.wait()
    return failed
