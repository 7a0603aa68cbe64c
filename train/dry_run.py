"""What a run amounts to, without training: ``palimpsest-train CONFIG key=value … --dry-run``.

Parameters, memory of one GPU line by line, floating-point operations, time at an assumed share of a GPU's peak, the
layout of a batch, the learning rate along the way. Nothing is trained, no process group started, no file written but
the one that ``--json`` names. Memory is counted on shapes (``memory_estimate.py``), for a GPU and its kernels; time is
an assumption unless ``--measure`` runs a few steps on this machine's processor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels.profile.gpus import GPUS, Gpu, find_gpu
from ..models import describe
from ..models.lm import MemoryLM
from . import step_law
from .config import ConfigError, RunConfig
from .data import prepare
from .memory_estimate import Activations, Fixed, activations, fixed
from .recompute import chosen
from .schedules import rate_of
from .shards import MANIFEST, read_manifest
from .sources import DataError

RESERVE = 0.1
"""The share of a GPU's memory that is left for the driver's context, for fragments, for what operations take inside."""
LOGITS = 2**26
"""Gradients of logits that the Triton loss holds at a time; see :func:`palimpsest.kernels.linear_cross_entropy`."""
MEASURED = 3
"""Steps that ``--measure`` times, after as many to warm up."""


@dataclass(frozen=True)
class Line:
    """One item of a GPU's memory; ``checkpointed``: its bytes with ``train.activation_checkpointing``."""

    what: str
    bytes: int
    checkpointed: int
    formula: str


def plan(
    config: RunConfig, *, processes: int = 1, gpu: str = "H200", mfu: float = 0.4, measure: bool = False
) -> dict[str, Any]:
    """All that :func:`text` shows, as JSON can hold it; bytes, FLOPs, tokens, seconds as whole numbers or floats.

    Args:
        processes: of the run, one GPU each.
        gpu: whose peak the time is estimated with, and whose memory is shown first.
        mfu: the assumed share of that peak; model FLOPs, so that what is computed again is not counted.
        measure: also time a few updates of one micro batch on this machine's processor.

    Raises:
        ConfigError: naming an option or key that does not fit.
    """
    if config.model.huggingface is not None:
        raise ConfigError(
            "model.huggingface was given; it must be null for a dry run, which counts blocks of this package"
        )
    if processes < 1:
        raise ConfigError(f"--processes was {processes}; it must be at least 1")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu was {mfu:g}; it must be more than 0 and at most 1")
    try:
        card = find_gpu(gpu)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    shard = _shard(config, processes)
    micro_batches, rows = config.train.micro_batches(processes)
    told = describe.describe(config.plain())
    model = describe.outline(config.model)
    sizes = _parameters(model)
    again = _again(config, rows)
    lines, kept = memory(config, model, again, processes, shard, rows, micro_batches)
    return {
        "name": config.name,
        "parameters": {"total": told.parameters, "met_by_a_token": told.active_parameters, "parts": sizes},
        "batch": _batch(config, processes, micro_batches, rows),
        "memory": {
            "lines": [vars(line) for line in lines],
            "total": sum(line.bytes for line in lines),
            "total_checkpointed": sum(line.checkpointed for line in lines),
            "checkpointing": config.train.activation_checkpointing,
            "recomputed_blocks": list(again),
            "blocks": config.model.layers,
            "notes": _notes(config),
            "activations": {"whole": kept[0].parts, "checkpointed": kept[1].parts},
        },
        "flops": _flops(config, told.flops_per_token, told.head_flops_per_token),
        "time": _time(config, told.flops_per_token, card, processes, mfu, rows if measure else 0),
        "kernels": list(told.kernels),
        "learning_rate": learning_rates(config),
        "step_law": step_law.advise(config).text().splitlines(),
        "corpus": _corpus(config),
    }


def _shard(config: RunConfig, processes: int) -> int:
    """Processes that share one copy of the parameters; refuses what ``parallel.distribute`` does."""
    settings = config.train
    if settings.parallel == "none" and processes > 1:
        raise ConfigError(f"train.parallel was 'none' with --processes {processes}; it must be 'ddp' or 'fsdp'")
    if settings.parallel != "fsdp":
        return 1
    shard = settings.fsdp_shard or processes
    if processes % shard:
        raise ConfigError(f"train.fsdp_shard was {shard}; it must divide --processes {processes}")
    return shard


