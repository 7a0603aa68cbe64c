"""Muon in the Triton kernels of neural memory: W += NS(S) after the last token of a step, and back.

``TURN``: ``("none",)``, or the rule, after how many tokens S is orthogonalised, by how many Newton-Schulz steps, and in
which precision. W then sees nothing of S but this: it is held ``APART``. With muon_gd S starts at zero again;
kernels leave it as it is, for the backward, and the step after has E_c = 0 (``gate_kernels.py``).

Every matrix is taken as [D, F], D the shorter side, in a workspace of its memory, so that all of them go through the
same code. With Y_0 = S / sqrt(‖S‖² + ε²), A = Y Yᵀ and P = b A + c A²:

    Y ← a Y + P Y                                              K times; W += Y
    Ȳ ← a Ȳ + P Ȳ + R Y,    R = b Q + c (T + Tᵀ),  T = Q A,  Q = Ȳ Yᵀ + Y Ȳᵀ     back
    S̄ += (Ȳ_0 − Y_0 ⟨Y_0, Ȳ_0⟩) / sqrt(‖S‖² + ε²)

Singular values that are small at first grow by a = 3.4 a step, and all rounding with them; in the gradient of S those
parts are the larger the smaller they were. So what S is made of (``states.py``), the iteration, and what is made of S's
gradient are float32 products, as torch has them (``set_float32_matmul_precision``), also where tokens have half
precision. docs/neural_memory.md has the figures, and says why it is not one polynomial of S Sᵀ.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import precision
from .generic import NEWTON_SCHULZ
from .spec import MemorySpec
from .tiles import clear, product

A, B, C3, EPS = (tl.constexpr(number) for number in NEWTON_SCHULZ)
APART = tl.constexpr(2)  # a constant ``MOMENTUM`` that is true: there is an S, and no read or write of W sees it


def turn_of(spec: MemorySpec) -> tuple[Any, ...]:
    """The constant ``TURN``."""
    return (spec.rule, spec.step_size, spec.ns_steps, precision(torch.float32)) if spec.orthogonal else ("none",)


def turned_size(constants: Mapping[str, Any]) -> int:
    """Numbers of a memory's workspace, for the kernels of these constants; 1 at least. In the backward: W and S after
    a segment's last step (:func:`through`), then what :func:`turn_backward` needs; else what :func:`turn` does."""
    d, f = constants["D"], constants["F"]
    if constants["TURN"][0] == "none":
        return 1
    if not constants["GRAD"]:
        return 2 * d * f + 2 * d * d
    steps = constants["TURN"][2]
    return (2 * constants["LAYERS"] + steps + 2) * d * f + (2 * steps + 4) * d * d


@triton.jit
def work_of(turned, program, D: tl.constexpr, F: tl.constexpr, LAYERS: tl.constexpr, TURN: tl.constexpr,
            GRAD: tl.constexpr):  # fmt: skip
    """Where a memory's workspace begins, and in it that of Newton-Schulz."""
    if GRAD:
        own = turned + program * ((2 * LAYERS + TURN[2] + 2) * D * F + (2 * TURN[2] + 4) * D * D)
        return own, own + 2 * LAYERS * D * F
    else:
        own = turned + program * (2 * D * F + 2 * D * D)
        return own, own


