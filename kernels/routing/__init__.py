"""Routing: which memory takes which token, in what order, and the way there and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import check
from ..op import register
from . import operator, reference
from .cost import combine_cost, dispatch_cost, route_cost

__all__ = ["Routing", "balance_loss", "combine", "dispatch", "route", "router_z_loss"]

ROUTE = register(
    "route", cost=route_cost, reference=reference.route, torch=operator.route, triton=operator.route_triton
)
DISPATCH = register(
    "dispatch",
    cost=dispatch_cost,
    reference=reference.dispatch,
    torch=operator.dispatch,
    triton=operator.dispatch_triton,
)
COMBINE = register(
    "combine", cost=combine_cost, reference=reference.combine, torch=operator.combine, triton=operator.combine_triton
)

MOST = 256  # memories: a token's logits lie in the registers of one program


@dataclass(frozen=True, eq=False)
class Routing:
    """Where tokens go: N rows (or documents), M' memories, K choices a token, S = B T K slots.

    Slots are sorted by row, then memory, then time: the tokens of one memory in one row are one sequence of a packed
    row of S. Shapes depend on those of the logits alone; a memory without tokens is an empty sequence.

    Attributes:
        weight: [B, T, K], of each choice, float32 (float64 for float64 logits); differentiable.
        memory: int64 [B, T, K], which memory a choice goes to, the likeliest first.
        token: int64 [S], the token b T + t that lies in a slot.
        slot: int64 [B, T, K], the slot of a token's choice, the inverse of ``token``.
        cu_seqlens: int32 [N M' + 1], borders of the sequences; memory m of row n is sequence n M' + m.
        probability: [B, T, M], the router's softmax over the routed memories; differentiable.
        memories: M', with the shared one.
        choices: K, with the shared one.
    """

    weight: Tensor
    memory: Tensor
    token: Tensor
    slot: Tensor
    cu_seqlens: Tensor
    probability: Tensor
    memories: int
    choices: int


def route(
    logits: Tensor, top_k: int, *, shared: bool = False, cu_seqlens: Tensor | None = None, backend: str | None = None
) -> Routing:
    """Route every token to its ``top_k`` likeliest memories (Du et al. 2025, Mixture-of-Memories).

        p = softmax(logits)      w_m = p_m / sum of the kept p      for the top_k largest logits, else no choice

    Of equal logits the lower memory wins; one that is not a number is chosen last. Slots come from a counting sort,
    stable in time, on the device: no value is read by the host.

    Args:
        logits: [B, T, M], float16, bfloat16, float32 or float64; the softmax is float32 at least.
        top_k: memories a token goes to, 1 .. M.
        shared: every token also goes to one more memory, M, with weight 1, as its last choice.
        cu_seqlens: int32 [N + 1], borders of documents packed into one row (B = 1): sequences are then those of
            (document, memory).
        backend: "reference", "torch" or "triton" (not float64, M <= 255); None: see
            :func:`palimpsest.kernels.backend.resolve`.

    Returns: a :class:`Routing`.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    check.shape("logits", logits, (None, None, None), "[B, T, M]")
    check.dtype("logits", logits, check.FLOATS)
    check.require(logits.numel() > 0, "logits.shape", tuple(logits.shape), "have a token and a memory")
    batch, length, routed = logits.shape
    check.require(1 <= top_k <= routed, "top_k", top_k, f"be in 1 .. M = {routed}")
    check.sequence_borders(cu_seqlens, batch, length, logits.device)
    unfit = ("M of logits", routed, f"be below {MOST}") if routed >= MOST else check.no_float64("logits", logits)
    chosen = ROUTE.choose(logits.device, backend, unfit)(logits, top_k, shared, cu_seqlens)
    weight, probability, memory, token, slot, borders = chosen
    return Routing(weight, memory, token, slot, borders, probability, routed + shared, top_k + shared)


def dispatch(x: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
    """Tokens in the order of slots: y[0, s] = x at token[s].

    Args:
        x: [B, T, ...], float16, bfloat16, float32 or float64.
        routing: of :func:`route`, for B rows of T tokens.
        backend: "reference", "torch" or "triton" (not float64); None: see
            :func:`palimpsest.kernels.backend.resolve`.

    Returns: [1, S, ...]. The gradient of a token is the sum over its choices, gathered in their order: no atomics.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    check_routing(routing)
    batch, length, _ = routing.slot.shape
    _check_tokens("x", x, (batch, length), "[B, T, ...]", routing)
    implementation = DISPATCH.choose(x.device, backend, check.no_float64("x", x))
    return implementation(_flat(x), routing.token, routing.slot).view(1, -1, *x.shape[2:])


def combine(y: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
    """Weighted sum of what a token's memories said: out[b, t] = sum_k weight[b, t, k] y[0, slot[b, t, k]].

    Args:
        y: [1, S, ...] in the order of slots, float16, bfloat16, float32 or float64; sums are float32 at least.
        routing: of :func:`route`, S slots; its weight gets a gradient.
        backend: "reference", "torch" or "triton" (not float64); None: see
            :func:`palimpsest.kernels.backend.resolve`.

    Returns: [B, T, ...] in the dtype of y.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    check_routing(routing)
    _check_tokens("y", y, (1, routing.token.shape[0]), "[1, S, ...]", routing)
    implementation = COMBINE.choose(y.device, backend, check.no_float64("y", y))
    out = implementation(_flat(y), routing.weight, routing.slot)
    return out.view(*routing.slot.shape[:2], *y.shape[2:])


def balance_loss(routing: Routing) -> Tensor:
    """M sum_m f_m mean(p_m) over the M routed memories (Fedus et al. 2022, Switch Transformers, eq. 4).

    f_m is the share of choices that go to memory m. A uniform router gives 1, one that uses a single memory M. The
    gradient is that of the mean probability alone. Returns a scalar in the dtype of ``probability``.
    """
    probability = routing.probability
    routed = probability.shape[-1]
    lengths = routing.cu_seqlens.diff().view(-1, routing.memories)[:, :routed]
    choices = routing.choices - (routing.memories - routed)
    share = lengths.sum(0).to(probability.dtype) / (choices * probability.shape[0] * probability.shape[1])
    return routed * (share * probability.mean((0, 1))).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (Zoph et al. 2022, ST-MoE, eq. 5), in float32 at least.

    Args:
        logits: [B, T, M].

    Raises:
        ValueError: when ``logits`` is of another shape or dtype.
    """
    check.shape("logits", logits, (None, None, None), "[B, T, M]")
    check.dtype("logits", logits, check.FLOATS)
    return torch.logsumexp(logits.to(check.compute_dtype(logits)), -1).square().mean()


def check_routing(routing: Routing) -> None:
    """Check that an argument is a routing."""
    check.require(isinstance(routing, Routing), "routing", type(routing).__name__, "be a Routing, as route returns")


def _flat(x: Tensor) -> Tensor:
    """All dimensions after the tokens as one."""
    return x.reshape(*x.shape[:2], x.shape[2:].numel())


def _check_tokens(name: str, x: Tensor, sizes: tuple[int, int], layout: str, routing: Routing) -> None:
    check.require(isinstance(x, Tensor), name, type(x).__name__, f"be a tensor {layout}")
    fits = x.dim() >= 2 and tuple(x.shape[:2]) == sizes and x.numel() > 0
    check.require(fits, f"{name}.shape", tuple(x.shape), f"be {layout} = [{sizes[0]}, {sizes[1]}, ...], as routed")
    check.dtype(name, x, check.FLOATS)
    check.device(name, x, routing.slot.device)