def _parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part, a shared one under its first name."""
    parts: dict[str, int] = {}
    for name, p in model.named_parameters():
        words = name.split(".")
        part = {"blocks": words[2] if len(words) > 2 else "", "embed": "embedding"}.get(words[0], words[0])
        part = "norm" if part.startswith("norm") else part
        parts[part] = parts.get(part, 0) + p.numel()
    return parts


def _again(config: RunConfig, rows: int) -> tuple[int, ...]:
    """The blocks that are run again in the backward pass, or would be with ``train.activation_checkpointing``."""
    layers, settings = config.model.layers, config.train
    on = settings.activation_checkpointing and settings.sequence_parallel == 1
    return chosen(config, layers, rows, gpu=True) if on else tuple(range(layers))


def memory(
    config: RunConfig,
    model: MemoryLM,
    blocks: Sequence[int],
    processes: int,
    shard: int,
    rows: int,
    micro_batches: int,
) -> tuple[list[Line], tuple[Activations, Activations]]:
    """The lines of one process's memory, and the activations without and with ``blocks`` run again. ``model``: on the
    meta device; it is of no use afterwards.

    Of sequences divided among R processes it is the first one's, which holds R micro batches at a time.
    """
    settings = config.train
    parts = settings.sequence_parallel
    length, held = ceil(settings.seq_len / parts), min(parts, micro_batches)
    whole, again = (
        activations(config.model, settings, rows, gpu=True, again=some, seq_len=length) for some in ((), blocks)
    )
    found = fixed(model, settings, shard)
    share = f" / {shard} processes, rows rounded up" if shard > 1 else ""
    lines = [
        Line("parameters", found.parameters, found.parameters, f"4 bytes x parameters{share}"),
        Line("gradients", found.gradients, found.gradients, f"4 bytes x trained parameters{share}"),
        Line("optimizer state", found.optimizer, found.optimizer, found.rule),
        *_spread(config, found, processes, shard, micro_batches),
    ]
    width = 2 if settings.precision != "fp32" else 4
    logits = width * min(LOGITS, rows * length * config.model.vocab_size)
    times = f"{held} micro batches of " if held > 1 else ""
    of = f"{times}{rows} x {length} tokens, {settings.precision}"
    for part in sorted({*whole.parts, *again.parts}, key=list({**whole.parts, **again.parts}).index):
        name = {"states": "states of memories", "inputs": "inputs of blocks"}.get(part, part)
        what = "kept for the backward" if part != "inputs" else "all that checkpointing keeps of blocks"
        size, less = (held * found.parts.get(part, 0) for found in (whole, again))
        lines.append(Line(f"activations: {name}", size, less, f"{what}: {of}"))
    working = "what forward and backward hold at most beside the lines above"
    lines.append(Line("working memory", whole.working, again.working, working))
    lines.append(Line("loss: gradients of logits", logits, logits, f"{width} bytes x min(2^26, tokens x vocabulary)"))
    return lines, (whole, again)


def _notes(config: RunConfig) -> list[str]:
    """What the lines of memory leave out."""
    if config.train.sequence_parallel == 1:
        return []
    return [f"of the first of {config.train.sequence_parallel} processes; what they hear of each other is not counted"]


def _spread(config: RunConfig, found: Fixed, processes: int, shard: int, micro_batches: int) -> list[Line]:
    """What spreading over processes takes beside each one's share."""
    if processes == 1:
        return []
    if config.train.parallel == "ddp":
        size = found.whole_gradients
        return [Line("DDP's buckets", size, size, "4 bytes x trained parameters: gradients on their way")]
    size = 2 * (found.root + 2 * found.block)
    formula = "2 x (what is outside of blocks + 2 x the largest block): parameters and gradients in use"
    lines = [Line("FSDP's whole tensors", size, size, formula)]
    if micro_batches > 1 and config.train.sequence_parallel > 1:
        size = found.whole_gradients
        formula = "4 bytes x trained parameters: whole until the last micro batch"
        lines.append(Line("FSDP's gradients of micro batches", size, size, formula))
    elif micro_batches > 1 and shard < processes:
        formula = (
            f"4 bytes x trained parameters / {shard} processes: summed up over replicas after the last micro batch"
        )
        lines.append(Line("FSDP's gradients of micro batches", found.gradients, found.gradients, formula))
    return lines