@triton.jit
def moment_product(a, b, MOMENTUM: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b where b is made of S's gradient: rounded as all others are, but for muon's, whose parts along small
    singular values of S are larger than the rest by as much as a^K, so that their rounding would cover it."""
    if MOMENTUM == APART:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    else:
        return product(a, b, DT, PRECISION)


@triton.jit
def multiply(out, left, right, scale, before, keep, zero, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
             LEFT: tl.constexpr, TURNED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """out = scale * left right, with ADD + keep * before: matrices [ROWS, COLS], row by row in memory. LEFT: numbers in
    a row of ``left``. TURNED: ``right`` is the transpose of what lies there. Barriers belong to the caller."""
    RB: tl.constexpr = ROWS if ROWS < 64 else 64
    CB: tl.constexpr = COLS if COLS < 64 else 64
    DB: tl.constexpr = DEPTH if DEPTH < 32 else 32
    for row in tl.range(0, ROWS + zero, RB, disable_licm=True):
        for col in tl.range(0, COLS + zero, CB, disable_licm=True):
            i = row + tl.arange(0, RB)
            j = col + tl.arange(0, CB)
            total = tl.zeros([RB, CB], tl.float32)
            for depth in tl.range(0, DEPTH + zero, DB, disable_licm=True):
                m = depth + tl.arange(0, DB)
                if TURNED:
                    across = tl.load(right + j[None, :] * DEPTH + m[:, None])
                else:
                    across = tl.load(right + m[:, None] * COLS + j[None, :])
                total += tl.dot(tl.load(left + i[:, None] * LEFT + m[None, :]), across, input_precision=PRECISION)
            total = total * scale
            at = i[:, None] * COLS + j[None, :]
            if ADD:
                total += keep * tl.load(before + at)
            tl.store(out + at, total)


@triton.jit
def twice(out, single, s, double, t, zero, D: tl.constexpr, ADD: tl.constexpr):
    """out = s * (X + Xᵀ), X [D, D] at ``double``; with ADD + t * what lies at ``single``."""
    BLOCK: tl.constexpr = D if D < 32 else 32
    for row in tl.range(0, D + zero, BLOCK, disable_licm=True):
        for col in tl.range(0, D + zero, BLOCK, disable_licm=True):
            i = row + tl.arange(0, BLOCK)
            j = col + tl.arange(0, BLOCK)
            at = i[:, None] * D + j[None, :]
            total = s * (tl.load(double + at) + tl.load(double + j[None, :] * D + i[:, None]))
            if ADD:
                total += t * tl.load(single + at)
            tl.store(out + at, total)


@triton.jit
def take(out, x, tall, zero, D: tl.constexpr, F: tl.constexpr):
    """A matrix [D, F], or one [F, D] (``tall``) transposed, to the workspace; returns the sum of its squares."""
    BLOCK: tl.constexpr = F if F < 32 else 32
    d = tl.arange(0, D)
    total = tl.zeros([D], tl.float32)
    for start in tl.range(0, F + zero, BLOCK, disable_licm=True):
        f = start + tl.arange(0, BLOCK)
        y = tl.load(x + f[None, :] * D + d[:, None]) if tall else tl.load(x + d[:, None] * F + f[None, :])
        total += tl.sum(y * y, 1)
        tl.store(out + d[:, None] * F + f[None, :], y)
    return tl.sum(total)


@triton.jit
def add_block(x, at, y, ADD: tl.constexpr):
    """Adds to a block, or with ADD false replaces it."""
    if ADD:
        y += tl.load(x + at)
    tl.store(x + at, y)


@triton.jit
def give(x, y, scale, more, share, tall, zero, D: tl.constexpr, F: tl.constexpr, ADD: tl.constexpr,
         BOTH: tl.constexpr):  # fmt: skip
    """The way back: to a matrix of the memory, or with ADD false in its place, scale * y, with BOTH + share * more."""
    BLOCK: tl.constexpr = F if F < 32 else 32
    d = tl.arange(0, D)
    for start in tl.range(0, F + zero, BLOCK, disable_licm=True):
        f = start + tl.arange(0, BLOCK)
        at = d[:, None] * F + f[None, :]
        found = scale * tl.load(y + at)
        if BOTH:
            found += share * tl.load(more + at)
        if tall:
            add_block(x, f[None, :] * D + d[:, None], found, ADD)
        else:
            add_block(x, at, found, ADD)


@triton.jit
def polynomial(y, square, p, scale, zero, D: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr):
    """A = scale² Y Yᵀ to ``square``, and P = b A + c A²."""
    tl.debug_barrier()
    multiply(square, y, y, scale * scale, y, 0.0, zero, D, D, F, F, True, False, PRECISION)
    tl.debug_barrier()
    multiply(p, square, square, C3, square, B, zero, D, D, D, D, False, True, PRECISION)
    tl.debug_barrier()


@triton.jit
def turn(weights, moment, factor, work, tall, zero, D: tl.constexpr, F: tl.constexpr, TURN: tl.constexpr):  # fmt: skip
    """W += factor NS(S) of one matrix, by a workspace of 2 D F + 2 D D numbers."""
    SIZE: tl.constexpr = D * F
    square = work + 2 * SIZE
    p = square + D * D
    first = 1.0 / tl.sqrt(take(work, moment, tall, zero, D, F) + EPS * EPS)
    for step in tl.range(0, TURN[2] + zero, disable_licm=True):
        scale = tl.where(step == 0, first, 1.0)
        y = work + step % 2 * SIZE
        polynomial(y, square, p, scale, zero, D, F, TURN[3])
        multiply(work + (1 - step % 2) * SIZE, p, y, scale, y, A * scale, zero, D, F, D, D, False, True, TURN[3])
    tl.debug_barrier()
    give(weights, work + TURN[2] % 2 * SIZE, factor, work, 0.0, tall, zero, D, F, True, False)


@triton.jit
def turn_backward(moment, d_weights, d_moment, work, tall, zero, D: tl.constexpr, F: tl.constexpr,
                  TURN: tl.constexpr):  # fmt: skip
    """Adds to the gradient of S, or with muon_gd makes it, from that of W after :func:`turn`: by a workspace of K + 2
    matrices (the iterates, gradients) and 2 K + 4 squares (A and P of each, and four)."""
    SIZE: tl.constexpr = D * F
    SQUARE: tl.constexpr = D * D
    slopes = work + TURN[2] * SIZE
    squares = slopes + 2 * SIZE
    s = squares + 2 * TURN[2] * SQUARE
    q, t, r = s + SQUARE, s + 2 * SQUARE, s + 3 * SQUARE
    first = 1.0 / tl.sqrt(take(work, moment, tall, zero, D, F) + EPS * EPS)
    for step in tl.range(0, TURN[2] + zero, disable_licm=True):
        scale = tl.where(step == 0, first, 1.0)
        y, square = work + step * SIZE, squares + 2 * step * SQUARE
        polynomial(y, square, square + SQUARE, scale, zero, D, F, TURN[3])
        if step < TURN[2] - 1:
            multiply(y + SIZE, square + SQUARE, y, scale, y, A * scale, zero, D, F, D, D, False, True, TURN[3])
    take(slopes, d_weights, tall, zero, D, F)
    tl.debug_barrier()
    for back in tl.range(0, TURN[2] + zero, disable_licm=True):
        step = TURN[2] - 1 - back
        scale = tl.where(step == 0, first, 1.0)
        y, square = work + step * SIZE, squares + 2 * step * SQUARE
        g, earlier = slopes + back % 2 * SIZE, slopes + (1 - back % 2) * SIZE
        multiply(s, g, y, scale, g, 0.0, zero, D, D, F, F, True, False, TURN[3])
        multiply(earlier, square + SQUARE, g, 1.0, g, A, zero, D, F, D, D, False, True, TURN[3])
        tl.debug_barrier()
        twice(q, s, 1.0, s, 0.0, zero, D, False)
        tl.debug_barrier()
        multiply(t, q, square, 1.0, q, 0.0, zero, D, D, D, D, False, False, TURN[3])
        tl.debug_barrier()
        twice(r, q, C3, t, B, zero, D, True)
        tl.debug_barrier()
        multiply(earlier, r, y, scale, earlier, 1.0, zero, D, F, D, D, False, True, TURN[3])
        tl.debug_barrier()
    g = slopes + TURN[2] % 2 * SIZE
    share = -first * first * first * along(g, work, zero, SIZE)
    give(d_moment, g, first, work, share, tall, zero, D, F, TURN[0] == "muon", True)


@triton.jit
def along(x, y, zero, SIZE: tl.constexpr):
    """⟨x, y⟩."""
    BLOCK: tl.constexpr = 2048 if SIZE % 2048 == 0 else 256
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE + zero, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(x + at) * tl.load(y + at)
    return tl.sum(sums)


@triton.jit
def turn_all(now, turned, program, ends, zero, D: tl.constexpr, F: tl.constexpr, LAYERS: tl.constexpr,
             TURN: tl.constexpr, GRAD: tl.constexpr):  # fmt: skip
    """The end of a step of ``TURN`` tokens: of W1, W2 and W3 that begin at ``now``, and S behind each. ``ends``: the
    call ends here and leaves S = 0."""
    _, work = work_of(turned, program, D, F, LAYERS, TURN, GRAD)
    for layer in tl.range(0, LAYERS + zero, disable_licm=True):
        tall = layer == LAYERS - 1
        weights = tl.where(tall, now[1], tl.where(layer == 0, now[0], now[2]))
        turn(weights, weights + D * F, 1.0, work, tall, zero, D, F, TURN)
        tl.debug_barrier()
        if ends:  # of muon_gd alone
            clear(weights + D * F, zero, D * F)


@triton.jit
def turn_all_backward(now, grads, turned, program, zero, D: tl.constexpr, F: tl.constexpr, LAYERS: tl.constexpr,
                      TURN: tl.constexpr):  # fmt: skip
    """Back through :func:`turn_all`, in place. ``now``: where W and S after it begin; ``grads``: the gradients of W, S
    and the anchor of every matrix."""
    SIZE: tl.constexpr = D * F
    _, work = work_of(turned, program, D, F, LAYERS, TURN, True)
    for layer in tl.range(0, LAYERS + zero, disable_licm=True):
        moment = now + layer * (2 * SIZE) + SIZE
        own = grads + layer * (3 * SIZE)
        turn_backward(moment, own, own + SIZE, work, layer == LAYERS - 1, zero, D, F, TURN)
        tl.debug_barrier()
