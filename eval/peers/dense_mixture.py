"""A mixture of memories beside the same layer computed densely: every memory takes every token, masked.

    python -m palimpsest.eval.peers.dense_mixture [--memories 8 --top-k 2 ...]

Both do forward and backward on the same input in turns; the ratio of their times in each round is what counts, and the
median of it is reported. Nothing is timed before both have given the same output and gradients. A convolution along a
memory's own tokens cannot be masked, so there is none; nor can a neural memory, whose momentum moves it without tokens.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import delta_rule, linear_attention
from ...models.config import ModelConfig, validate
from ...models.mixers.mixture import DecayGates, MixtureOfMemories
from ...train.launch import keep_freed_memory
from .. import record, report
from ..harness import reported

RULES = ("gated_delta", "delta", "linear_attention")
CLOSE = 1e-4  # RMS-relative, float32: sums over some thousand tokens in another order


def dense(layer: MixtureOfMemories, x: Tensor) -> Tensor:
    """What ``layer`` gives for x [B, T, dim], by all of its memories on all tokens: a token that is not a memory's own
    writes nothing to it (β = 0 or k = 0), lets it decay by nothing (log a = 0), and reads it with weight 0."""
    if layer.conv is not None or not isinstance(layer.gates, DecayGates) or layer.write is None:
        raise ValueError("layer had a convolution, neural memories or shared projections; it must have none of them")
    r = layer.route(x, None)
    weight = x.new_zeros(*x.shape[:2], r.memories).scatter(-1, r.memory, r.weight)
    mine = weight.new_zeros(weight.shape).scatter(-1, r.memory, 1.0).unsqueeze(-1)
    gate, q = layer.proj(x).split([layer.gate_width, layer.dim], -1)
    written = torch.einsum("btd,mde->btme", x, layer.write)
    k, v, z = written.split([layer.dim, layer.dim, written.shape[-1] - 2 * layer.dim], -1)
    q, k, v = (F.silu(y).unflatten(-1, (layer.heads, layer.width)) for y in (q, k, v))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    gates = {name: (y * mine).flatten(2, 3) for name, y in layer.gates.activate(z).items()}
    inputs = [q.unsqueeze(2).expand_as(k), k, v]
    if layer.mixer.rule == "linear_attention":
        inputs[1] = k * mine.unsqueeze(-1)
    run: Any = linear_attention if layer.mixer.rule == "linear_attention" else delta_rule
    o, _ = run(*(y.flatten(2, 3) for y in inputs), **gates, chunk_size=layer.mixer.chunk_size)
    o = (o.unflatten(2, (r.memories, layer.heads)) * weight[..., None, None]).sum(2)
    return layer.out(layer.out_norm(o, gate.view(o.shape) if layer.gate_width else None).flatten(2))


def step(layer: MixtureOfMemories, x: Tensor, densely: bool) -> list[Tensor]:
    """Output, and gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = dense(layer, x) if densely else layer(x, return_state=False)[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The times of both, in turns.

    Raises:
        ValueError: when they do not compute the same.
    """
    keys = {"rule": args.rule, "heads": args.heads, "memories": args.memories, "top_k": args.top_k, "conv": 0}
    content = {"vocab_size": 8, "dim": args.dim, "layers": 1, "mixer": {"kind": "mixture", **keys}}
    config = validate(ModelConfig, content, "model")
    torch.manual_seed(0)
    layer = MixtureOfMemories(config, config.mixer_of(0))  # type: ignore[arg-type]
    x = torch.randn(args.batch_size, args.seq_len, args.dim)
    for a, b in zip(step(layer, x, False), step(layer, x, True), strict=True):
        gap = float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-12))
        if gap > CLOSE:
            raise ValueError(f"the dense layer was {gap:.1e} from the routed one; they must agree to {CLOSE:g}")
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(args.rounds):
        for densely, found in times.items():
            began = time.perf_counter()
            step(layer, x, densely)
            found.append(time.perf_counter() - began)
    ratio = statistics.median(b / a for a, b in zip(times[False], times[True], strict=True))
    tokens = args.batch_size * args.seq_len
    speeds = {name: round(tokens / statistics.median(times[d])) for name, d in (("routed", False), ("dense", True))}
    rows = [[name, f"{speed:,}"] for name, speed in speeds.items()]
    print(report.table(["layer", "tokens/s"], rows))
    print(
        f"routed is {ratio:.2f} times as fast as dense ({args.memories} memories, top {args.top_k}, and a shared one)"
    )
    return {"config": content, "tokens_per_second": speeds, "ratio": round(ratio, 3), "rounds": args.rounds}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("palimpsest.eval.peers.dense_mixture", description=__doc__.splitlines()[0])
    made.add_argument("--rule", choices=RULES, default="gated_delta")
    made.add_argument("--dim", type=int, default=256)
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--memories", type=int, default=8)
    made.add_argument("--top-k", type=int, default=2)
    made.add_argument("--batch-size", type=int, default=2)
    made.add_argument("--seq-len", type=int, default=2048)
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--threads", type=int, default=record.cores())
    made.add_argument("--out", default="dense_mixture.json", help="the JSON record")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record; 0 when done, 2 for bad input."""
    args = parser().parse_args(argv)
    with reported() as outcome:
        torch.set_num_threads(args.threads)
        keep_freed_memory()
        began = time.perf_counter()
        content = measure(args)
        record.write_json(Path(args.out), content | record.provenance(torch.device("cpu"), time.perf_counter() - began))
        print(args.out)
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())
