"""Our models beside nanoGPT's, on this machine and the same batches.

    python -m palimpsest.eval.peers.nanogpt --peer PATH

Training speed: every model takes turns at a few whole updates (forward, backward, clipping, AdamW) in each round, and a
round gives each model's speed as a ratio to nanoGPT's, and to our transformer's, in that round; the median of them is
reported, so that a busy machine slows all sides alike. The ratio of processor seconds is beside it: with one thread it
hardly depends on what else the machine does.

``--race CONFIG`` instead trains the model of a run's config (``configs/quickstart.yaml``) and a nanoGPT as wide as it
takes to have as many parameters, on the same batches with the same schedule, and compares their held-out losses. The
peer may be given several learning rates; its best counts.

Nothing is installed or downloaded. The peer is a clone of its repository::

    git clone https://github.com/karpathy/nanoGPT
"""

import argparse
import importlib.util
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models import build
from ...train.config import RunConfig, read_config
from ...train.data import prepare
from ...train.launch import keep_freed_memory
from ...train.optim import adamw, set_learning_rate
from ...train.schedules import learning_rate
from .. import record, report
from ..harness import reported
from ..match import match

logger = logging.getLogger("palimpsest.eval")

LAYERS, WIDTH, HEADS, VOCABULARY = 4, 128, 4, 256
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
GET = "git clone https://github.com/karpathy/nanoGPT"
MIXERS: dict[str, dict[str, Any]] = {
    "transformer": {"kind": "attention", "heads": HEADS},
    "titans_lmm": {"kind": "neural_memory"},
    "titans_mac": {"kind": "titans_mac", "heads": HEADS, "segment": 64},
    "titans_mag": {"kind": "titans_mag", "heads": HEADS, "window": 64},
    "titans_mal": {"kind": "titans_mal", "heads": HEADS, "window": 64},
}


@dataclass
class Contender:
    """A model, its optimizer, and ``loss(tokens, targets)``, the mean in nats."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]

    @property
    def parameters(self) -> int:
        """All parameters, positions and embeddings too; a shared one counts once."""
        return sum(p.numel() for p in self.model.parameters())

    def update(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """One training step; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()


def load_peer(path: str | Path, seq_len: int, layers: int, width: int, vocabulary: int) -> nn.Module:
    """nanoGPT's model from a clone: no dropout, no bias.

    Raises:
        FileNotFoundError: when there is no model.py, saying how to get it.
    """
    file = Path(path) / "model.py"
    if not file.is_file():
        raise FileNotFoundError(f"peer was {str(path)!r}, which has no model.py; it must be a clone of nanoGPT: {GET}")
    spec = importlib.util.spec_from_file_location("palimpsest_peer_nanogpt", file)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"peer was {str(path)!r}; its model.py must be importable")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    shape = {"n_layer": layers, "n_head": HEADS, "n_embd": width, "block_size": seq_len, "vocab_size": vocabulary}
    torch.manual_seed(0)
    return module.GPT(module.GPTConfig(**shape, dropout=0.0, bias=False))


def contender_of(model: nn.Module, name: str, lr: float) -> Contender:
    """nanoGPT with its own optimizer groups: matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)
    return Contender(name, model, optimizer, lambda tokens, targets: model(tokens, targets)[1])


def ours(name: str, target: int, lr: float) -> Contender:
    """One of ``MIXERS`` at the peer's width, depth and, by the width of its MLP, number of parameters (within 2 %).

    A memory that alone has more parameters than that keeps the transformer's MLP; its count is in the record.
    """
    content = {"model": {"vocab_size": VOCABULARY, "dim": WIDTH, "layers": LAYERS, "mixer": MIXERS["transformer"]}}
    content = match(content, target, multiple=16, within=0.02)  # rows of whole cache lines
    content["model"]["mixer"] = MIXERS[name]
    torch.manual_seed(0)
    model = build(content)
    optimizer = adamw(model, lr=lr, betas=BETAS, eps=EPS, weight_decay=DECAY)
    return Contender(name, model, optimizer, lambda tokens, targets: model(tokens, targets=targets).loss)


def speeds(contenders: Sequence[Contender], batch: tuple[Tensor, Tensor], rounds: int, updates: int) -> dict[str, Any]:
    """Tokens per second of each contender, and its ratios to nanoGPT and to our transformer in the same round."""
    for contender in contenders:
        contender.update(*batch)
    wall: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    busy: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        shift = turn % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            began, before = time.perf_counter(), time.process_time()
            for _ in range(updates):
                contender.update(*batch)
            wall[contender.name].append(time.perf_counter() - began)
            busy[contender.name].append(time.process_time() - before)

    def ratio(times: dict[str, list[float]], name: str, base: str) -> float | None:
        if base not in times:
            return None
        return round(statistics.median(b / a for a, b in zip(times[name], times[base], strict=True)), 3)

    tokens = updates * batch[0].numel()
    return {
        contender.name: {
            "parameters": contender.parameters,
            "tokens_per_second": round(tokens / statistics.median(wall[contender.name])),
            "ratio_to_nanogpt": ratio(wall, contender.name, "nanogpt"),
            "ratio_to_transformer": ratio(wall, contender.name, "transformer"),
            "processor_ratio_to_nanogpt": ratio(busy, contender.name, "nanogpt"),
            "processor_ratio_to_transformer": ratio(busy, contender.name, "transformer"),
            "seconds": [round(value, 4) for value in wall[contender.name]],
        }
        for contender in contenders
    }


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """The table of speeds, printed, and its record.

    Raises:
        ValueError: for a model that is not one of ``MIXERS``.
    """
    names = args.models.split(",")
    unknown = [name for name in names if name not in MIXERS]
    if unknown:
        raise ValueError(f"models had {unknown[0]!r}; they must be among {', '.join(MIXERS)}")
    peer = load_peer(args.peer, args.seq_len, LAYERS, WIDTH, VOCABULARY)
    other = contender_of(peer, "nanogpt", args.lr)
    # nanoGPT counts itself without its table of positions, which costs no arithmetic; rotary models have none.
    count = int(peer.get_num_params())  # type: ignore[operator]
    mine = [ours(name, count, args.lr) for name in names]
    drawn = torch.randint(VOCABULARY, (args.batch_size, args.seq_len + 1), generator=torch.Generator().manual_seed(0))
    batch = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
    measured = speeds([other, *mine], batch, args.rounds, args.updates)
    keys = [f"{kind}ratio_to_{base}" for base in ("nanogpt", "transformer") for kind in ("", "processor_")]
    rows = [
        [
            name,
            f"{item['parameters']:,}",
            f"{item['tokens_per_second']:,}",
            *(report.number(item[key], 2) for key in keys),
        ]
        for name, item in measured.items()
    ]
    print(report.table(["model", "parameters", "tokens/s", *(key.replace("_", " ") for key in keys)], rows))
    return {"batch_size": args.batch_size, "seq_len": args.seq_len, "speed": measured}


@torch.no_grad()
def held_out_loss(contender: Contender, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean nats per token over ``batches``."""
    contender.model.eval()
    loss = statistics.fmean(contender.loss(*batch).item() for batch in batches)
    contender.model.train()
    return loss


