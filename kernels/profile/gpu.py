"""One command for a machine with a GPU: is everything right there, and how fast is it.

    make gpu                 or: python -m palimpsest.kernels.profile gpu [--steps conformance canaries bench training]

Steps, each in processes of its own and within its share of the time: the conformance suite's Triton cases in float32,
bfloat16 and float16; the canaries of every kernel and configuration that the plans reach; the bench at the documented
shapes; the training speed of the tiny presets. What they found goes to ``docs/results/<gpu>.json`` and a page beside
it. Run it in a checkout; it needs torch, triton, einops, pytest and pydantic, and nothing installed from here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .bench import text as bench_text
from .measure import machine

PROFILE = __package__
TRAINING = f"{PROFILE.split('.')[0]}.train.throughput"


@dataclass
class Run:
    """Where a step runs: the checkout, the device, the folder for its files, seconds left, words for the bench."""

    root: Path
    device: str
    folder: Path
    seconds: float
    processes: int
    select: str = ""
    bench: list[str] = field(default_factory=list)
    training: list[str] = field(default_factory=list)

    def start(self, words: Sequence[Any], name: str, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Start ``python WORDS``; its output goes to a file."""
        log = self.folder / f"{name}.log"
        every = {**os.environ, "PALIMPSEST_TEST_DEVICE": self.device, "PYTHONUNBUFFERED": "1", **environment}
        with log.open("wb") as file:
            command = [sys.executable, *map(str, words)]
            return subprocess.Popen(command, cwd=self.root, env=every, stdout=file, stderr=subprocess.STDOUT), log

    def finish(self, started: Sequence[tuple[subprocess.Popen[bytes], Path]]) -> list[tuple[int | None, str]]:
        """Exit status (None: out of time, and stopped) and output of each."""
        end, found = time.monotonic() + self.seconds, []
        for process, log in started:
            try:
                status: int | None = process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = None
            found.append((status, log.read_text(encoding="utf-8", errors="replace")))
        return found


def conformance(run: Run) -> dict[str, Any]:
    """The Triton cases of the conformance suite, dealt to several processes."""
    started = []
    for i in range(run.processes):
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_conformance.py"]
        words += ["-k", f"triton and ({run.select})" if run.select else "triton"]
        words += [f"--junitxml={run.folder}/tests-{i}.xml"]
        shard = {"PALIMPSEST_SHARD": f"{i}/{run.processes}", "PALIMPSEST_AUTOTUNE": "0"}
        started.append(run.start(words, f"conformance-{i}", **shard))
    done = run.finish(started)
    counts, failed = {"tests": 0, "failures": 0, "errors": 0}, []
    for i, (status, output) in enumerate(done):
        path = run.folder / f"tests-{i}.xml"
        if status is None or not path.exists():
            failed.append(f"part {i} {'ran out of time' if status is None else 'did not run'}: {output[-300:]}")
            continue
        suite = ET.parse(path).getroot().find("testsuite")
        assert suite is not None
        for name in counts:
            counts[name] += int(suite.get(name, 0))
        failed += [f"{case.get('name')}" for case in suite if len(case) and case[0].tag in ("failure", "error")]
    return {"right": not failed and counts["tests"] > 0, **counts, "failed": failed}


def canaries(run: Run) -> dict[str, Any]:
    """Every kernel, constants and configuration of the plans."""
    started = []
    for i in range(run.processes):
        words = ["-m", PROFILE, "canaries", "--shard", f"{i}/{run.processes}", "--only", run.select]
        words += ["--json", f"{run.folder}/canaries-{i}.json"]
        interpreter = {"TRITON_INTERPRET": "1"} if run.device == "cpu" else {}
        started.append(run.start(words, f"canaries-{i}", **interpreter))
    done = run.finish(started)
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    for i, (status, output) in enumerate(done):
        path = run.folder / f"canaries-{i}.json"
        whole = json.loads(path.read_text()) if path.exists() else {"canaries": [], "broken": []}
        rows += whole["canaries"]
        broken += whole["broken"]
        if status is None or (status and not whole["broken"]):
            broken.append(f"part {i} did not finish: {output[-300:]}")
    wrong = [row for row in rows if not row["passed"]]
    return {"right": bool(rows) and not broken, "configurations": len(rows), "wrong": wrong, "broken": broken}


def bench(run: Run) -> dict[str, Any]:
    """Times at the documented shapes; workloads that the time does not reach are left out, and counted."""
    path = run.folder / "bench.json"
    words = ["-m", PROFILE, "bench", "--device", run.device, "--limit", str(int(run.seconds * 0.8)), "--json", path]
    ((status, output),) = run.finish([run.start([*words, *run.bench], "bench")])
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {"right": status == 0 and bool(rows), "rows": rows, "output": "" if status == 0 else output[-2000:]}


