"""From nothing to a trained, measured and writing memory model: ``python -m palimpsest.eval.quickstart``.

Trains the model of ``configs/quickstart.yaml`` on the Python standard library's source, then a sliding-window-attention
model of as many parameters on the same batches, compares them on held-out text by position, and has the first write.
Run again, it goes on where it was stopped, or says that all is there.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..train import train
from ..train.config import RunConfig, parse_overrides, read_config
from ..train.data import prepare
from ..train.metrics import read_metrics
from . import harness, plots, record, report
from .generate import generate
from .match import match, parameters

logger = logging.getLogger("palimpsest.eval")

CONFIG = "configs/quickstart.yaml"
BASELINE = "window_attention"
SAMPLE_TOKENS, TEMPERATURE, TOP_P = 400, 0.7, 0.95


def baseline(config: RunConfig) -> RunConfig:
    """The same run with window attention alone, its MLP widened until it has as many parameters (within 1 %).

    Heads, window and persistent tokens are those of the memory model; so are data, batches, steps and learning rate.

    Raises:
        ValueError: when the config has no memory to compare with.
    """
    content = config.plain()
    mixers = content["model"]["mixer"]
    if not any("memory" in mixer for mixer in mixers):
        kinds = ", ".join(mixer["kind"] for mixer in mixers)
        raise ValueError(f"model.mixer was {kinds}; the quickstart compares a mixer with a memory to one without")
    shared = ("heads", "kv_heads", "rope", "window", "persistent")
    kept = [{key: mixer[key] for key in shared if key in mixer} | {"kind": BASELINE} for mixer in mixers]
    target = parameters(content)
    content["model"]["mixer"] = kept
    content["name"], content["train"]["out"] = f"{config.name}-{BASELINE}", str(config.folder / BASELINE)
    return read_config(match(content, target))


def kinds(config: RunConfig) -> str:
    """The names of a model's mixers, for headings."""
    return " + ".join(dict.fromkeys(mixer.kind for mixer in config.model.mixer))


def heading(number: int, text: str, began: float) -> None:
    """Tell which of the five parts begins."""
    print(f"\n[{number}/5] {text}  ({time.monotonic() - began:.0f} s so far)", flush=True)