def peer_width(path: str | Path, config: RunConfig, target: int) -> int:
    """The width, a multiple of the heads, at which nanoGPT comes nearest to ``target`` parameters."""

    def count(width: int) -> int:
        with torch.device("meta"):
            peer = load_peer(path, config.train.seq_len, config.model.layers, width, config.model.vocab_size)
        return sum(p.numel() for p in peer.parameters())

    widths = range(HEADS, 4 * config.model.dim, HEADS)
    return min(widths, key=lambda width: abs(count(width) - target))


def race(args: argparse.Namespace) -> dict[str, Any]:
    """Train a config's model and nanoGPT on the same batches; the held-out loss of each at the end."""
    config = read_config(args.race, {"train.steps": args.steps} if args.steps else {})
    settings, seed = config.train, config.seed
    torch.manual_seed(seed)
    model = build(config.plain())
    optimizer = adamw(model, lr=settings.lr, betas=BETAS, eps=EPS, weight_decay=settings.weight_decay)
    mine = Contender(config.name, model, optimizer, lambda tokens, targets: model(tokens, targets=targets).loss)
    width = peer_width(args.peer, config, mine.parameters)
    contenders, peaks = [mine], [settings.lr]
    for peak in args.peer_lr or [settings.lr]:
        other = load_peer(args.peer, settings.seq_len, config.model.layers, width, config.model.vocab_size)
        contenders.append(contender_of(other, f"nanogpt at {peak:g}", peak))
        peaks.append(peak)
    corpus = prepare(config.data)
    shape: dict[str, Any] = {"batch_size": settings.batch_size, "seq_len": settings.seq_len}
    training, held_out = corpus.split("train"), corpus.split("validation")
    for step in range(1, settings.steps + 1):
        batch = training.batch(step - 1, seed=seed, **shape)
        for contender, peak in zip(contenders, peaks, strict=True):
            rate = learning_rate(
                step,
                peak=peak,
                steps=settings.steps,
                warmup_steps=settings.warmup_steps,
                schedule=settings.schedule,
                min_ratio=settings.min_lr_ratio,
                decay_fraction=settings.decay_fraction,
            )
            set_learning_rate(contender.optimizer, rate)
            contender.update(batch.tokens, batch.targets)
        if step % 10 == 0:
            logger.info("step %d of %d", step, settings.steps)
    count = min(args.validation_batches, held_out.windows(settings.seq_len) // settings.batch_size)
    batches = [held_out.batch(i, seed=0, **shape)[:2] for i in range(count)]
    losses = {contender.name: round(held_out_loss(contender, batches), 4) for contender in contenders}
    rows = [[each.name, f"{each.parameters:,}", f"{losses[each.name]:.4f}"] for each in contenders]
    print(report.table(["model", "parameters", "held-out loss"], rows))
    tokens = settings.steps * settings.batch_size * settings.seq_len
    return {"config": config.plain(), "tokens": tokens, "held_out_loss": losses, "peer_width": width}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("palimpsest.eval.peers.nanogpt", description=__doc__.splitlines()[0])
    made.add_argument("--peer", required=True, help=f"folder of nanoGPT: {GET}")
    made.add_argument("--models", default=",".join(MIXERS), help=f"ours, comma-separated (default {','.join(MIXERS)})")
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--updates", type=int, default=2, help="training steps of each model in a round")
    made.add_argument("--race", metavar="CONFIG", help="compare held-out losses after training; not speeds")
    made.add_argument("--steps", type=int, help="of the race (default: the config's)")
    made.add_argument("--peer-lr", type=float, nargs="+", help="learning rates of the peer (default: the config's)")
    made.add_argument("--validation-batches", type=int, default=32)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--threads", type=int, default=record.cores())
    made.add_argument("--out", default="nanogpt.json", help="the JSON record")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record; 0 when done, 2 for bad input."""
    args = parser().parse_args(argv)
    with reported() as outcome:
        torch.set_num_threads(args.threads)
        keep_freed_memory()  # as the training loop does, here for both
        began = time.perf_counter()
        content = race(args) if args.race else measure_speed(args)
        record.write_json(Path(args.out), content | record.provenance(torch.device("cpu"), time.perf_counter() - began))
        print(args.out)
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())
