"""How long neural_memory must take on an H200, kernel by kernel: PREDICTED FROM COUNTS, measured nowhere.

    python -m palimpsest.kernels.profile.memory_time [--expansion 4 1] [--width 64] [--chunk 64] [--length 4096]

The matrix products are few beside what the kernels move, so the least time of each is that of its traffic. What walks a
sequence in order (``states``, ``carry``) is one program per memory and moves its bytes step after step, through what
one multiprocessor gets from the L2 cache; what takes all steps of a segment at once shares L2 and HBM. A number counts
once for each time a pass of the kernel reads or writes it. docs/neural_memory.md says what that leaves out.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch

from ..neural_memory import MemorySpec
from ..neural_memory.cost import cost, segment_chunks
from ..neural_memory.forward import step_length
from ..neural_memory.plans import call
from .gpus import GPUS
from .plans import launches_of

GPU = GPUS["H200"]
L2 = 5.5e12  # bytes per second of all multiprocessors together
OWN = 110e9  # of L2, for one multiprocessor: 64 bytes a cycle at 1.7 GHz


@dataclass(frozen=True)
class Walk:
    """A kernel that walks a sequence: bytes of a step, ``far`` those that come from HBM or go there."""

    bytes: float
    far: float

    def seconds(self, memories: int, steps: int) -> float:
        """One program per memory; as many at a time as there are multiprocessors."""
        waves = ceil(memories / GPU.multiprocessors)
        each = min(L2 / min(memories, GPU.multiprocessors), OWN)
        return max(steps * waves * self.bytes / each, steps * memories * self.far / GPU.bandwidth)


@dataclass(frozen=True)
class Parallel:
    """A kernel that takes all steps at once: bytes of a step, ``far`` those of HBM."""

    bytes: float
    far: float

    def seconds(self, memories: int, steps: int) -> float:
        """All of L2 and HBM."""
        return steps * memories * max(self.bytes / L2, self.far / GPU.bandwidth)


def kernels(spec: MemorySpec, width: int) -> dict[str, Walk | Parallel]:
    """What a step of each kernel moves, in the order of a call; w are the bytes of a memory's weights, n how many of W
    and S there are, and cf, cc the numbers of a [C, F] and a [C, C] tile.

    states: the anchor twice, W and S in and out; in the backward no update after a segment's last step, whose kept
    state is read and the anchor once. reads: the anchor, W and S once; the tiles that are left to the backward.
    reads_backward: W and S, tiles. carry: the gradients of W and S in three passes and out, W and S, the anchor one and
    a half times, its gradient in and out; tiles.
    """
    deep, n = spec.layers == 2, 2 if spec.has_momentum else 1
    f = spec.expansion * width if deep else width
    c = step_length(spec, width)
    w, cf, cc = 4.0 * width * f * spec.layers, float(c * f), float(c * c)
    steps = segment_chunks(spec, [(a, b) for _, a, b in spec.weight_shapes(1, width, width)]) * spec.chunk_size // c
    replay = ((steps - 1) * (2 + 2 * n) + 1 + 2 * n) / steps
    tiles = 12 if deep else 0
    return {
        "states": Walk((2 + 2 * n) * w, n * w),
        "reads": Parallel((1 + n) * w + 4 * cf, n * w),
        "states, replayed": Walk(replay * w, n * w),
        "reads, replayed": Parallel((1 + n) * w + (4 + tiles) * cf, n * w + tiles * cf),
        "reads_backward": Parallel(n * w + (20 if deep else 6) * cf + 28 * cc, n * w),
        "carry": Walk((5 * n + 3.5) * w + (52 if deep else 10) * cf, n * w),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Print the kernels of each width of the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 64), ("chunk", 64), ("batch", 8), ("length", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--expansion", type=int, nargs="+", default=[4, 1], help="hidden units for each of a head")
    args = parser.parse_args(words)
    print("PREDICTED from counts, measured on no GPU: H200, bfloat16, 1,024 channels, momentum, decay, LayerNorm")
    for expansion in args.expansion:
        spec = MemorySpec(expansion=expansion, chunk_size=args.chunk)
        heads, steps = 1024 // args.width, ceil(args.length / step_length(spec, args.width))
        times = {k: x.seconds(args.batch * heads, steps) * 1e3 for k, x in kernels(spec, args.width).items()}
        forward, total = times["states"] + times["reads"], sum(times.values())
        shape = (args.batch, args.length, heads, args.width, args.width, spec)
        floor = sum(GPU.floor(cost(*shape, itemsize=2, backward=back), 16)[0] for back in (False, True)) * 1e3
        with torch.enable_grad():
            launches = len(launches_of(partial(call, spec, width=args.width, batch=args.batch, length=args.length)))
        print(f"\nD = {args.width}, F = {expansion * args.width}, C = {args.chunk}; B {args.batch}, T {args.length}")
        print(*(f"  {name:17s}{time:6.2f} ms" for name, time in times.items()), sep="\n")
        print(
            f"  forward {forward:.1f} ms, backward {total - forward:.1f} ms, {total / floor:.0f} times {floor:.2f} ms"
        )
        print(f"  {launches} launches")


if __name__ == "__main__":
    main()
