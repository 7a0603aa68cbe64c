"""Conformance cases of routing: what it gives a token, and the way to the memories and back."""

from functools import partial
from typing import Any

import torch
from harness import Draw, OperationCase, register_case
from torch import Tensor

from palimpsest.kernels import combine, dispatch, route
from palimpsest.kernels.op import Cost
from palimpsest.kernels.routing.cost import combine_cost, route_cost

MEMORIES, TOP_K = 5, 2


def make_logits(draw: Draw, batch: int, length: int) -> dict[str, Any]:
    """Five memories."""
    return {"logits": draw.normal(batch, length, MEMORIES)}


def call_route(logits: Tensor, *, shared: bool, cu_seqlens: Tensor | None = None, backend: str) -> Tensor:
    """Weights, probabilities and memories of each token."""
    r = route(logits, TOP_K, shared=shared, cu_seqlens=cu_seqlens, backend=backend)
    return torch.cat([r.weight, r.probability, r.memory.to(r.weight.dtype)], -1)


def route_costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward."""
    shape = arguments["logits"].shape
    return route_cost(shape, TOP_K), route_cost(shape, TOP_K, backward=True)


def make_tokens(draw: Draw, batch: int, length: int, *, width: int, choices: int) -> dict[str, Any]:
    """Tokens and what chooses their memories."""
    logits = draw.normal(batch, length, MEMORIES)
    return {"x": draw.normal(batch, length, width), "logits": logits, "choices": choices}


def call_dispatch(
    x: Tensor, logits: Tensor, choices: int, *, cu_seqlens: Tensor | None = None, backend: str
) -> Tensor:  # fmt: skip
    """What lies in each token's slots, [B, T, K C]."""
    routing = route(logits, choices, cu_seqlens=cu_seqlens, backend="torch")
    return dispatch(x, routing, backend)[0][routing.slot].flatten(2)


def call_combine(
    x: Tensor, logits: Tensor, choices: int, *, cu_seqlens: Tensor | None = None, backend: str
) -> Tensor:  # fmt: skip
    """Each token's slots, weighted, with the shared memory; x [B, T, K C] holds what is in them."""
    routing = route(logits, choices - 1, shared=True, cu_seqlens=cu_seqlens, backend="torch")
    parts = x.unflatten(-1, (choices, -1)).flatten(0, 2)
    return combine(torch.zeros_like(parts).index_put((routing.slot.flatten(),), parts)[None], routing, backend)


def combine_costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward, with those of the routing."""
    x, logits, choices = arguments["x"].shape, arguments["logits"].shape, arguments["choices"]
    shapes = (1, x[0] * x[1] * choices, x[2] // choices), (x[0], x[1], choices)
    forward, backward = combine_cost(*shapes), combine_cost(*shapes, backward=True)
    return forward + route_cost(logits, choices - 1), backward + route_cost(logits, choices - 1, backward=True)


EVERY = ("reference", "torch", "triton")

for shared in (False, True):
    register_case(
        OperationCase(
            name=f"route/{'shared' if shared else 'plain'}",
            operation="route",
            call=partial(call_route, shared=shared),
            make=make_logits,
            tokens=("logits",),
            packed=True,
            block=4,
            cost=route_costs,
            backends=EVERY if shared else EVERY[:2],
        )
    )

register_case(
    OperationCase(
        name="dispatch",
        operation="dispatch",
        call=call_dispatch,
        make=partial(make_tokens, width=6, choices=3),
        tokens=("x", "logits"),
        packed=True,
        block=4,
        backends=EVERY,
    )
)

register_case(
    OperationCase(
        name="combine",
        operation="combine",
        call=call_combine,
        make=partial(make_tokens, width=18, choices=3),
        tokens=("x", "logits"),
        packed=True,
        block=4,
        cost=combine_costs,
        backends=EVERY,
    )
)
