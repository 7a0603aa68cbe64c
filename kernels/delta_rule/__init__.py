"""The delta rule, gated or not: a matrix memory in which every token replaces what its key finds.

    W_t = a_t (I − β_t k_tᵀ k_t) W_{t-1} + β_t k_tᵀ v_t  =  a_t W_{t-1} + β_t k_tᵀ (v_t − k_t (a_t W_{t-1}))
    o_t = s q_t W_t

It is one step of size β_t of gradient descent on ½‖k_t W − v_t‖² per token. Source: DeltaNet (Yang et al., 2024b,
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length", eqs. 4 and 8-11) with a = 1; Gated
DeltaNet (Yang et al., 2024, eq. 10), whose α is a here. Chunks by the WY representation and the UT transform.
"""

from torch import Tensor

from .. import check
from ..linear_memory import operator, reference
from ..linear_memory.arguments import call, check_arguments
from ..op import register
from .cost import cost

__all__ = ["delta_rule"]

OPERATION = register(
    "delta_rule",
    cost=cost,
    reference=reference.linear_memory,
    torch=operator.linear_memory,
    triton=operator.linear_memory_triton,
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    state: dict[str, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Correct (k_t → v_t) and read with q_t, causally, for every token; the recurrence at the top of this module.

    It is stable for β_t ‖k_t‖² ≤ 2: keys are to be ℓ2-normalised by the caller.

    Args:
        q: queries [B, T, H, D], float16, bfloat16, float32 or float64.
        k: keys [B, T, H, D], dtype of q.
        v: values [B, T, H, D_v], dtype of q.
        beta: β, how much of the error is corrected, [B, T, H], float32 (float64 with float64 q). 0 writes nothing.
        log_decay: log a ≤ 0, [B, T, H], dtype of beta; None: a = 1. Finite.
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
    check.require(isinstance(beta, Tensor), "beta", type(beta).__name__, "be a tensor [B, T, H]")
    check_arguments(q, k, v, {"beta": beta, "log_decay": log_decay}, scale, state, cu_seqlens, chunk_size)
    run = OPERATION.choose(q.device, backend, operator.unfit(q, v, chunk_size))
    return call(run, q, k, v, beta, log_decay, scale, state, cu_seqlens, chunk_size, return_state)
