"""What a linear memory costs, from shapes alone."""

from ..op import Cost


def matmul_flops(tokens: int, heads: int, key_dim: int, value_dim: int, chunk: int, delta: bool) -> int:
    """Multiply-adds, twice, of the forward's matrix products.

    Per token: q S and kᵀ w into S, 2 D D_v each; scores and their use, the causal half of C each. The delta rule adds
    k S, K Kᵀ, N times keys and values, all causal halves, and the inverse N, C³/3 a chunk.
    """
    per_token = 4 * key_dim * value_dim + (chunk + 1) * (key_dim + value_dim)
    if delta:
        per_token += 2 * key_dim * value_dim + (chunk + 1) * (2 * key_dim + value_dim) + chunk * chunk // 3
    return tokens * heads * per_token


def linear_memory_cost(
    batch: int,
    length: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    delta: bool,
    decay: bool = True,
    chunk_size: int = 64,
    itemsize: int = 4,
    backward: bool = False,
) -> Cost:
    """Cost of one call; ``backward`` gives that of the backward alone, twice the products of the forward.

    Bytes: q, k, v, o and the gates once (and their gradients in the backward), and one state in and out per row.
    """
    flops = matmul_flops(batch * length, heads, key_dim, value_dim, min(chunk_size, length), delta)
    per_token = (2 * key_dim + 2 * value_dim) * itemsize + 4 * (delta + decay)
    moved = batch * length * heads * per_token + 2 * batch * heads * key_dim * value_dim * 4
    return Cost(2 * flops, 2 * moved) if backward else Cost(flops, moved)
