"""Conformance cases of neural memory: a covering array, in which every pair of choices occurs together."""

from functools import partial
from typing import Any

import torch
from harness import EXACT, SINGLE, Draw, OperationCase, register_case

from palimpsest.kernels import MemorySpec, neural_memory
from palimpsest.kernels.neural_memory.cost import cost
from palimpsest.kernels.op import Cost

HEADS, WIDTH = 2, 4

#: network, depth, norm, residual, bias, retention, rule, chunk_size, read_after_write
ROWS = {
    "titans": ("mlp", 2, True, True, "l2", "l2", "momentum", 8, True),
    "titans_read_before": ("mlp", 2, True, True, "l2", "l2", "momentum", 4, False),
    "mlp_plain": ("mlp", 2, False, False, "l2", "none", "gd", 8, False),
    "mlp_dot": ("mlp", 2, False, True, "dot", "l2", "gd", 4, True),
    "mlp_dot_norm": ("mlp", 2, True, False, "dot", "none", "momentum", 1, True),
    "deep": ("mlp", 3, True, True, "l2", "none", "momentum", 4, True),
    "deepest": ("mlp", 4, False, True, "dot", "l2", "momentum", 8, False),
    "online": ("mlp", 2, True, True, "l2", "l2", "gd", 1, False),
    "linear": ("linear", 1, False, False, "l2", "l2", "momentum", 8, True),
    "linear_dot": ("linear", 1, False, False, "dot", "l2", "gd", 4, False),
    "ttt_linear": ("linear", 1, True, True, "l2", "none", "gd", 8, True),
    "linear_online": ("linear", 1, False, True, "l2", "none", "momentum", 1, False),
    "linear_dot_norm": ("linear", 1, True, False, "dot", "l2", "momentum", 4, True),
}
# A LayerNorm inside the memory puts 1/std into the inner gradient and 1/std³ into its derivative, once per token: the
# reference itself, run in float32, ends up to 3e-5 from its float64 self here, and 1e-13 is as far in float64.
NORM_SINGLE, NORM_EXACT = 1e-4, 1e-11
FIELDS = ("network", "depth", "norm", "residual", "bias", "retention", "rule", "chunk_size", "read_after_write")


def make(
    draw: Draw, batch: int, length: int, *, spec: MemorySpec, heads: int = HEADS, width: int = WIDTH
) -> dict[str, Any]:
    """Unit keys and queries, gates as a layer would give them, steps that keep the recurrence stable."""
    # Gates stay in float32 where tokens are halves, as the operation demands.
    gate = torch.float64 if draw.dtype == torch.float64 else torch.float32
    shape = (batch, length, heads)
    q, k = (torch.nn.functional.normalize(draw.normal(*shape, width), dim=-1) for _ in range(2))
    own = Draw(5, torch.float64)  # parameters: the same for every batch and length
    shapes = spec.weight_shapes(heads, width, width)
    unlike = 0.0 if spec.retention == "kl" else 0.5  # of kl these are logarithms: if near, all outputs are nearly one
    return {
        "q": q,
        "k": k,
        "v": draw.normal(*shape, width),
        "step": draw.uniform(0.02, 0.2, *shape, dtype=gate),
        "log_retain": draw.uniform(-0.3, -0.01, *shape, dtype=gate) if spec.retention_gate else None,
        "log_momentum": draw.uniform(-2.0, -0.2, *shape, dtype=gate) if spec.momentum_gate else None,
        "gamma": draw.uniform(0.2, 1.0, *shape, dtype=gate) if spec.window > 1 else None,
        "delta": draw.uniform(0.25, 1.0, *shape, dtype=gate) * width**0.5 if spec.bias == "huber" else None,
        "weights": [own.normal(*s, scale=s[1] ** -unlike, dtype=draw.dtype) for s in shapes],
        "norm": own.uniform(0.5, 1.5, heads, width, dtype=draw.dtype) if spec.norm else None,
        "spec": spec,
    }


def costs(arguments: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of forward and backward."""
    batch, length, heads, width = arguments["q"].shape
    shapes = batch, length, heads, width, arguments["v"].shape[-1], arguments["spec"]
    return cost(*shapes), cost(*shapes, backward=True)


def memory(row: tuple[Any, ...], expansion: int = 2) -> MemorySpec:
    """The memory of a row."""
    return MemorySpec(expansion=expansion, **dict(zip(FIELDS, row, strict=True)))  # type: ignore[arg-type]


def register(name: str, spec: MemorySpec, block: int, **options: Any) -> None:
    """Add a case; ``options`` are those of the case, and the ``heads`` and ``width`` of its arguments."""
    sizes = {key: options.pop(key) for key in ("heads", "width") if key in options}
    settings: dict[str, Any] = {
        "single": NORM_SINGLE if spec.norm else SINGLE,
        "exact": NORM_EXACT if spec.norm else EXACT,
    }
    register_case(
        OperationCase(
            name=f"neural_memory/{name}",
            operation="neural_memory",
            call=neural_memory,
            make=partial(make, spec=spec, **sizes),
            tokens=("q", "k", "v", "step", "log_retain", "log_momentum", "gamma", "delta"),
            state=True,
            packed=True,
            block=block,
            cost=costs,
            **(settings | options),
        )
    )


#: What the interpreter runs all checks of, as small as the kernels go; test_neural_memory_triton.py has an array of all
#: choices. A block of half a chunk: states in the middle of one, and sequences that end in the second.
TRITON = ("mlp", 2, True, True, "l2", "l2", "momentum", 16, True)

#: All there is of tensors and layers: the others differ from one of these in numbers.
OPERATORS = ("titans", "mlp_plain", "deepest", "linear")

for name, row in ROWS.items():
    spec = memory(row)
    register(name, spec, max(spec.chunk_size, 3), operator=name in OPERATORS)
register("triton", memory(TRITON, 1), 8, heads=1, width=16, single=1e-5, backends=("triton",))
