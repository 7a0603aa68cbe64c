"""What the Triton kernels of neural memory share: tiles of tokens and matrices, LayerNorm, the gates of a step.

Everything is in the notation of docs/neural_memory.md. A step is C consecutive slots of one memory's chunk (a whole
chunk, or a part of one longer than a tile can be); ``tok`` [C] are its tokens' offsets, ``valid`` [C] whether a slot
holds a token.

``zero`` is a 0 that the compiler does not know, in the number of a loop's rounds: it unrolls loops of known length, and
then keeps in registers what several rounds will need.
"""

import inspect
from typing import Any

import triton
import triton.language as tl

from .hidden import hidden_of
from .spec import LAYER_NORM_EPS

EPS = tl.constexpr(LAYER_NORM_EPS)


def _take_loop_hint() -> None:
    """Lets ``tl.range`` of Triton 3.4 take ``disable_licm``, a hint that came with 3.5, and ignore it.

    A loop here has hundreds of values that do not change inside it: the places of tiles in shared memory. Kept in
    registers over all steps they would push out the tiles themselves.
    """
    before = tl.range.__init__
    if "disable_licm" not in inspect.signature(before).parameters:

        def __init__(self: Any, *args: Any, disable_licm: bool = False, **kwargs: Any) -> None:
            before(self, *args, **kwargs)

        tl.range.__init__ = __init__


_take_loop_hint()


