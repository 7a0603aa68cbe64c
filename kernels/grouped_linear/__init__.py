"""A linear map per memory over routed tokens, all in one product."""

from torch import Tensor

from .. import check
from ..op import register
from ..routing import Routing, check_routing
from . import operator, reference
from .cost import cost

__all__ = ["grouped_linear"]

OPERATION = register(
    "grouped_linear",
    cost=cost,
    reference=reference.grouped_linear,
    torch=operator.grouped_linear,
    triton=operator.grouped_linear_triton,
)


def grouped_linear(x: Tensor, weight: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
    """Every slot's token times the matrix of the slot's memory; tokens are read where they lie.

        y[0, s] = x[token of s] @ weight[memory of s]

    Args:
        x: [B, T, in], float16, bfloat16, float32 or float64; sums are float32 at least.
        weight: [M', in, out], a matrix for each memory, the shared one included. A dtype of its own is allowed: the
            product is made in that of x.
        routing: of :func:`palimpsest.kernels.route`, for B rows of T tokens and M' memories.
        backend: "reference", "torch" or "triton" (not float64); None: see
            :func:`palimpsest.kernels.backend.resolve`. "torch" reads the borders of sequences on a CPU; elsewhere it
            must not, and multiplies every token with the matrix of every memory.

    Returns: y [1, S, out] in the order of slots. Gradients are added up in a fixed order, that of a weight in the order
    of its memory's slots: no atomics.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    check_routing(routing)
    batch, length, _ = routing.slot.shape
    check.shape("x", x, (batch, length, None), "[B, T, in], as routed")
    check.dtype("x", x, check.FLOATS)
    check.shape("weight", weight, (routing.memories, x.shape[2], None), "[M', in, out]")
    check.require(weight.numel() > 0, "weight.shape", tuple(weight.shape), "have an entry")
    check.dtype("weight", weight, check.FLOATS)
    for name, tensor in {"weight": weight, "routing": routing.slot}.items():
        check.device(name, tensor, x.device)
    implementation = OPERATION.choose(x.device, backend, check.no_float64("x", x))
    return implementation(x, weight, routing.token, routing.slot, routing.cu_seqlens)
