"""Our models beside nanoGPT's, on this machine and the same batches.

    python -m palimpsest.eval.peers.nanogpt --peer PATH

Training speed: every model takes turns at a few whole updates (forward, backward, clipping, AdamW) in each round, and a
round gives each model's speed as a ratio to nanoGPT's in that round; the median over rounds is reported, so that a busy
machine slows both sides alike. With ``--train-steps`` also the held-out loss of the transformer and of nanoGPT after
the same batches of the standard library's source.

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
from ...train.data import prepare
from ...train.data_config import DataConfig
from ...train.optim import adamw, learning_rate
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


def load_peer(path: str | Path, seq_len: int) -> nn.Module:
    """nanoGPT's model from a clone, at our size: no dropout, no bias.

    Raises:
        FileNotFoundError: when there is no model.py, saying how to get it.
    """
    file = Path(path) / "model.py"
    if not file.is_file():
        raise FileNotFoundError(f"peer was {str(path)!r}, which has no model.py; it must be a clone of nanoGPT: {GET}")
    spec = importlib.util.spec_from_file_location("palimpsest_peer_nanogpt", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": seq_len, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    return module.GPT(module.GPTConfig(**shape, dropout=0.0, bias=False))


def peer(path: str | Path, seq_len: int, lr: float) -> Contender:
    """nanoGPT with its own optimizer groups: matrices decay, vectors do not."""
    model = load_peer(path, seq_len)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)
    return Contender("nanogpt", model, optimizer, lambda tokens, targets: model(tokens, targets)[1])


def ours(name: str, target: int, lr: float) -> Contender:
    """One of ``MIXERS`` at the peer's width, depth and, by the width of its MLP, parameter count (within 2 %).

    A memory that alone has more parameters than that keeps the transformer's MLP; its count is in the record.
    """
    content = {"model": {"vocab_size": VOCABULARY, "dim": WIDTH, "layers": LAYERS, "mixer": MIXERS["transformer"]}}
    content = match(content, target, within=0.02)
    content["model"]["mixer"] = MIXERS[name]
    torch.manual_seed(0)
    model = build(content)
    optimizer = adamw(model, lr=lr, betas=BETAS, eps=EPS, weight_decay=DECAY)
    return Contender(name, model, optimizer, lambda tokens, targets: model(tokens, targets=targets).loss)


def speeds(contenders: Sequence[Contender], batch: tuple[Tensor, Tensor], rounds: int, updates: int) -> dict[str, Any]:
    """Tokens per second of each contender, and its ratio to the first in the same round: medians and all rounds."""
    for contender in contenders:
        contender.update(*batch)
    measured: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        shift = turn % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            began = time.perf_counter()
            for _ in range(updates):
                contender.update(*batch)
            measured[contender.name].append(updates * batch[0].numel() / (time.perf_counter() - began))
    base = measured[contenders[0].name]
    result = {}
    for contender in contenders:
        rates = measured[contender.name]
        ratios = [rate / other for rate, other in zip(rates, base, strict=True)]
        result[contender.name] = {
            "parameters": contender.parameters,
            "tokens_per_second": round(statistics.median(rates)),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return result


@torch.no_grad()
def held_out_loss(contender: Contender, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean nats per token over ``batches``."""
    contender.model.eval()
    loss = statistics.fmean(contender.loss(*batch).item() for batch in batches)
    contender.model.train()
    return loss


def race(contenders: Sequence[Contender], args: argparse.Namespace) -> dict[str, Any]:
    """Train each on the same batches of the standard library's source; the held-out loss of each at the end."""
    corpus = prepare(DataConfig())
    shape = {"batch_size": args.batch_size, "seq_len": args.seq_len}
    validation = [corpus.split("validation").batch(i, seed=0, **shape)[:2] for i in range(args.validation_batches)]
    training = corpus.split("train")
    for step in range(1, args.train_steps + 1):
        batch = training.batch(step - 1, seed=0, **shape)[:2]
        rate = learning_rate(
            step,
            peak=args.lr,
            steps=args.train_steps,
            warmup_steps=args.train_steps // 20,
            schedule="cosine",
            min_ratio=0.1,
        )
        for contender in contenders:
            for group in contender.optimizer.param_groups:
                group["lr"] = rate
            contender.update(*batch)
        if step % 100 == 0:
            logger.info("step %d of %d", step, args.train_steps)
    return {
        "steps": args.train_steps,
        "tokens": args.train_steps * args.batch_size * args.seq_len,
        "lr": args.lr,
        "held_out_loss": {contender.name: round(held_out_loss(contender, validation), 4) for contender in contenders},
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("palimpsest.eval.peers.nanogpt", description=__doc__.splitlines()[0])
    made.add_argument("--peer", required=True, help=f"folder of nanoGPT: {GET}")
    made.add_argument("--models", default=",".join(MIXERS), help=f"ours, comma-separated (default {','.join(MIXERS)})")
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--updates", type=int, default=2, help="training steps of each model in a round")
    made.add_argument("--train-steps", type=int, default=0, help="also train the transformer and nanoGPT this long")
    made.add_argument("--validation-batches", type=int, default=16)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--threads", type=int, default=record.cores())
    made.add_argument("--out", default="nanogpt.json", help="the JSON record")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record; 0 when done, 2 for bad input."""
    args = parser().parse_args(argv)
    with reported() as outcome:
        names = args.models.split(",")
        unknown = [name for name in names if name not in MIXERS]
        if unknown:
            raise ValueError(f"models had {unknown[0]!r}; they must be among {', '.join(MIXERS)}")
        torch.set_num_threads(args.threads)
        began = time.perf_counter()
        other = peer(args.peer, args.seq_len, args.lr)
        mine = [ours(name, other.parameters, args.lr) for name in names]
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCABULARY, (args.batch_size, args.seq_len + 1), generator=generator)
        measured = speeds(
            [other, *mine], (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), args.rounds, args.updates
        )
        rows = [
            [name, f"{item['parameters']:,}", f"{item['tokens_per_second']:,}", f"{item['ratio']:.2f}"]
            for name, item in measured.items()
        ]
        print(report.table(["model", "parameters", "tokens/s", "ratio to nanoGPT"], rows))
        content: dict[str, Any] = {"shape": {"batch_size": args.batch_size, "seq_len": args.seq_len}, "speed": measured}
        if args.train_steps:
            content["training"] = race(
                [peer(args.peer, args.seq_len, args.lr), ours("transformer", other.parameters, args.lr)], args
            )
            print(content["training"])
        record.write_json(Path(args.out), content | record.provenance(torch.device("cpu"), time.perf_counter() - began))
        print(args.out)
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())
