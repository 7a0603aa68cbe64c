"""Linear attention with a decay per head and token: a matrix memory to which every token adds.

    W_t = a_t W_{t-1} + k_tᵀ v_t
    o_t = s q_t W_t

Source: Katharopoulos et al. (2020), eqs. 16-20, without its feature map and normaliser. With a constant a it is RetNet
(Sun et al., 2023, eq. 6); with a_t = exp(−Δ_t A) Mamba-2's SSD (Dao and Gu, 2024, eq. 1); with a gate from the data the
scalar case of GLA (Yang et al., 2023, eq. 3). The chunked form is that of GLA, section 4.
"""

from torch import Tensor

from ..linear_memory import operator, reference
from ..linear_memory.arguments import call, check_arguments
from ..op import register
from .cost import cost

__all__ = ["linear_attention"]

OPERATION = register(
    "linear_attention",
    cost=cost,
    reference=reference.linear_memory,
    torch=operator.linear_memory,
    triton=operator.linear_memory_triton,
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    state: dict[str, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Write (k_t → v_t) and read with q_t, causally, for every token; the recurrence at the top of this module.

    Args:
        q: queries [B, T, H, D], float16, bfloat16, float32 or float64.
        k: keys [B, T, H, D], dtype of q.
        v: values [B, T, H, D_v], dtype of q.
        log_decay: log a ≤ 0, [B, T, H], float32 (float64 with float64 q); None: a = 1. Finite.
        scale: s; None: D^-1/2.
        state: {"memory": [N, H, D, D_v]} float32 (float64 with float64 q), where an earlier call ended; N = B, or the
            number of packed sequences. None: zeros.
        cu_seqlens: int32 [N + 1] borders of packed sequences, B = 1, which never see each other.
        return_state: also return the state after the last token.
        chunk_size: tokens computed at once; it changes the speed, and the result by rounding alone.
        backend: "reference", "torch" or "triton" (D from 16 to 128 and D_v from 16 to 256, powers of 2; ``chunk_size``
            16, 32 or 64; not float64); None: see :func:`palimpsest.kernels.backend.resolve`.

    Returns:
        o [B, T, H, D_v] in v's dtype, and the state or None. Products accumulate in float32 at least.

    Raises:
        ValueError: for a wrong shape, dtype or device, naming the argument.
    """
    check_arguments(q, k, v, {"log_decay": log_decay}, scale, state, cu_seqlens, chunk_size)
    run = OPERATION.choose(q.device, backend, operator.unfit(q, v, chunk_size))
    return call(run, q, k, v, None, log_decay, scale, state, cu_seqlens, chunk_size, return_state)
