"""``python -m palimpsest.train.sequence --check``: every mixer, divided among processes, beside one process.

A table of the largest differences, relative in root mean square, in float64, of rows and of packed documents. Nothing
else is done. Exit code 1 when one is larger than rounding makes it.
"""

import argparse
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing import get_context

from ...kernels.profile.measure import machine
from .check import CASES, Result, process

LARGEST = 1e-11
"""Several times what rounding makes of gradients through memories, whose inner steps take differences apart: in one
process, too, a change of the weights' last bits moves those of Omega and Muon by 2e-12."""
Pair = tuple[Result, Result]
"""Of rows, and of packed documents."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="palimpsest.train.sequence", description="Are divided sequences exact?")
    parser.add_argument("--check", action="store_true", required=True, help="compare every mixer with one process")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], metavar="R")
    parser.add_argument("--length", type=int, default=23, metavar="T", help="tokens of a sequence")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    options = parser.parse_args(arguments)
    if min(options.processes) < 2 or options.length < max(options.processes):
        parser.error("--processes must be 2 or more, and --length as many tokens as processes, or more")
    found = {size: _run(size, options.only, options.length) for size in options.processes}
    print("\n".join(table(found)))
    about = machine()
    print(f"\n{about['cpu']}, torch {torch.__version__}, gloo, float64, {time.strftime('%Y-%m-%d')}")
    worst = max(max(x.outputs, x.gradients) for each in found.values() for pair in each.values() for x in pair)
    return int(worst > LARGEST)


def table(found: dict[int, dict[str, Pair]]) -> list[str]:
    """The lines of a table of results by number of processes and case; bytes are those of rows."""
    head = [f"{what}, {size}" for what in ("outputs", "gradients", "documents", "bytes per border") for size in found]
    lines = ["| mixer | " + " | ".join(head) + " |", "|" + "---|" * (1 + len(head))]
    for name in next(iter(found.values())):
        each = {size: results[name] for size, results in found.items()}
        cells = [f"{x.outputs:.0e}" for x, _ in each.values()] + [f"{x.gradients:.0e}" for x, _ in each.values()]
        cells += [f"{max(x.outputs, x.gradients):.0e}" for _, x in each.values()]
        cells += [f"{x.bytes // (size - 1):,}" for size, (x, _) in each.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _run(size: int, names: list[str], length: int) -> dict[str, Pair]:
    """The results of some cases, in so many new processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("spawn")
    answers: Any = context.SimpleQueue()
    arguments = (size, port, {name: CASES[name] for name in names}, length, answers)
    processes = [context.Process(target=process, args=(rank, *arguments)) for rank in range(size)]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
    if any(one.exitcode for one in processes):
        sys.exit(1)  # they have said why
    result: dict[str, Pair] = answers.get()
    return result


if __name__ == "__main__":
    sys.exit(main())
