"""Training memory of neural_memory against length: measured, and predicted from shapes.

python -m palimpsest.kernels.profile.memory [--lengths 1024 2048 4096 8192 16384] [--json FILE]
"""

import argparse
from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from ..neural_memory import MemorySpec, neural_memory
from ..neural_memory.cost import training_bytes_per_token
from .measure import peak_bytes, write


def peak_of_training(length: int, spec: MemorySpec, batch: int, heads: int, width: int) -> int:
    """Peak bytes of a forward and backward above the inputs, float32."""
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=draw)).requires_grad_()

    q, k, v = (normalize(leaf(batch, length, heads, width), dim=-1).detach().requires_grad_() for _ in range(3))
    gates = [(-0.1 * torch.rand(batch, length, heads, generator=draw)).requires_grad_() for _ in range(2)]
    step = (0.02 * torch.rand(batch, length, heads, generator=draw)).requires_grad_()
    weights = [leaf(*shape, scale=shape[1] ** -0.5) for shape in spec.weight_shapes(heads, width, width)]
    norm = torch.ones(heads, width, requires_grad=True)

    def train() -> None:
        o, _ = neural_memory(q, k, v, step, *gates, weights=weights, spec=spec, norm=norm)
        o.backward(torch.ones_like(o))

    return peak_bytes(train)


def slope(lengths: Sequence[int], peaks: Sequence[int]) -> tuple[float, float, float]:
    """Least squares: bytes per token along T, bytes at T = 0, and the largest relative distance from the line."""
    x, y = torch.tensor(lengths, dtype=torch.float64), torch.tensor(peaks, dtype=torch.float64)
    rise = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    start = y.mean() - rise * x.mean()
    return float(rise), float(start), float(((rise * x + start - y) / y).abs().max())


def main() -> None:
    """Print the table, and write it with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="head_dim")
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    peak_of_training(2 * max(args.chunks), MemorySpec(), 1, 1, args.width)  # loads what a first call loads
    for chunk in args.chunks:
        spec = MemorySpec(chunk_size=chunk, expansion=args.expansion)
        peaks = [peak_of_training(n, spec, args.batch, args.heads, args.width) for n in args.lengths]
        rise, start, off = slope(args.lengths, peaks)
        wanted = args.batch * training_bytes_per_token(args.heads, args.width, args.width, spec)
        print(
            f"chunk {chunk}: "
            + "  ".join(f"T={n} {p / 2**20:.1f} MiB" for n, p in zip(args.lengths, peaks, strict=True))
        )
        print(
            f"  slope {rise:.0f} bytes/token, predicted {wanted:.0f} ({rise / wanted - 1:+.1%}); "
            f"{start / 2**20:.1f} MiB at T = 0; off the line by at most {off:.1%}"
        )
        rows.append({"chunk": chunk, "lengths": args.lengths, "peak_bytes": peaks, "slope": rise, "predicted": wanted})
    shape = {"batch": args.batch, "heads": args.heads, "width": args.width, "expansion": args.expansion}
    write(args.json, {"shape": shape, "rows": rows})


if __name__ == "__main__":
    main()
