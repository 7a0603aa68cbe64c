"""How long neural_memory must take on an H200, kernel by kernel: PREDICTED FROM COUNTS, measured nowhere.

    python -m palimpsest.kernels.profile.memory_time [--expansion 4 1] [--width 64] [--chunk 64] [--length 4096]
        [--rule muon] [--window 16]

The matrix products are few beside what the kernels move, so the least time of each is that of its traffic. What walks a
sequence in order (``states``, ``carry``) is one program per memory and moves its bytes step after step, through what
one multiprocessor gets from the L2 cache; what takes all steps of a segment at once shares L2 and HBM. A number counts
once for each time a pass of the kernel reads or writes it, and once where it is read again at once, from L1.
docs/neural_memory.md says what that leaves out.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch

from ..neural_memory import MemorySpec
from ..neural_memory.cost import cost, kept_every
from ..neural_memory.forward import step_length
from ..neural_memory.plans import call
from ..neural_memory.slots import inner_of, tile_of, widest_window
from ..neural_memory.spec import RULES
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


def turn_bytes(width: int, f: int, count: int, backward: bool) -> float:
    """What Newton-Schulz of one matrix [D, F] by ``count`` steps moves, as ``orthogonal.py`` multiplies, by blocks of
    64. m are the bytes of the matrix, q those of a square [D, D], r and b the blocks of D and of F.

    A = Y Yᵀ reads each block of rows with each; A A reads A likewise, and once as it is. P Y reads Y for each block of
    rows, P for each of columns, and Y once. Forward: S is taken to the workspace, W added to. Backward: every iterate
    but the last is made again; Ȳ Yᵀ, P Ȳ and R Y, the sums X + Xᵀ, Q A; ⟨Y, Ȳ⟩, and S̄ added to.
    """
    m, q, r, b = 4.0 * width * f, 4.0 * width * width, max(1, width // 64), max(1, f // 64)
    squares = 2 * r * m + q + (2 * r + 2) * q
    product = (r + 2) * m + b * q
    if not backward:
        return 2 * m + count * (squares + product) + 3 * m
    forth = 4 * m + count * squares + (count - 1) * product
    back = count * (2 * r * m + q + 2 * product + 3 * q + (2 * r + 1) * q + 4 * q)
    return forth + back + 2 * m + 4 * m


def turned(spec: MemorySpec, width: int, f: int, c: int, steps: int) -> tuple[float, float, float]:
    """What muon's orthogonalisation adds to a step of ``states``, of its replay, which leaves out a segment's last, and
    of ``carry``; zeros without muon."""
    if not spec.orthogonal:
        return 0.0, 0.0, 0.0
    often = c / spec.step_size
    forth, back = (spec.layers * turn_bytes(width, f, spec.ns_steps, backward) for backward in (False, True))
    return forth * often, forth * (often - 1 / steps), back * often


def tokens_of(spec: MemorySpec, width: int) -> tuple[MemorySpec, int]:
    """The memory that the kernels run, which has no window but slots for its tokens (``slots.py``), and the tokens of a
    step's own.

    Raises:
        ValueError: for a window without a tile.
    """
    if spec.window == 1:
        return spec, step_length(spec, width)
    tile = tile_of(spec, width)
    if tile is None:
        raise ValueError(f"window was {spec.window}; it must be at most {widest_window(width)} with heads of {width}")
    return inner_of(spec, width), tile[1]


def kernels(spec: MemorySpec, width: int) -> dict[str, Walk | Parallel]:
    """What a step of each kernel moves, in the order of a call; w are the bytes of a memory's weights, n how many of W
    and S there are, and cf, cc the numbers of a [C, F] and a [C, C] tile, C with the slots of a window's halo.

    states: the anchor twice, W and S in and out; in the backward no update after a segment's last step, whose kept
    state is read and the anchor once. reads: the anchor, W and S once; the tiles that are left to the backward.
    reads_backward: W and S, tiles. carry: the gradients of W and S in three passes and out, W and S, the anchor one and
    a half times, its gradient in and out; tiles. With muon reads see W alone, forward without the anchor; the replay
    updates after every step; two passes of carry do without W's gradient, and its last takes the anchor, and the
    anchor's gradient, once for every 32 tokens; and a step may end in :func:`turn_bytes`.
    Left out are the gates, and with a window the layout of its tokens.
    """
    spec, _ = tokens_of(spec, width)
    deep, n = spec.layers > 1, 2 if spec.has_momentum else 1
    f = spec.expansion * width if deep else width
    c = step_length(spec, width)
    w, cf, cc = 4.0 * width * f * spec.layers, float(c * f), float(c * c)
    steps = kept_every(spec, [(a, b) for _, a, b in spec.weight_shapes(1, width, width)]) * spec.chunk_size // c
    replay = ((steps - 1) * (2 + 2 * n) + 1 + 2 * n) / steps
    tiles = 12 if deep else 0
    if spec.orthogonal:
        forth, again, back = turned(spec, width, f, c, steps)
        return {
            "states": Walk(6 * w + forth, 2 * w),
            "reads": Parallel(w + 4 * cf, w),
            "states, replayed": Walk(6 * w + again, 2 * w),
            "reads, replayed": Parallel((2 if deep else 1) * w + (4 + tiles) * cf, w + tiles * cf),
            "reads_backward": Parallel(w + (20 if deep else 6) * cf, w),
            "carry": Walk(
                (11.5 + (3 * (c // 32 - 1) if deep and c > 32 else 0)) * w + (52 if deep else 10) * cf + back, 2 * w
            ),
        }
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
    parser.add_argument("--rule", choices=RULES, default="momentum")
    parser.add_argument("--window", type=int, default=1, help="tokens of the omega rule's window")
    args = parser.parse_args(words)
    given = f"{args.rule}, window {args.window}, decay, LayerNorm"
    print(f"PREDICTED from counts, measured on no GPU: H200, bfloat16, 1,024 channels, {given}")
    for expansion in args.expansion:
        spec = MemorySpec(expansion=expansion, chunk_size=args.chunk, rule=args.rule, window=args.window)
        heads, steps = 1024 // args.width, ceil(args.length / tokens_of(spec, args.width)[1])
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
