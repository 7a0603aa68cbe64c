"""The retention kl in Triton: weights that are exponentials of what writes accumulate in; ``retention.py`` has the
definition.

The kernels carry D and S; the anchor U is D where the chunk began, and the weights there, at which gradients are taken,
are F(U) = in · softmax(U) = exp(U − c), c the logarithm of the mean of exp(U) over each column. A chunk's end makes c
zero, for then D becomes D − c, and so does a call of W_0. So c is of the anchor of a given state alone: the ``shifts``,
zeros for all chunks but that in which such a state lies. With O = F(U) − U

    W_t = A_t (D + O) + (1 − A_t) O + f_t S − …

where D + O is the memory as it is read where a step begins: sums of D and O alone would cancel in half precision.

``zero`` keeps an exponential where its tile lies, as ``tiles.shared`` says.

Matrices are [IN, OUT], row by row in memory, and gone through in blocks [ROWS, COLS]. ``cols``: a block's columns, of
the shape by which they broadcast.
"""

import triton
import triton.language as tl

from .retentions import block_of
from .tiles import shared


@triton.jit
def log_numbers(LAYERS: tl.constexpr, PAIR: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """How many numbers kl keeps of a memory's segment: the shifts of all layers' columns (W1, W3, W2), their gradients,
    zeros that stand for the shifts of later chunks and what would be the gradients of these; of a backward then W and S
    after the segment's last step."""
    return 4 * (D + (LAYERS - 1) * F) + LAYERS * PAIR


@triton.jit
def shifts_of(settled, program, base, CHUNK: tl.constexpr, LAYERS: tl.constexpr, PAIR: tl.constexpr, D: tl.constexpr,
              F: tl.constexpr, STATE: tl.constexpr):  # fmt: skip
    """Where the shifts of W1, W2 and W3 lie for a step at slot ``base``; their gradients after all of them."""
    COLUMNS: tl.constexpr = D + (LAYERS - 1) * F
    own = settled + program * log_numbers(LAYERS, PAIR, D, F)
    first = own + 2 * COLUMNS
    if STATE:
        first = tl.where(base < CHUNK, own, first)
    above = first
    if LAYERS == 3:
        above = first + F
    return first, first + (LAYERS - 1) * F, above


@triton.jit
def log_through(settled, program, LAYERS: tl.constexpr, PAIR: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """Where W and S after a segment's last step lie, for its backward."""
    return settled + program * log_numbers(LAYERS, PAIR, D, F) + 4 * (D + (LAYERS - 1) * F)


@triton.jit
def clear_shifts(settled, segment, LAYERS: tl.constexpr, PAIR: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """Zeros for the gradients of a memory's shifts, before the segment that may have some."""
    own = settled + tl.program_id(0).to(tl.int64) * log_numbers(LAYERS, PAIR, D, F) + D + (LAYERS - 1) * F
    if segment == 0:
        tl.store(own + (LAYERS - 1) * F + tl.arange(0, D), tl.zeros([D], tl.float32))
        for layer in tl.static_range(LAYERS - 1):
            tl.store(own + layer * F + tl.arange(0, F), tl.zeros([F], tl.float32))


@triton.jit
def weights_at(anchor, shift, cols, zero):
    """A block of the weights at the anchor; ``shift`` None: the anchor itself."""
    if shift is None:
        return tl.load(anchor)
    else:
        return tl.exp(tl.load(anchor) - (tl.load(shift + cols) + zero))


@triton.jit
def running(dual, anchor, at, shift, cols, zero, SHARED: tl.constexpr = False):
    """Of a block of D where a step begins: W there, and O; without a shift D is W, and stands for both."""
    weight = shared(tl.load(dual), zero, SHARED)
    offset = weight
    if shift is not None:
        start = tl.load(anchor + at)
        offset = tl.exp(start - (tl.load(shift + cols) + zero)) - start
        weight += offset
    return weight, offset


@triton.jit
def through_logs(anchor, shift, cols, d_weight, d_offset):
    """The gradient of a block of the anchor, from those of F(U) and of O; and what it takes off that of the shifts."""
    both = tl.exp(tl.load(anchor) - tl.load(shift + cols)) * (d_weight + d_offset)
    return both - d_offset, both


@triton.jit
def take_shift(d_shift, taken):
    """Takes what :func:`through_logs` found off the gradient of shifts."""
    tl.store(d_shift, tl.load(d_shift) - taken)


@triton.jit
def log_means(dual, col, zero, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """c of the columns from ``col`` on as two numbers to take off one after the other, [COLS] each: D's largest, and
    what is left, of a size with the logarithm of IN. As one, c would be rounded as coarsely as the largest is large,
    and with it every weight."""
    top = tl.full([COLS], float("-inf"), tl.float32)
    total = tl.zeros([COLS], tl.float32)
    for row in tl.range(0, IN + zero, ROWS, disable_licm=True):
        d = tl.load(dual + block_of(row, col, OUT, ROWS, COLS))
        higher = tl.maximum(top, tl.max(d, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(d - higher[None, :]), 0)
        top = higher
    return top, tl.log(total / IN)


@triton.jit
def settle_logs(dual, zero, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """D − c at a chunk's end, in place."""
    for col in tl.range(0, OUT + zero, COLS, disable_licm=True):
        top, shift = log_means(dual, col, zero, IN, OUT, ROWS, COLS)
        for row in tl.range(0, IN + zero, ROWS, disable_licm=True):
            at = block_of(row, col, OUT, ROWS, COLS)
            tl.store(dual + at, (tl.load(dual + at) - top[None, :]) - shift[None, :])


@triton.jit
def settle_logs_backward(dual, grads, zero, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
                         COLS: tl.constexpr):  # fmt: skip
    """From the gradient of D after :func:`settle_logs`, in place, to that before it: ḡ ← ḡ − exp(d) Σ ḡ / in of each
    column. ``dual``: D after it."""
    for col in tl.range(0, OUT + zero, COLS, disable_licm=True):
        total = tl.zeros([COLS], tl.float32)
        for row in tl.range(0, IN + zero, ROWS, disable_licm=True):
            total += tl.sum(tl.load(grads + block_of(row, col, OUT, ROWS, COLS)), 0)
        for row in tl.range(0, IN + zero, ROWS, disable_licm=True):
            at = block_of(row, col, OUT, ROWS, COLS)
            taken = tl.exp(tl.load(dual + at)) * (total / IN)[None, :]
            tl.store(grads + at, tl.load(grads + at) - taken)


@triton.jit
def exponentials(target, source, zero, COUNT: tl.constexpr):
    """COUNT numbers, a multiple of 256, exponentiated."""
    BLOCK: tl.constexpr = 2048 if COUNT % 2048 == 0 else 256
    at = tl.arange(0, BLOCK)
    for i in range(0, COUNT + zero, BLOCK):
        tl.store(target + i + at, tl.exp(tl.load(source + i + at)))
