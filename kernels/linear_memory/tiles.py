"""What the kernels have in common: where a chunk lies, how its tiles are read, and its decay.

Every kernel takes the same constants: H, D, DV, C; the token strides Q_STRIDE, K_STRIDE, V_STRIDE of q, k and v (of all
other token tensors the heads lie close); DELTA, DECAY, PACKED, STATE; PRECISION of float32 products and DTYPE.
"""

import triton
import triton.language as tl


@triton.jit
def chunk_of(slot, table, length, count, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of a chunk and the end of its tokens; both 0 for a slot that is not used."""
    if PACKED:
        return tl.load(table + 2 * slot), tl.load(table + 2 * slot + 1)
    else:
        row = slot // count
        first = row * length + (slot - row * count) * C
        return first, tl.minimum(first + C, (row + 1) * length)


@triton.jit
def sequence_of(row, borders, offset, length, count, C: tl.constexpr, PACKED: tl.constexpr):
    """First token, end, first slot and number of chunks of a sequence."""
    if PACKED:
        start, end = tl.load(borders + row), tl.load(borders + row + 1)
        return start, end, tl.load(offset + row), (end - start + C - 1) // C
    else:
        return row * length, (row + 1) * length, row * count, count


@triton.jit
def tile(x, first, stop, column, STRIDE: tl.constexpr, C: tl.constexpr):
    """Tokens first .. first + C - 1 of x at some columns, [C, columns]; zero from ``stop`` on."""
    i = tl.arange(0, C)
    at = x + first.to(tl.int64) * STRIDE
    return tl.load(at + i[:, None] * STRIDE + column[None, :], mask=(first + i < stop)[:, None], other=0.0)


@triton.jit
def turned(x, first, stop, column, STRIDE: tl.constexpr, C: tl.constexpr):
    """The transpose of :func:`tile`, [columns, C]."""
    i = tl.arange(0, C)
    at = x + first.to(tl.int64) * STRIDE
    return tl.load(at + i[None, :] * STRIDE + column[:, None], mask=(first + i < stop)[None, :], other=0.0)


@triton.jit
def put(x, value, first, stop, column, STRIDE: tl.constexpr, C: tl.constexpr):
    """Write a :func:`tile`."""
    i = tl.arange(0, C)
    at = x + first.to(tl.int64) * STRIDE
    value = value.to(x.dtype.element_ty)
    tl.store(at + i[:, None] * STRIDE + column[None, :], value, mask=(first + i < stop)[:, None])


@triton.jit
def gate(x, first, stop, head, H: tl.constexpr, C: tl.constexpr):
    """A gate of tokens first .. first + C - 1, [C] in float32; zero from ``stop`` on."""
    i = tl.arange(0, C)
    return tl.load(x + first.to(tl.int64) * H + head + i * H, mask=first + i < stop, other=0.0).to(tl.float32)


@triton.jit
def cumulative(log_decay, first, stop, head, H: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr):
    """G [C] and its last value; zeros without decay."""
    if DECAY:
        g = gate(log_decay, first, stop, head, H, C)
        return tl.cumsum(g, 0), tl.sum(g, 0)
    else:
        return tl.zeros([C], tl.float32), 0.0


@triton.jit
def lower(total, C: tl.constexpr, DECAY: tl.constexpr, STRICT: tl.constexpr):
    """Γ_ij = exp(G_i − G_j) for j ≤ i (j < i), else 0: [C, C]."""
    i = tl.arange(0, C)
    inside = i[:, None] > i[None, :] if STRICT else i[:, None] >= i[None, :]
    if DECAY:
        return tl.exp(tl.where(inside, total[:, None] - total[None, :], float("-inf")))
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def upper(total, C: tl.constexpr, DECAY: tl.constexpr, STRICT: tl.constexpr):
    """The transpose of :func:`lower`: exp(G_j − G_i) for i ≤ j."""
    i = tl.arange(0, C)
    inside = i[:, None] < i[None, :] if STRICT else i[:, None] <= i[None, :]
    if DECAY:
        return tl.exp(tl.where(inside, total[None, :] - total[:, None], float("-inf")))
    else:
        return tl.where(inside, 1.0, 0.0)
