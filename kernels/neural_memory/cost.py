"""What a neural memory costs, from shapes alone."""

from collections.abc import Sequence

from ..op import Cost
from .spec import MemorySpec


def matmul_flops(tokens: int, heads: int, widths: Sequence[tuple[int, int]], spec: MemorySpec) -> int:
    """Multiply-adds, twice, of the forward's matrix products; ``widths`` are (in, out) of each layer.

    Per token and layer, with C the chunk: the key's pass x W, the query's x W and x S, its products with the chunk's
    X and Δ (the causal half of C), the updates of W and S, and δ Wᵀ for every layer but the first.
    """
    copies = 2 if spec.has_momentum else 1
    total = 0
    for i, (a, b) in enumerate(widths):
        matrices = 1 + copies + copies + (1 if i else 0)
        total += 2 * a * b * matrices + (a + b) * (spec.chunk_size + 1)
    return tokens * heads * total


def cost(
    batch: int,
    length: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    spec: MemorySpec,
    *,
    itemsize: int = 4,
    backward: bool = False,
) -> Cost:
    """Cost of one call; ``backward`` gives that of the backward alone, twice the products of the forward (the replay of
    the forward is an implementation's price, not the operation's).

    Bytes: q, k, v, o and the gates once (and their gradients in the backward), and one state in and out per row.
    """
    shapes = spec.weight_shapes(heads, key_dim, value_dim)
    flops = matmul_flops(batch * length, heads, [(a, b) for _, a, b in shapes], spec)
    gates = 4 * (1 + (spec.retention == "l2") + spec.has_momentum)
    per_token = (2 * key_dim + 2 * value_dim) * itemsize + gates
    state = 4 * sum(h * a * b for h, a, b in shapes) * (2 if spec.has_momentum else 1)
    moved = batch * length * heads * per_token + 2 * batch * state
    return Cost(2 * flops, 2 * moved) if backward else Cost(flops, moved)


def segment_chunks(spec: MemorySpec, widths: Sequence[tuple[int, int]]) -> int:
    """G, the chunks between two kept states; ``widths`` are (in, out) of each layer.

    Chosen so that the kept states cost about as much as q, k, v and o do (4 D floats a token and head), and the replay
    of one segment not much more.
    """
    state = sum(a * b for a, b in widths) * (2 if spec.has_momentum else 1)
    return max(1, -(-state // (4 * widths[0][0] * spec.chunk_size)))


def kept_slots(tokens: int, rows: int, chunk: int, every: int) -> int:
    """How many states a forward in Triton keeps at most: known from shapes alone, and so is each sequence's place among
    them, cu_seqlens[n] // (chunk every) + n."""
    return tokens // (chunk * every) + rows


def training_bytes_per_token(heads: int, key_dim: int, value_dim: int, spec: MemorySpec) -> float:
    """Bytes that forward and backward of the torch path hold at their peak, per token of one row, in float32.

    At the peak, in the backward: o and its gradient; q, k, v, the gates and o's gradient laid out by head; the
    gradients of q, k, v and the gates laid out alike; and one kept state every G chunks. What does not grow with T
    (the replay of one segment, the weights' gradients) is not in it, nor are the inputs themselves.
    """
    widths = [(a, b) for _, a, b in spec.weight_shapes(heads, key_dim, value_dim)]
    gates = 1 + (spec.retention == "l2") + spec.has_momentum
    tokens = 2 * value_dim + 2 * (2 * key_dim + value_dim + gates) + value_dim
    state = sum(a * b for a, b in widths) * (2 if spec.has_momentum else 1)
    return 4.0 * heads * (tokens + state / (spec.chunk_size * segment_chunks(spec, widths)))