def training(run: Run) -> dict[str, Any]:
    """Tokens per second of the tiny presets."""
    path = run.folder / "training.json"
    presets = sorted(p.relative_to(run.root) for p in (run.root / "configs" / "tiny").glob("*.yaml"))
    words = ["-m", TRAINING, *presets, "--device", run.device, "--json", path, *run.training]
    ((status, output),) = run.finish([run.start(words, "training")])
    rows = json.loads(path.read_text()) if path.exists() else {}
    return {"right": status == 0 and bool(rows), "rows": rows, "output": "" if status == 0 else output[-2000:]}


STEPS: dict[str, tuple[Callable[[Run], dict[str, Any]], float]] = {
    "conformance": (conformance, 190.0),  # at most so many seconds
    "canaries": (canaries, 140.0),
    "bench": (bench, 170.0),
    "training": (training, 60.0),
}


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    about, steps = result["machine"], result["steps"]
    lines = [
        f"# {about['gpu'] or about['cpu']}",
        "",
        f"{about['date']}: torch {about['torch']}, Triton {result['triton']}, Python {about['python']}, "
        f"{result['seconds']:.0f} s in all, by `make gpu`.",
        "",
    ]
    for name, step in steps.items():
        lines += [f"## {name}: {'right' if step['right'] else 'NOT RIGHT'}", ""]
        if name == "conformance":
            lines.append(f"{step['tests']} tests, {step['failures'] + step['errors']} failed.")
            lines += [f"- {each}" for each in step["failed"]]
        elif name == "canaries":
            lines.append(f"{step['configurations']} configurations, {len(step['wrong'])} wrong and not used.")
            lines += [f"- {row['kernel']} [{row['config']}]: {row['found']}" for row in step["wrong"]]
            lines += [f"- broken: {each}" for each in step["broken"]]
        elif name == "bench":
            groups: dict[str, list[dict[str, Any]]] = {}
            for row in step["rows"]:
                groups.setdefault(f"{row['workload']} {row['sizes']}", []).append(row)
            lines += ["```", *(bench_text(rows, about["gpu"] is not None) for rows in groups.values()), "```"]
        else:
            lines += ["| preset | parameters | tokens/s | MFU | peak memory |", "|---|---|---|---|---|"]
            for preset, row in step["rows"].items():
                mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
                peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
                speed = f"{row['tokens_per_second']:,.0f}"
                lines.append(f"| {preset} | {row['parameters']:,} | {speed} | {mfu} | {peak} |")
        lines += ["", *(["```", step["output"], "```", ""] if step.get("output") else [])]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the command out")
    parser.add_argument("--seconds", type=float, default=560.0, help="for all steps together")
    parser.add_argument("--processes", type=int, default=min(8, max(1, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--select", default="", help="only cases and plans whose name holds this")
    parser.add_argument("--bench", nargs="+", default=[], help="only workloads whose name holds one of these")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the checkout")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))


def main(args: argparse.Namespace) -> int:
    """Run the steps, write the results; 0 when all is right."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"make gpu needs a GPU that torch can use; torch {torch.__version__} sees none here")
        return 1
    if not (args.root / "tests" / "kernels" / "test_conformance.py").exists():
        print(f"make gpu needs a checkout; {args.root} has no tests/kernels/test_conformance.py")
        return 1
    import triton

    begin = time.monotonic()
    result: dict[str, Any] = {"machine": machine(), "triton": triton.__version__, "device": args.device, "steps": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.steps:
            step, most = STEPS[name]
            left = args.seconds - (time.monotonic() - begin)
            run = Run(args.root, args.device, Path(folder), max(1.0, min(most, left)), args.processes, args.select)
            if args.device == "cpu":
                run.bench, run.training = ["--rounds", "2"], ["--steps", "2", "--batch", "1", "--length", "64"]
            run.bench += ["--only", *args.bench] if args.bench else []
            print(f"{name} …", flush=True)
            result["steps"][name] = found = step(run)
            print(f"{name}: {'right' if found['right'] else 'NOT RIGHT'}", flush=True)
    result["seconds"] = time.monotonic() - begin
    gpu = (result["machine"]["gpu"] or "cpu").lower().replace("nvidia", "").strip().replace(" ", "-")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{gpu}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / f"{gpu}.md").write_text(page(result), encoding="utf-8")
    print(f"{args.out / gpu}.md, {result['seconds']:.0f} s")
    return 0 if all(step["right"] for step in result["steps"].values()) else 1
