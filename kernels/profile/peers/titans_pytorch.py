"""neural_memory beside the memory layer of the ``titans-pytorch`` package: speed and peak memory.

    pip install titans-pytorch          # the peer; nothing here installs it
    python -m palimpsest.kernels.profile.peers.titans_pytorch [--chunks 16 64] [--device cuda] [--json FILE]

Both are whole layers (projections, gates, memory, output projection) trained forward and backward on the same input.
The peer's ``batch_size`` is set to the chunk, so that its inner gradients are taken at every chunk's own start as ours
are; its default takes all of them at W_0, which is another function, and is timed beside for information.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, softplus

from ...neural_memory import MemorySpec, neural_memory
from ..measure import interleave, peak_bytes, ratio, write


class Layer(nn.Module):
    """The operation inside a layer of the peer's kind: norm, projections, gates, memory, output projection."""

    def __init__(self, dim: int, heads: int, chunk: int) -> None:
        super().__init__()
        self.heads, width = heads, dim // heads
        self.spec = MemorySpec(chunk_size=chunk, expansion=4)
        self.norm, self.scale = nn.RMSNorm(dim), nn.Parameter(torch.ones(heads, width))
        self.qkv, self.gates = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, 3 * heads)
        self.out = nn.Linear(dim, dim, bias=False)
        shapes = self.spec.weight_shapes(heads, width, width)
        self.weights = nn.ParameterList(torch.randn(shape) * shape[1] ** -0.5 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] → [B, T, dim]."""
        x = self.norm(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        step, retain, momentum = self.gates(x).unflatten(-1, (3, self.heads)).unbind(-2)
        o, _ = neural_memory(
            normalize(q, dim=-1),
            normalize(k, dim=-1),
            v,
            step.sigmoid() / self.spec.chunk_size,
            -softplus(retain - 4.0),
            logsigmoid(momentum),
            weights=list(self.weights),
            spec=self.spec,
            norm=self.scale,
        )
        return self.out(o.flatten(-2))


def peer_class() -> type[nn.Module]:
    """The peer's layer, or an exit that says how to get it."""
    if importlib.util.find_spec("titans_pytorch") is None:
        sys.exit("titans-pytorch is not installed; get it with: pip install titans-pytorch")
    from titans_pytorch import NeuralMemory

    return NeuralMemory


def trainer(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward and backward; the peer returns its state beside the output."""

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        out = layer(x)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()

    return step


def main() -> None:
    """Measure, print a line per chunk, and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json")
    args = parser.parse_args()
    peer = peer_class()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.randn(args.batch, args.length, args.dim, device=args.device)
    rows, trained = [], []
    for chunk in args.chunks:
        common = {"dim": args.dim, "heads": args.heads, "dim_head": args.dim // args.heads, "chunk_size": chunk}
        layers = {
            "palimpsest": Layer(args.dim, args.heads, chunk),
            "peer": peer(**common, batch_size=chunk),
            "peer, all gradients at W_0": peer(**common),
        }
        trained.append({name: trainer(layer.to(args.device), x) for name, layer in layers.items()})
        seconds = interleave(trained[-1], args.rounds, args.device)
        tokens = args.batch * args.length
        rates = {name: tokens / statistics.median(s) for name, s in seconds.items()}
        rows.append(
            {"chunk": chunk, "times_the_peer": ratio(seconds, "palimpsest", "peer"), "tokens_per_second": rates}
        )
        print(f"chunk {chunk}: {rows[-1]['times_the_peer']:.1f} × the peer", flush=True)
        print("  " + "  ".join(f"{name}: {rate:.0f} tokens/s" for name, rate in rates.items()), flush=True)
    for row, steps in zip(rows, trained, strict=True):
        row["peak_bytes"] = peaks = {name: peak_bytes(step, args.device) for name, step in steps.items()}
        told = "  ".join(f"{name}: {peak / 2**20:.0f} MiB" for name, peak in peaks.items())
        print(f"chunk {row['chunk']} peak memory\n  {told}", flush=True)
    shape = {key: getattr(args, key) for key in ("dim", "heads", "batch", "length", "threads", "rounds", "device")}
    write(args.json, {"shape": shape, "rows": rows})


if __name__ == "__main__":
    main()