def identity(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """What the results depend on: results of other values are measured again."""
    parts = ("seed", "model", "data", "train", "eval")
    free = ("out", "resume", "device", "threads", "log_every", "tensorboard")
    return [
        {part: _without(config.plain()[part], free if part == "train" else ()) for part in parts} for config in configs
    ]


def _without(section: Any, keys: Sequence[str]) -> Any:
    return {key: value for key, value in section.items() if key not in keys} if keys else section


def verdict(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Who is ahead within and beyond the training context, in words, by the paired difference over rows of text."""
    (first, mine), (second, other) = results.items()
    lines = []
    for part, place in (("within", "Within the training context"), ("beyond", "Beyond it")):
        if mine[part] is None:
            continue
        pairs = [b - a for a, b in zip(mine[part]["by_row"], other[part]["by_row"], strict=True)]
        gain = statistics.fmean(pairs)
        line = f"{place} {first if gain > 0 else second} is ahead by {abs(gain):.3f}"
        if len(pairs) == 1:
            lines.append(f"{line} bits per byte, on one row of text: too few to tell how sure that is.")
            continue
        error = statistics.stdev(pairs) / len(pairs) ** 0.5
        unsure = "" if abs(gain) > 2 * error else ", which is too close to call"
        lines.append(f"{line} ± {error:.3f} bits per byte (standard error, {len(pairs)} rows in pairs){unsure}.")
    return "\n".join(lines)


def compare(configs: Sequence[RunConfig], began: float) -> tuple[dict[str, Any], bool]:
    """Both models on the same held-out text, in comparison.json, .md and .png; and whether it was there already."""
    folder, same = configs[0].folder, identity(configs)
    path = folder / "comparison.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("identity") == same:
            return found, True
    results, counts = {}, {}
    device = harness.pick_device(configs[0].train.device)
    for config in configs:
        run = harness.open_run(config.folder, device)
        content = harness.evaluate(run, harness.Plan.of(config.eval, tasks=("perplexity",)))
        harness.write(run.folder, content)
        results[kinds(config)], counts[kinds(config)] = content["tasks"]["perplexity"], content["model"]["parameters"]
    settings = configs[0].train
    text = "\n\n".join(
        [
            "# Held-out bits per byte by position",
            "; ".join(f"{name}: {count:,} parameters" for name, count in counts.items()) + ".",
            f"Each was trained on {settings.steps * settings.batch_size * settings.seq_len:,} tokens at a context of "
            f"{settings.seq_len} and reads the text with a carried state. The lower number of a row has a *.",
            report.side_by_side(results),
            verdict(results),
        ]
    )
    plots.comparison(folder / "comparison.png", results)
    record.write_text(folder / "comparison.md", text + "\n")
    content = {"identity": same, "parameters": counts, "results": results, "report": text}
    record.write_json(path, content | record.provenance(device, time.monotonic() - began))  # last: it says all is there
    return content, False


def write_sample(config: RunConfig) -> str:
    """A text by the trained model, also in sample.txt, whose first line tells how it was made."""
    run = harness.open_run(config.folder, harness.pick_device(config.train.device))
    prompt = config.eval.prompt
    tokens = [run.tokenizer.separator, *run.tokenizer.encode(prompt)]
    settings: dict[str, Any] = {"temperature": TEMPERATURE, "top_p": TOP_P, "seed": config.seed}
    said = list(generate(run.model, tokens, max_tokens=SAMPLE_TOKENS, stop=(run.tokenizer.separator,), **settings))
    text = prompt + run.tokenizer.decode(said)
    how = ", ".join(f"{name} {value}" for name, value in settings.items())
    record.write_text(config.folder / "sample.txt", f"[prompt {prompt!r}, {how}]\n{text}\n")
    return text


def python() -> str:
    """How to call this interpreter from the current folder: ``python`` when that is what it is."""
    found = shutil.which("python")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "python"
    here = os.path.relpath(sys.executable)
    return sys.executable if here.startswith("..") else here


def farewell(config: RunConfig, other: RunConfig) -> str:
    """Where everything is, and commands that work now."""
    folder, call = config.folder, python()
    there = [
        ("config.yaml", "the resolved configuration"),
        ("metrics.jsonl", "loss, speed and memory diagnostics by step; tensorboard/ has the same"),
        ("checkpoints", "to go on from"),
        ("model.safetensors", "the weights, with config.json"),
        ("loss.png", "training and held-out loss of both models"),
        ("comparison.md", "bits per byte by position of both, with .json and .png; eval.md for this one alone"),
        ("sample.txt", "what it wrote"),
        (other.folder.name, "the same files of the window-attention model"),
    ]
    lines = [f"\nEverything is in {folder}/"]
    lines += [f"  {name:<18} {what}" for name, what in there if (folder / name).exists()]
    lines += [
        "\nWhat to try next",
        f'  {call} -m palimpsest.eval.generate {folder} --prompt "class " --temperature 0.7',
        f"  {call} -m palimpsest.eval {folder}",
        f"  {call} -m palimpsest.train {CONFIG} name=longer train.steps={10 * config.train.steps}",
        f"  {call} -m palimpsest.train configs/tiny/titans_mac.yaml",
        f"  {call} -m tensorboard.main --logdir {folder.parent}",
    ]
    return "\n".join(lines)


def run(config: RunConfig) -> int:
    """All five parts; each finds what an earlier call has done. 0 when complete, 1 when asked to stop on the way."""
    began = time.monotonic()
    configs = (config, baseline(config))
    heading(1, "The text", began)
    corpus = prepare(config.data)
    training, validation = corpus.split("train"), corpus.split("validation")
    print(
        f"{config.data.source}: {training.tokens:,} tokens to train on, {validation.tokens:,} held out, "
        f"tokenizer {corpus.tokenizer.name}"
    )
    for number, each in enumerate(configs, start=2):
        count = parameters(each.plain())
        heading(number, f"Training {kinds(each)}, {count:,} parameters, {each.train.steps:,} steps", began)
        summary = train(each)
        if summary.status != "complete":
            print(f"Stopped at step {summary.step:,}; the same command goes on from there.")
            return 1
    plots.losses(config.folder / "loss.png", {kinds(each): read_metrics(each.folder) for each in configs})
    heading(4, f"Held-out text, to {config.eval.max_length_factor} times the training context", began)
    compared, found = compare(configs, began)
    print(compared["report"])
    heading(5, "A sample of what it writes", began)
    sample = config.folder / "sample.txt"
    complete = found and sample.exists()
    print(sample.read_text(encoding="utf-8") if complete else write_sample(config))
    print(farewell(*configs))
    print(
        f"\n{'Nothing was left to do: it is complete' if complete else 'Complete'}. {time.monotonic() - began:.0f} s."
    )
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("palimpsest-quickstart", description=__doc__)
    made.add_argument("config", nargs="?", default=CONFIG, help=f"a run's configuration (default {CONFIG})")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=100")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 when complete, 1 when stopped on the way, 2 for bad input."""
    args = parser().parse_args(argv)
    if "=" in args.config:
        args.config, args.overrides = CONFIG, [args.config, *args.overrides]
    with harness.reported() as outcome:
        outcome.code = run(read_config(args.config, parse_overrides(args.overrides)))
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())
