"""What a retention makes of D, in which writes accumulate, at a chunk's end, in Triton, and back; ``retention.py`` has
the definitions.

``SETTLE``: its name, or ``("none",)`` where D is W and goes on as it is (l2 and none); and of lq its power. Matrices
are [IN, OUT], row by row in memory, and gone through in blocks [ROWS, COLS].

``"norm"`` scales the columns of W where a chunk ends. ``"lq"`` is W = r D, r = ‖D‖_q^(2−q) of each matrix where the
chunk began: the kernels carry D and S, the anchor is D there, and every product with W or with the weights at the
anchor is one with D times r. The gradients of r are sums that passes meet on their way: of a product Y = r X the sum of
ȳ y is r r̄.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from .orthogonal import work_of
from .spec import RETENTION_EPS

SMALLEST = tl.constexpr(RETENTION_EPS)
# What is kept of lq for each step: r and ‖D‖_q^q of the last layer, of the first and of W3; then shares of r r̄: of the
# last layer by reads, by B and by the error, of the others by reads and by the keys' pass.
FACTORS = tl.constexpr(16)
BY_READS, BY_BACKS, BY_ERROR, BY_FIRST_READS, BY_KEYS, BY_ABOVE_READS, BY_ABOVE_KEYS = (
    tl.constexpr(8 + i) for i in range(7)
)


def settled_size(constants: Mapping[str, Any]) -> int:
    """Numbers that a retention keeps of a memory's segment, for the kernels of these constants; 1 at least."""
    d, f, steps = constants["D"], constants["F"], constants["EVERY"] * constants["CHUNK"] // constants["C"]
    layers, copies = constants["LAYERS"], 1 + constants["MOMENTUM"]
    if constants["SETTLE"][0] == "norm" and constants["GRAD"]:
        return layers * copies * d * f + constants["EVERY"] * (d + (layers - 1) * f)
    if constants["SETTLE"][0] == "kl":
        return 4 * (d + (layers - 1) * f) + layers * copies * d * f
    return steps * FACTORS.value if constants["SETTLE"][0] == "lq" else 1


@triton.jit
def scaled(x, factor):
    """x times a factor, where there is one."""
    if factor is None:
        return x
    else:
        return x * factor


@triton.jit
def power_of(x, POWER: tl.constexpr):
    """|x|^POWER."""
    if POWER == 4.0:
        return x * x * x * x
    elif POWER == 2.0:
        return x * x
    else:
        return tl.where(x == 0.0, 0.0, tl.exp(tl.log(tl.abs(tl.where(x == 0.0, 1.0, x))) * POWER))


@triton.jit
def factor_of(dual, zero, SIZE: tl.constexpr, POWER: tl.constexpr):
    """r of a matrix, and Σ |d|^q + ε."""
    BLOCK: tl.constexpr = 2048 if SIZE % 2048 == 0 else 256
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE + zero, BLOCK):
        sums += power_of(tl.load(dual + start + tl.arange(0, BLOCK)), POWER)
    total = tl.sum(sums) + SMALLEST
    return tl.exp(tl.log(total) * ((2.0 - POWER) / POWER)), total


@triton.jit
def keep_factors(kept, anchor, zero, SIZE: tl.constexpr, LAYERS: tl.constexpr, POWER: tl.constexpr):
    """r of W1, W2 and W3, and to ``kept`` what other passes need of them."""
    last, total = factor_of(anchor[1], zero, SIZE, POWER)
    tl.store(kept, last)
    tl.store(kept + 1, total)
    first = last
    if LAYERS > 1:
        first, total = factor_of(anchor[0], zero, SIZE, POWER)
        tl.store(kept + 2, first)
        tl.store(kept + 3, total)
    above = first
    if LAYERS == 3:
        above, total = factor_of(anchor[2], zero, SIZE, POWER)
        tl.store(kept + 4, above)
        tl.store(kept + 5, total)
    return first, last, above


@triton.jit
def load_factors(kept, LAYERS: tl.constexpr):
    """r of W1, W2 and W3, as :func:`keep_factors` kept them."""
    last = tl.load(kept)
    first = last
    if LAYERS > 1:
        first = tl.load(kept + 2)
    above = first
    if LAYERS == 3:
        above = tl.load(kept + 4)
    return first, last, above


@triton.jit
def factor_backward(dual, grads, share, total, zero, SIZE: tl.constexpr, POWER: tl.constexpr):
    """Adds what r gives to the gradient of D, from r r̄: r r̄ (2 − q) |d|^(q−2) d / Σ |d|^q."""
    BLOCK: tl.constexpr = 2048 if SIZE % 2048 == 0 else 256
    for start in range(0, SIZE + zero, BLOCK):
        at = start + tl.arange(0, BLOCK)
        d = tl.load(dual + at)
        slope = power_of(d, POWER - 2.0) * d
        tl.store(grads + at, tl.load(grads + at) + share * ((2.0 - POWER) / total) * slope)