@triton.jit
def product(a, b, DT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b with operands rounded to DT, accumulated in float32."""
    return tl.dot(a.to(DT), b.to(DT), input_precision=PRECISION)


@triton.jit
def shared(x, zero, SHARED: tl.constexpr):
    """A loaded operand, which SHARED keeps where its tile lies until it is rounded. Triton 3.7 moves what is computed
    from loads alone to where matrix instructions want it (for steps of 32 each warp's registers), so that every warp
    holds all of it in float32; a 0 that is no load prevents that, and wide heads need some 80 registers less."""
    return x + zero if SHARED else x


@triton.jit
def token_rows(ptr, tok, valid, cols):
    """[C, len(cols)] of a token tensor; zero in slots without a token."""
    return tl.load(ptr + tok[:, None] + cols[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def token_columns(ptr, tok, valid, rows):
    """The transpose of :func:`token_rows`, loaded as such: a transposed result of a product is never an operand."""
    return tl.load(ptr + tok[None, :] + rows[:, None], mask=valid[None, :], other=0.0)


@triton.jit
def copy(target, source, zero, COUNT: tl.constexpr):
    """COUNT numbers, a multiple of 256."""
    BLOCK: tl.constexpr = 2048 if COUNT % 2048 == 0 else 256
    at = tl.arange(0, BLOCK)
    for i in range(0, COUNT + zero, BLOCK):
        tl.store(target + i + at, tl.load(source + i + at).to(target.dtype.element_ty))


@triton.jit
def clear(target, zero, COUNT: tl.constexpr):
    """COUNT zeros."""
    BLOCK: tl.constexpr = 2048 if COUNT % 2048 == 0 else 256
    at = tl.arange(0, BLOCK)
    for i in range(0, COUNT + zero, BLOCK):
        tl.store(target + i + at, tl.zeros([BLOCK], target.dtype.element_ty))


@triton.jit
def fold(target, source, zero, COUNT: tl.constexpr):
    """target += source; source = 0."""
    BLOCK: tl.constexpr = 2048 if COUNT % 2048 == 0 else 256
    at = tl.arange(0, BLOCK)
    for i in range(0, COUNT + zero, BLOCK):
        more = tl.load(source + i + at)
        tl.store(target + i + at, tl.load(target + i + at) + more)
        tl.store(source + i + at, tl.zeros([BLOCK], tl.float32))


@triton.jit
def begin_state(target, start_ptr, n, h, zero, H: tl.constexpr, SIZE: tl.constexpr, LAYERS: tl.constexpr,
                COPIES: tl.constexpr, PARTS: tl.constexpr, STATE: tl.constexpr):  # fmt: skip
    """W and S of every layer as a call begins: those of its state, or W_0 and zeros. PARTS: tensors per layer in
    ``target``."""
    for layer in tl.static_range(LAYERS):
        if STATE:
            given = start_ptr + (n * H + h).to(tl.int64) * (LAYERS * (COPIES + 1) * SIZE)
            copy(target + layer * PARTS * SIZE, given + layer * (COPIES + 1) * SIZE, zero, COPIES * SIZE)
        else:
            copy(target + layer * PARTS * SIZE, start_ptr + (h * LAYERS + layer) * SIZE, zero, SIZE)
            if COPIES == 2:
                clear(target + (layer * PARTS + 1) * SIZE, zero, SIZE)


@triton.jit
def normalised(x, D: tl.constexpr):
    """(x − mean) / std of each row, and 1 / std."""
    centred = x - (tl.sum(x, 1) / D)[:, None]
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def project(x, normed, D: tl.constexpr):
    """x − mean(x) − ẑ mean(x ⊙ ẑ), the symmetric map in LayerNorm's backward."""
    return x - (tl.sum(x, 1) / D)[:, None] - normed * (tl.sum(x * normed, 1) / D)[:, None]


@triton.jit
def sequence(n, cu_ptr, position_ptr, T, PACKED: tl.constexpr, STATE: tl.constexpr):
    """First token, length, and slots of the first chunk that earlier calls filled, of sequence n."""
    if PACKED:
        begin = tl.load(cu_ptr + n)
        length = tl.load(cu_ptr + n + 1) - begin
    else:
        begin = n * T
        length = T
    place = begin * 0
    if STATE:
        place = tl.load(position_ptr + n)
    return begin, length, place


@triton.jit
def step_tokens(j, begin, length, place, C: tl.constexpr):
    """Tokens of step j of a sequence, counted over all rows [C], and which of its slots hold one."""
    t = j * C + tl.arange(0, C) - place
    return (begin + t).to(tl.int64), (t >= 0) & (t < length)


@triton.jit
def step_slot(j, n, begin, place, C: tl.constexpr):
    """Where what belongs to step j of sequence n lies: a place of its own without a sum over sequences, each of which
    has at most length // C + 2 steps."""
    return (begin // C + 2 * n + j - place // C).to(tl.int64)


@triton.jit
def found_anew(zero_ptr, cu_ptr, position_ptr, T, j, H: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
               STATE: tl.constexpr):  # fmt: skip
    """Which memory, and where step j of its sequence lies. A zero that the compiler does not know is in all of it, so
    that each pass computes its own addresses, and none is kept in registers over the others."""
    zero = tl.load(zero_ptr, volatile=True)
    number = tl.program_id(0) + zero
    n = number // H
    h = number % H
    begin, length, place = sequence(n, cu_ptr, position_ptr, T + zero, PACKED, STATE)
    return number.to(tl.int64), h, step_slot(j, n, begin, place, C) * H + h, begin, length, place


@triton.jit
def step_offsets(j, begin, length, place, h, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Offsets of a step's tokens in [B, T, H, D], and which of its slots hold one."""
    token, valid = step_tokens(j, begin, length, place, C)
    return (token * H + h) * D, valid


@triton.jit
def segment_steps(segment, length, place, CHUNK: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr):
    """First step of a segment of EVERY chunks and the one after its last; none where the sequence has no such
    segment."""
    STEPS: tl.constexpr = EVERY * CHUNK // C
    last = tl.where(length > 0, tl.cdiv(place + length, C), 0)
    return tl.maximum(segment * STEPS, place // C), tl.minimum(segment * STEPS + STEPS, last)


@triton.jit
def anchor_of(states, given, base, CHUNK: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, LAYERS: tl.constexpr,
              COPIES: tl.constexpr, STATE: tl.constexpr):  # fmt: skip
    """Where the anchor of a step at slot ``base`` lies, W1, W2 and W3 (without which W1 stands for it): among a
    segment's ``states`` the weights at its chunk's first step, or in the state ``given`` before the call."""
    PAIR: tl.constexpr = COPIES * SIZE
    first = states + (base // CHUNK) * (CHUNK // C) * (LAYERS * PAIR)
    last = first + (LAYERS - 1) * PAIR
    above = first
    if LAYERS == 3:
        above = first + PAIR
    if STATE:
        before = base < CHUNK
        first = tl.where(before, given + PAIR, first)
        last = tl.where(before, given + (LAYERS - 1) * (PAIR + SIZE) + PAIR, last)
        if LAYERS == 3:
            above = tl.where(before, given + (PAIR + SIZE) + PAIR, above)
    return first, last, above


@triton.jit
def square(start, C: tl.constexpr):
    """Pointers to a [C, C] tile, and to its transpose."""
    i = tl.arange(0, C)
    return start + i[:, None] * C + i[None, :], start + i[None, :] * C + i[:, None]


@triton.jit
def tall(start, C: tl.constexpr, D: tl.constexpr):
    """Pointers to a [C, D] tile, and to its transpose."""
    i = tl.arange(0, C)
    d = tl.arange(0, D)
    return start + i[:, None] * D + d[None, :], start + i[None, :] * D + d[:, None]


def workspace_sizes(c: int, d: int, f: int, layers: int) -> tuple[int, int]:
    """How many numbers of a step's backward wait in DT, and in float32; see :func:`small_parts`, :func:`wide_parts` and
    :func:`above_parts`."""
    small, wide = 3 * c * d + 4 * c * c + 6 * c * f, c * c + 4 * c * d + 2 * c * f + c
    return (small + 3 * c * f, wide + 2 * c * f) if layers == 3 else (small, wide)


@triton.jit
def workspace(small, wide, place, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, LAYERS: tl.constexpr):
    """Where the tiles of one step lie."""
    SMALL: tl.constexpr = 3 * C * D + 4 * C * C + (9 if LAYERS == 3 else 6) * C * F
    WIDE: tl.constexpr = C * C + 4 * C * D + (4 if LAYERS == 3 else 2) * C * F + C
    return small + place * SMALL, wide + place * WIDE


@triton.jit
def deltas_of(small, place, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, LAYERS: tl.constexpr,
              GRAD: tl.constexpr):  # fmt: skip
    """Where Δ of a step's last layer lies: first of the workspace, or in the forward alone."""
    if GRAD:
        small, _ = workspace(small, small, place, C, D, F, LAYERS)
        return small
    else:
        return small + place * (C * D + C * F)


@triton.jit
def small_parts(small, C: tl.constexpr, D: tl.constexpr):
    """In DT. [C, D]: Δ, the gradient of the reads and that of the keys' output, of the last layer; [C, C]: what flows
    from the last layer's reads to its hidden queries, and, transposed, to its hidden keys; the gradient of the first
    layer's scores, and the scores as its reads had them. See :func:`hidden_parts` for the rest."""
    squares = small + 3 * C * D
    return (small, small + C * D, small + 2 * C * D, squares, squares + C * C, squares + 2 * C * C, squares + 3 * C * C)


@triton.jit
def hidden_parts(small, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """In DT, [C, F]: Δ of the first layer and, before its gelu′, B; the hidden queries and the gradient of their
    pre-activations; the gradient of Δ, which becomes that of B; the gradient of the hidden keys, which becomes that
    of their pre-activations."""
    start = small + 3 * C * D + 4 * C * C
    return start, start + C * F, start + 2 * C * F, start + 3 * C * F, start + 4 * C * F, start + 5 * C * F


@triton.jit
def wide_parts(wide, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """In float32: h h_Kᵀ of the last layer [C, C]; ẑ, the residual, the gradient of Δ and that of K [C, D];
    pre-activations of keys and queries [C, F]; 1/std [C]."""
    tiles = wide + C * C
    hidden = tiles + 4 * C * D
    return (wide, tiles, tiles + C * D, tiles + 2 * C * D, tiles + 3 * C * D, hidden, hidden + C * F,
            hidden + 2 * C * F)  # fmt: skip


@triton.jit
def above_parts(small, wide, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """What there is for W3 alone, [C, F]. In DT its Δ, the gradient of the queries' pre-activations, and that of Δ,
    which becomes that of the keys' pre-activations; in float32 both pre-activations, of keys and queries."""
    hidden = small + 3 * C * D + 4 * C * C + 6 * C * F
    tiles = wide + C * C + 4 * C * D + 2 * C * F + C
    return hidden, hidden + C * F, hidden + 2 * C * F, tiles, tiles + C * F


@triton.jit
def pair_at(befores, aboves, at, LAYERS: tl.constexpr):
    """A block of what belongs to W1 and of what to W3, as pre-activations do; without W3 the first twice."""
    before = tl.load(befores + at)
    above = before
    if LAYERS == 3:
        above = tl.load(aboves + at)
    return before, above


@triton.jit
def hidden_at(befores, aboves, at, LAYERS: tl.constexpr):
    """A block of hidden vectors."""
    before, above = pair_at(befores, aboves, at, LAYERS)
    return hidden_of(before, above, LAYERS)


@triton.jit
def load_norm(norm_ptr, h, D: tl.constexpr, NORM: tl.constexpr):
    """The LayerNorm's scale of a head; zeros, unused, without one."""
    scale = tl.zeros([D], tl.float32)
    if NORM:
        scale = tl.load(norm_ptr + h * D + tl.arange(0, D)).to(tl.float32)
    return scale


@triton.jit
def load_gates(vectors, ends, C: tl.constexpr):
    """A and f of the reads, Λ_c and P_c of the update [C], A_c, f_c and E_c of a step; gate_kernels.py makes them."""
    at = vectors + tl.arange(0, C)
    return (tl.load(at), tl.load(at + C), tl.load(at + 2 * C), tl.load(at + 3 * C), tl.load(ends), tl.load(ends + 1),
            tl.load(ends + 2))  # fmt: skip
