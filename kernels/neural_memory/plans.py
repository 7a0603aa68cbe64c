"""The calls that offline reports and budgets look at: forward and backward at documented shapes, nothing computed."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import neural_memory, neural_memory_state
from .spec import MemorySpec


def call(
    spec: MemorySpec, *, batch: int = 8, length: int = 4096, heads: int = 16, width: int = 64, decode: bool = False
) -> None:
    """One call in bfloat16, forward and backward; ``decode``: one token after a state, forward alone."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype).requires_grad_(not decode)

    shape = batch, length, heads
    q, k, v = (new(*shape, width, dtype=torch.bfloat16) for _ in range(3))
    weights = [new(*s) for s in spec.weight_shapes(heads, width, width)]
    o, _ = neural_memory(
        q,
        k,
        v,
        new(*shape),
        new(*shape) if spec.retention == "l2" else None,
        new(*shape) if spec.has_momentum else None,
        weights=weights,
        spec=spec,
        norm=new(heads, width) if spec.norm else None,
        state=neural_memory_state(weights, batch, spec) if decode else None,
        return_state=decode,
        backend="triton",
    )
    if not decode:
        o.backward(torch.empty_like(o))


#: The H200 shape (batch 8, 4096 tokens, 16 heads of 64, bfloat16) unless a name says otherwise: f is the hidden
#: width, c the chunk, d the head's width.
PLANS: dict[str, Callable[[], None]] = {
    "mlp_f256_c64_bf16": partial(call, MemorySpec()),
    "mlp_f64_c256_bf16": partial(call, MemorySpec(expansion=1, chunk_size=256)),
    "mlp_f256_c16_gd_bf16": partial(call, MemorySpec(chunk_size=16, rule="gd", bias="dot")),
    "mlp_d128_f512_c64_bf16": partial(call, MemorySpec(), heads=8, width=128),
    "linear_c64_bf16": partial(call, MemorySpec("linear")),
    "mlp_f256_decode_bf16": partial(call, MemorySpec(), length=1, decode=True),
}
