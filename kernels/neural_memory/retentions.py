"""What a retention makes of D, in which writes accumulate, at a chunk's end, in Triton, and back; ``retention.py`` has
the definitions.

``SETTLE``: its name, or ``("none",)`` where D goes on as it is (l2 and none). Matrices are [IN, OUT], row by row in
memory, and gone through in blocks [ROWS, COLS].
"""

import triton
import triton.language as tl

from .spec import RETENTION_EPS

SMALLEST = tl.constexpr(RETENTION_EPS)


@triton.jit
def settled_numbers(STATE: tl.constexpr, EVERY: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """How many numbers a backward keeps of a segment's ends of chunks: W and S after its last step, and of each chunk
    the scales of both layers."""
    return STATE + EVERY * (D + F)


@triton.jit
def scales_of(settled, program, chunk, STATE: tl.constexpr, EVERY: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """Where the scales of a segment's chunk lie: the last layer's [D], then the first one's [F]."""
    return settled + program * settled_numbers(STATE, EVERY, D, F) + STATE + chunk * (D + F)


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
