"""Two result files of ``bench``, row by row.

    python -m palimpsest.kernels.profile compare before.json after.json [--threshold 0.05]

Times are compared between files of one GPU. Files of a CPU are compared by their ratios to chunked torch in the same
run, since a CPU's times are those of its neighbours as well. Exit status 1: something is slower or needs more memory by
more than the threshold, is missing, or is no longer right.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Key = tuple[str, str, str, str, str]


def keyed(path: Path) -> tuple[str, dict[Key, Row]]:
    """The GPU (or ``CPU``) of a file, and its rows by workload, sizes, dtype, pass and implementation.

    Raises:
        ValueError: for a file that ``bench`` did not write.
    """
    whole = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(whole, dict) or "rows" not in whole or "machine" not in whole:
        raise ValueError(f"file was {path}; it must be what bench --json wrote")
    rows: dict[Key, Row] = {
        (row["workload"], json.dumps(row["sizes"]), row["dtype"], row["pass"], row["implementation"]): row
        for row in whole["rows"]
    }
    return whole["machine"]["gpu"] or "CPU", rows


def changes(before: Row, after: Row, on_gpu: bool) -> dict[str, float]:
    """Relative growth of time and of memory; of time on a CPU that of the ratio to torch."""
    if "seconds" not in before or "seconds" not in after:
        return {}
    if on_gpu:
        found = {"time": after["seconds"]["median"] / before["seconds"]["median"] - 1}
    elif before["times_torch"] and after["times_torch"]:
        found = {"time beside torch": before["times_torch"] / after["times_torch"] - 1}
    else:
        found = {}
    if before.get("peak_bytes") and after.get("peak_bytes"):
        found["memory"] = after["peak_bytes"] / before["peak_bytes"] - 1
    return found


def verdicts(before: Path, after: Path, threshold: float) -> tuple[list[str], int]:
    """A line per row, and how many of them are worse.

    Raises:
        ValueError: for files of two different GPUs.
    """
    (where, old), (there, new) = keyed(before), keyed(after)
    if where != there:
        raise ValueError(f"files were measured on {where} and on {there}; they must be of one GPU, or both of a CPU")
    lines, worse = [], 0
    for key, row in old.items():
        name = " ".join((key[0], *key[2:], key[1]))
        if key not in new:
            lines.append(f"MISSING  {name}")
            worse += 1
            continue
        if row["check"]["right"] and not new[key]["check"]["right"]:
            lines.append(f"WRONG    {name}")
            worse += 1
            continue
        found = changes(row, new[key], where != "CPU")
        bad = any(growth > threshold for growth in found.values())
        good = any(growth < -threshold for growth in found.values())
        worse += bad
        told = "  ".join(f"{what} {growth:+.1%}" for what, growth in found.items()) or "not timed"
        lines.append(f"{'WORSE' if bad else 'better' if good else 'same':8} {name}: {told}")
    lines += [f"new      {' '.join((key[0], *key[2:], key[1]))}" for key in new if key not in old]
    return lines, worse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="relative growth that is too much")


def main(args: argparse.Namespace) -> int:
    """Print the comparison; 1 when something is worse."""
    lines, worse = verdicts(args.before, args.after, args.threshold)
    print("\n".join(lines))
    print(f"{worse} worse by more than {args.threshold:.0%}" if worse else "nothing is worse")
    return 1 if worse else 0