def _batch(config: RunConfig, processes: int, micro_batches: int, rows: int) -> dict[str, Any]:
    settings = config.train
    per_update = settings.batch_size * settings.seq_len
    return {
        "sequences_per_update": settings.batch_size,
        "seq_len": settings.seq_len,
        "processes": processes,
        "parallel": settings.parallel,
        "sequence_parallel": settings.sequence_parallel,
        "micro_batches": micro_batches,
        "sequences_per_micro_batch": rows,
        "tokens_per_update": per_update,
        "steps": settings.steps,
        "tokens": per_update * settings.steps,
    }


def _flops(config: RunConfig, per_token: float, head: float) -> dict[str, float]:
    per_update = per_token * config.train.batch_size * config.train.seq_len
    total = per_update * config.train.steps
    return {"per_token": per_token, "head_per_token": head, "per_update": per_update, "total": total}


def _time(config: RunConfig, flops: float, card: Gpu, processes: int, mfu: float, measured_rows: int) -> dict[str, Any]:
    """Seconds for all tokens at ``mfu`` of the peak; and, with rows to measure, on this processor."""
    settings = config.train
    tokens = settings.batch_size * settings.seq_len * settings.steps
    peak = card.half if settings.precision != "fp32" else card.vector
    speed = mfu * peak * processes / flops
    found = {"gpu": card.name, "peak_flops": peak, "mfu": mfu, "tokens_per_second": speed, "seconds": tokens / speed}
    if measured_rows:
        found["measured"] = measure_speed(config, measured_rows) | {"tokens": tokens}
    return found


def measure_speed(config: RunConfig, rows: int) -> dict[str, float]:
    """tokens_per_second of a few updates of ``rows`` sequences of random tokens, on this processor in float32."""
    from .throughput import measure

    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    row = measure(config.plain(), torch.device("cpu"), MEASURED, rows, config.train.seq_len)
    return {"tokens_per_second": row["tokens_per_second"], "spread": row["spread"], "threads": torch.get_num_threads()}


def learning_rates(config: RunConfig) -> dict[int, float]:
    """The learning rate at the first update, at the end of warm-up, at quarters of the run and at its last update."""
    settings = config.train
    quarters = [max(1, settings.steps * quarter // 4) for quarter in range(1, 5)]
    steps = sorted({1, max(1, settings.warmup_steps), *quarters})
    return {step: rate_of(settings, step) for step in steps}


def _corpus(config: RunConfig) -> dict[str, Any]:
    """Tokens and epochs where the corpus is prepared; else why they are not told. Nothing is tokenised or fetched."""
    data = config.data
    if data.task is not None:
        return {"reason": f"the task {data.task} makes its examples anew"}
    local = data.source != "hf" and (data.tokenizer == "bytes" or Path(data.tokenizer).exists())
    if data.folder is None and not local:
        return {"reason": "not looked for: without data.folder its name needs a source or tokenizer from a network"}
    try:
        if data.folder is not None and (Path(data.folder) / MANIFEST).exists():
            manifest: Mapping[str, Any] = read_manifest(Path(data.folder))
        elif local:
            manifest = prepare(data, verify=False, build=False).manifest
        else:
            raise DataError(f"no corpus is in {data.folder} yet")
    except (DataError, OSError) as error:
        return {"reason": f"not prepared: {error}"}
    tokens = manifest["splits"]["train"]["tokens"]
    read = config.train.batch_size * config.train.seq_len * config.train.steps
    return {"tokens": tokens, "epochs": read / tokens if tokens else None}


def fits(found: Mapping[str, Any]) -> list[tuple[str, int, bool, bool]]:
    """(GPU, its bytes, whether the run fits, whether it does with checkpointing): all that is counted, in
    1 - ``RESERVE`` of its memory."""
    totals = found["memory"]["total"], found["memory"]["total_checkpointed"]
    most = {name: (1 - RESERVE) * card.capacity for name, card in GPUS.items()}
    return [(name, GPUS[name].capacity, *(total <= room for total in totals)) for name, room in most.items()]