@triton.jit
def factors_backward(kept, anchor, grads, zero, SIZE: tl.constexpr, LAYERS: tl.constexpr, POWER: tl.constexpr):
    """The same of W1, W2 and W3, from the shares that a step's passes have left."""
    share = tl.load(kept + BY_READS) + tl.load(kept + BY_ERROR)
    if LAYERS > 1:
        share += tl.load(kept + BY_BACKS)
        first = tl.load(kept + BY_FIRST_READS) + tl.load(kept + BY_KEYS)
        factor_backward(anchor[0], grads[0], first, tl.load(kept + 3), zero, SIZE, POWER)
    if LAYERS == 3:
        above = tl.load(kept + BY_ABOVE_READS) + tl.load(kept + BY_ABOVE_KEYS)
        factor_backward(anchor[2], grads[2], above, tl.load(kept + 5), zero, SIZE, POWER)
    factor_backward(anchor[1], grads[1], share, tl.load(kept + 1), zero, SIZE, POWER)


@triton.jit
def settled_numbers(LAYERS: tl.constexpr, PAIR: tl.constexpr, EVERY: tl.constexpr, D: tl.constexpr,
                    F: tl.constexpr):  # fmt: skip
    """How many numbers a backward keeps of a segment's ends of chunks: W and S after its last step, and of each chunk
    the scales of all layers."""
    return LAYERS * PAIR + EVERY * (D + (LAYERS - 1) * F)


@triton.jit
def after_segment(settled, turned, program, LAYERS: tl.constexpr, PAIR: tl.constexpr, EVERY: tl.constexpr,
                  D: tl.constexpr, F: tl.constexpr, SETTLE: tl.constexpr, TURN: tl.constexpr):  # fmt: skip
    """Where a backward keeps W and S after a segment's last step, if it needs them."""
    if SETTLE[0] == "norm":
        return settled + program * settled_numbers(LAYERS, PAIR, EVERY, D, F)
    else:
        return work_of(turned, program, D, F, LAYERS, TURN, True)[0]


@triton.jit
def scales_of(settled, program, chunk, LAYERS: tl.constexpr, PAIR: tl.constexpr, EVERY: tl.constexpr, D: tl.constexpr,
              F: tl.constexpr):  # fmt: skip
    """Where the scales of a segment's chunk lie: the last layer's [D], then the first one's [F], then those of W3."""
    own = settled + program * settled_numbers(LAYERS, PAIR, EVERY, D, F)
    return own + LAYERS * PAIR + chunk * (D + (LAYERS - 1) * F)


@triton.jit
def block_of(row, col, OUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets of a block."""
    return (row + tl.arange(0, ROWS))[:, None] * OUT + (col + tl.arange(0, COLS))[None, :]


@triton.jit
def settle(anchor, weights, scales, zero, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
           KEEP: tl.constexpr):  # fmt: skip
    """norm: every column of W scaled to the norm of the anchor's, in place. KEEP: the scales [OUT], which the backward
    needs."""
    for col in tl.range(0, OUT + zero, COLS, disable_licm=True):
        first = tl.zeros([COLS], tl.float32)
        now = tl.zeros([COLS], tl.float32)
        for row in tl.range(0, IN + zero, ROWS, disable_licm=True):
            at = block_of(row, col, OUT, ROWS, COLS)
            u = tl.load(anchor + at)
            w = tl.load(weights + at)
            first += tl.sum(u * u, 0)
            now += tl.sum(w * w, 0)
        scale = tl.sqrt((first + SMALLEST) / (now + SMALLEST))
        if KEEP:
            tl.store(scales + col + tl.arange(0, COLS), scale)
        for row in tl.range(0, IN + zero, ROWS, disable_licm=True):
            at = block_of(row, col, OUT, ROWS, COLS)
            tl.store(weights + at, tl.load(weights + at) * scale[None, :])


@triton.jit
def settle_backward(anchor, weights, scales, grads, d_anchor, zero, IN: tl.constexpr, OUT: tl.constexpr,
                    ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """From the gradient of W after :func:`settle`, in place, to that before it, and what it adds to the anchor's.
    ``weights``: W after it. With c = ⟨w, ḡ⟩ / (‖u‖² + ε) of a column: ḡ ← s (ḡ − c w), ū += c u."""
    for col in tl.range(0, OUT + zero, COLS, disable_licm=True):
        first = tl.zeros([COLS], tl.float32)
        along = tl.zeros([COLS], tl.float32)
        for row in tl.range(0, IN + zero, ROWS, disable_licm=True):
            at = block_of(row, col, OUT, ROWS, COLS)
            u = tl.load(anchor + at)
            first += tl.sum(u * u, 0)
            along += tl.sum(tl.load(weights + at) * tl.load(grads + at), 0)
        share = (along / (first + SMALLEST))[None, :]
        scale = tl.load(scales + col + tl.arange(0, COLS))[None, :]
        for row in tl.range(0, IN + zero, ROWS, disable_licm=True):
            at = block_of(row, col, OUT, ROWS, COLS)
            tl.store(grads + at, scale * (tl.load(grads + at) - share * tl.load(weights + at)))
            tl.store(d_anchor + at, tl.load(d_anchor + at) + share * tl.load(anchor + at))
