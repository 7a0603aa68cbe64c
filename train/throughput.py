"""Training speed of presets on one device: forward, backward and update, on random tokens.

    python -m palimpsest.train.throughput configs/tiny/*.yaml [--device cuda] [--steps 20] [--json FILE]

It needs torch and pydantic alone: no tokenizer, no data, no YAML package. Losses are checked to be finite and nothing
else is learnt from them. Memory is the peak of a step, parameters and optimizer included, on a GPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models import build
from ..models.config import load_config
from .metrics import peak_flops
from .optim import adamw

WARMUP = 3


def read_preset(path: Path) -> dict[str, Any]:
    """The mapping in a preset's file: sections by indentation, ``{a: b}`` and ``[a, b]``, lists of mappings, comments.

    A ``base`` is a key like any other here. That is all that ``configs/`` holds; a configuration of your own may hold
    any YAML, which ``read_config`` reads.

    Raises:
        ValueError: for a line that is something else.
    """
    whole: dict[str, Any] = {}
    open_: list[tuple[int, dict[str, Any]]] = [(-1, whole)]
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        bare = line.split(" #")[0].rstrip() if not line.lstrip().startswith("#") else ""
        if not bare:
            continue
        depth, (key, colon, value) = len(bare) - len(bare.lstrip()), bare.strip().partition(":")
        if key.startswith("- {") and bare.endswith("}") and open_[-1][0] < depth and len(open_) > 1:
            above = open_[-2][1]  # the section just opened is a list
            name = next(reversed(above))
            above[name] = [*(above[name] or []), _value(bare.strip()[2:])]
            continue
        if not colon or key.startswith("-"):
            raise ValueError(f"line {number} was {line!r}; it must be a key, a colon, and a value or a section")
        while open_[-1][0] >= depth:
            open_.pop()
        if value.strip():
            open_[-1][1][key] = _value(value.strip())
        else:
            section: dict[str, Any] = {}
            open_[-1][1][key] = section
            open_.append((depth, section))
    return whole


def _value(text: str) -> Any:
    """A mapping, a list, a quoted text, a number, true, false, null, or plain text."""
    if text.startswith("[") and text.endswith("]"):
        return [_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    if text.startswith("{") and text.endswith("}"):
        pairs = [pair.partition(":") for pair in _entries(text[1:-1]) if pair.strip()]
        return {key.strip(): _value(value.strip()) for key, _, value in pairs}
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    plain = {"true": True, "false": False, "null": None, "~": None}
    if text in plain:
        return plain[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _entries(text: str) -> list[str]:
    """What stands between the commas that no inner mapping or list encloses."""
    entries = [""]
    for part in text.split(","):
        inside = any(entries[-1].count(a) > entries[-1].count(b) for a, b in ("{}", "[]"))
        entries = [*entries[:-1], f"{entries[-1]},{part}"] if inside else [*entries, part]
    return entries


def measure(content: dict[str, Any], device: torch.device, steps: int, batch: int, length: int) -> dict[str, Any]:
    """Train a preset for a few steps.

    Args:
        content: a preset, of which the ``model`` section is used.
        batch: sequences a step; length: tokens of each.

    Returns:
        tokens_per_second at the median step, its spread (interquartile, relative), mfu (share of the device's peak;
        None where that is not known), peak_bytes (GPU alone), parameters, loss of the last step.

    Raises:
        RuntimeError: when a loss is not finite.
    """
    precision = "bf16" if device.type == "cuda" else "fp32"
    torch.manual_seed(0)
    model = build({"model": content["model"]}).to(device)
    optimizer = adamw(model, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch, length + 1), generator=draw).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(WARMUP + steps):
        _wait(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(tokens[:, :-1], targets=tokens[:, 1:].contiguous()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    if not loss.isfinite():
        raise RuntimeError(f"loss was {loss.item()} after {WARMUP + steps} steps; it must be finite")
    taken = seconds[WARMUP:]
    speed = batch * length / statistics.median(taken)
    low, _, high = statistics.quantiles(taken, n=4)
    peak = peak_flops(device, precision)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": batch,
        "length": length,
        "precision": precision,
        "tokens_per_second": speed,
        "spread": (high - low) / statistics.median(taken),
        "mfu": speed * model.flops_per_token(length) / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "loss": loss.item(),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(words: Sequence[str] | None = None) -> int:
    """Print a line per preset, and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    rows: dict[str, Any] = {}
    for path in args.presets:
        content = load_config(path, read_preset)
        row = measure(content, torch.device(args.device), args.steps, args.batch, args.length)
        rows[f"{path.parent.name}/{path.stem}"] = row
        mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
        peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.2f} GiB"
        speed = f"{row['tokens_per_second']:,.0f} tokens/s ± {row['spread'] / 2:.0%}{mfu}{peak}"
        print(f"{path}: {row['batch']} × {row['length']} tokens, {row['precision']}: {speed}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
