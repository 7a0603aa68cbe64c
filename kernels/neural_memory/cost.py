"""What a neural memory costs, from shapes alone."""

from collections.abc import Sequence

from ..newton_schulz.cost import cost as newton_schulz_cost
from ..op import Cost
from .spec import MemorySpec


def matmul_flops(tokens: int, heads: int, widths: Sequence[tuple[int, int]], spec: MemorySpec) -> int:
    """Multiply-adds, twice, of the forward's matrix products; ``widths`` are (in, out) of each matrix.

    Per token and matrix, with n the tokens of a step (a chunk's C, or ``ns_every``) and c the window: the key's pass
    x W, δ Wᵀ where an earlier layer needs it, and the updates of W and S, all (n + c − 1) / n times, for the halo's
    keys are taken again; the query's x W and x S, with kl its x (F(U) − U); its products with the step's X and Δ, the
    causal half of n and the halo, and where gates are of channels that with Δ for W and for S. With muon neither reads
    nor W see these; a step ends in a Newton-Schulz iteration.
    """
    n, halo = spec.step_size, spec.window - 1
    sees = not spec.orthogonal
    reads = 1 + (sees and spec.has_momentum) + (spec.retention == "kl")
    updates = sees + spec.has_momentum
    total = 0
    for i, (a, b) in enumerate(widths):
        back = i == 1 if spec.network == "gated_mlp" else i > 0
        total += 2 * a * b * ((1 + back + updates) * (n + halo) + reads * n)
        if sees:
            twice = spec.gates == "channel" and spec.has_momentum and i == spec.last
            total += n * (a + b * (1 + twice)) * (n + 1 + 2 * halo)
        else:
            total += newton_schulz_cost((a, b), spec.ns_steps).flops
    return tokens * heads * total // n


def halo_numbers(key_dim: int, value_dim: int, spec: MemorySpec) -> int:
    """Numbers that a state holds of the window's last tokens, for one row and head."""
    gates = 2 if spec.bias == "huber" else 1
    return (spec.window - 1) * (key_dim + value_dim + gates)


def gate_numbers(value_dim: int, spec: MemorySpec) -> int:
    """Gates of a token and head."""
    width = value_dim if spec.gates == "channel" else 1
    return width * (1 + spec.retention_gate + spec.momentum_gate) + (spec.window > 1) + (spec.bias == "huber")


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
    per_token = (2 * key_dim + 2 * value_dim) * itemsize + 4 * gate_numbers(value_dim, spec)
    state = 4 * sum(h * a * b for h, a, b in shapes) * (2 if spec.has_momentum else 1)
    state += 4 * heads * halo_numbers(key_dim, value_dim, spec)
    moved = batch * length * heads * per_token + 2 * batch * state
    return Cost(2 * flops, 2 * moved) if backward else Cost(flops, moved)


def kept_numbers(spec: MemorySpec, widths: Sequence[tuple[int, int]]) -> int:
    """Numbers that the torch path keeps of a state for one row and head; ``widths`` are (in, out) of each matrix."""
    copies = 2 if spec.has_momentum else 1
    matrices = sum(a * b for a, b in widths)
    if spec.derived_by_hand:
        return matrices * copies
    return matrices * (copies + 1) + halo_numbers(widths[0][0], widths[spec.last][1], spec)


def segment_chunks(spec: MemorySpec, widths: Sequence[tuple[int, int]]) -> int:
    """G, the steps (chunks, but for ``ns_every``) between two kept states; ``widths`` are (in, out) of each matrix.

    Chosen so that the kept states cost about as much as q, k, v and o do (4 D floats a token and head), and the replay
    of one segment not much more.
    """
    return max(1, -(-kept_numbers(spec, widths) // (4 * widths[0][0] * spec.step_size)))


def kept_every(spec: MemorySpec, widths: Sequence[tuple[int, int]]) -> int:
    """The chunks between two states that a forward in Triton keeps: whole ones, also with ``ns_every``."""
    return -(-segment_chunks(spec, widths) * spec.step_size // spec.chunk_size)


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
    tokens = 2 * value_dim + 2 * (2 * key_dim + value_dim + gate_numbers(value_dim, spec)) + value_dim
    state = kept_numbers(spec, widths)
    return 4.0 * heads * (tokens + state / (spec.step_size * segment_chunks(spec, widths)))
