"""Runs the canary of every kernel, constants and configuration that the plans reach, on this machine's GPU.

    python -m palimpsest.kernels.profile canaries [--only TEXT] [--shard 0/4] [--json FILE]

A verdict that is known is not sought again; new ones are kept where launches look for them. Exit status 1 when a kernel
of a plan has no configuration that is right. In the interpreter the kernels are interpreted, and nothing is kept.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import tuning
from ..launch import Config, Kernel, interpreted
from .plans import discover, launches_of


def wanted(only: str, modules: list[str]) -> Iterator[tuple[Kernel, dict[str, Any]]]:
    """Every kernel with each of the constants that plans launch it with, once."""
    seen = set()
    for name, plan in discover(modules).items():
        if only not in name:
            continue
        with torch.enable_grad():
            launches = launches_of(plan)
        for launch in launches:
            key = launch.kernel.name, tuple(sorted(launch.constants.items(), key=lambda item: item[0]))
            if key not in seen:
                seen.add(key)
                yield launch.kernel, launch.constants


def verdict(
    kernel: Kernel, config: Config, constants: Mapping[str, Any], verdicts: tuning.Verdicts | None
) -> dict[str, Any]:
    """Whether a configuration is right here, from the file or now."""
    name = tuning.describe(kernel, constants) if verdicts else kernel.name
    known = verdicts.known.get(name, {}).get(str(config)) if verdicts else None
    start = time.perf_counter()
    if known is None:
        passed, found = tuning.validate(kernel, config, constants)
        known = {"passed": passed, "found": found}
        if verdicts:
            verdicts.note(name, config, known)
    row = {"kernel": kernel.name, "config": str(config), "constants": {k: str(v) for k, v in constants.items()}}
    return {**row, "passed": known["passed"], "found": known["found"], "seconds": time.perf_counter() - start}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--only", default="", help="plans whose name holds this text")
    parser.add_argument("--shard", default="0/1", help="of how many parts which one, as 0/4")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--modules", nargs="+", default=[], help="modules with PLANS, instead of the operations' own")


def main(args: argparse.Namespace) -> int:
    """Print what is wrong, and a count."""
    if not (torch.cuda.is_available() or interpreted()):
        print("canaries need a GPU that torch can use, or TRITON_INTERPRET=1")
        return 1
    verdicts = None if interpreted() else tuning.here()
    number, parts = map(int, args.shard.split("/"))
    rows, broken = [], []
    for kernel, constants in list(wanted(args.only, args.modules))[number::parts]:
        own = [verdict(kernel, config, constants, verdicts) for config in kernel.configs(constants)]
        for row in own:
            if not row["passed"]:
                print(
                    f"WRONG, not used: {row['kernel']} [{row['config']}] {row['constants']}: {row['found']}", flush=True
                )
        if not any(row["passed"] for row in own):
            broken.append(kernel.name)
        rows += own
        if args.json:
            args.json.write_text(json.dumps({"canaries": rows, "broken": broken}, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(row['passed'] for row in rows)} of {len(rows)} configurations are right")
    for name in dict.fromkeys(broken):
        print(f"BROKEN {name}: no configuration is right")
    return 1 if broken or (parts == 1 and not rows) else 0
