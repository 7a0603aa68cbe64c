"""The calls that offline reports and budgets look at: forward and backward at documented shapes, nothing computed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import neural_memory, neural_memory_state
from .spec import MemorySpec


def call(
    spec: MemorySpec, *, width: int = 64, batch: int = 8, length: int = 4096, packed: bool = False, decode: bool = False
) -> None:
    """One call in bfloat16 with heads of ``width``, 1,024 channels in all, forward and backward. ``packed``: the
    sequences as one row of documents, each after a state. ``decode``: one token after a state, forward alone."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype).requires_grad_(not decode)

    heads = 1024 // width
    shape = (1, batch * length, heads) if packed else (batch, length, heads)
    q, k, v = (new(*shape, width, dtype=torch.bfloat16) for _ in range(3))
    weights = [new(*s) for s in spec.weight_shapes(heads, width, width)]
    o, _ = neural_memory(
        q,
        k,
        v,
        new(*shape),
        new(*shape) if spec.retention_gate else None,
        new(*shape) if spec.momentum_gate else None,
        weights=weights,
        spec=spec,
        norm=new(heads, width) if spec.norm else None,
        gamma=new(*shape) if spec.window > 1 else None,
        delta=new(*shape) if spec.bias == "huber" else None,
        state=neural_memory_state(weights, batch, spec) if packed or decode else None,
        cu_seqlens=torch.arange(0, batch * length + 1, length, dtype=torch.int32) if packed else None,
        return_state=decode,
        backend="triton",
    )
    if not decode:
        o.backward(torch.empty_like(o))


def plan(*, width: int = 64, packed: bool = False, **choices: Any) -> Callable[[], None]:
    """A call of the memory that these choices make."""
    return partial(call, MemorySpec(**choices), width=width, packed=packed)


#: At the H200 shape (batch 8, 4096 tokens, 16 heads of 64, bfloat16) unless a name says otherwise: f is the hidden
#: width, c the chunk, d the head's width.
PLANS: dict[str, Callable[[], None]] = {
    "mlp_f256_c64_bf16": plan(),
    "linear_c16_dot_gd_packed_bf16": plan(
        packed=True, network="linear", residual=True, bias="dot", rule="gd", chunk_size=16
    ),
    "mlp_d128_f512_c64_bf16": plan(width=128),
    "mlp_d128_f128_c128_plain_dot_gd_late_packed_bf16": plan(
        width=128,
        packed=True,
        expansion=1,
        norm=False,
        bias="dot",
        rule="gd",
        chunk_size=128,
        read_after_write=False,
    ),
    "linear_d128_c32_norm_dot_gd_late_packed_bf16": plan(
        width=128,
        packed=True,
        network="linear",
        norm=True,
        residual=True,
        bias="dot",
        rule="gd",
        chunk_size=32,
        read_after_write=False,
    ),
    "mlp_f256_decode_bf16": partial(call, MemorySpec(), length=1, decode=True),
}

#: With the plans, every pair of the memory's choices: which network, widths, LayerNorm, residual, bias, decay, rule,
#: chunk, order of read and write, packed or not. Too many to compile in a test;
#: `python -m palimpsest.kernels.profile variants --only neural_memory` does.
VARIANTS: dict[str, Callable[[], None]] = {
    "mlp_f64_c64_bf16": plan(expansion=1),
    "mlp_f64_c32_plain_late_bf16": plan(
        expansion=1, norm=False, residual=False, retention="none", chunk_size=32, read_after_write=False
    ),
    "linear_d32_c64_dot_gd_late_packed_bf16": plan(
        width=32, packed=True, network="linear", bias="dot", retention="none", rule="gd", read_after_write=False
    ),
    "linear_d32_c128_norm_bf16": plan(width=32, network="linear", norm=True, chunk_size=128),
    "mlp_d32_f32_c16_bf16": plan(width=32, expansion=1, retention="none", chunk_size=16),
    "mlp_d32_f128_c32_plain_gd_bf16": plan(width=32, norm=False, retention="none", rule="gd", chunk_size=32),
    "mlp_f256_c256_dot_bf16": plan(bias="dot", retention="none", chunk_size=256),
    "mlp_d128_f512_c16_plain_late_packed_bf16": plan(
        width=128,
        packed=True,
        norm=False,
        residual=False,
        retention="none",
        chunk_size=16,
        read_after_write=False,
    ),
    # Other biases, each with both networks, of wide heads and others.
    "mlp_f256_c64_huber_packed_bf16": plan(packed=True, bias="huber"),
    "mlp_d128_f128_c64_huber_plain_gd_bf16": plan(width=128, expansion=1, bias="huber", norm=False, rule="gd"),
    "linear_d32_c16_norm_huber_gd_late_bf16": plan(
        width=32, network="linear", bias="huber", norm=True, rule="gd", chunk_size=16, read_after_write=False
    ),
    "mlp_f64_c32_lp_bf16": plan(expansion=1, bias="lp", chunk_size=32),
    "mlp_d128_f512_c64_lp_gd_packed_bf16": plan(width=128, packed=True, bias="lp", lp_power=2.5, rule="gd"),
    "linear_c64_lp_bf16": plan(network="linear", bias="lp"),
    # Other retentions, likewise.
    "mlp_f256_c64_norm_retention_packed_bf16": plan(packed=True, retention="norm"),
    "mlp_d128_f128_c64_plain_gd_norm_retention_bf16": plan(
        width=128, expansion=1, norm=False, rule="gd", retention="norm"
    ),
    "linear_d32_c16_norm_retention_bf16": plan(width=32, network="linear", retention="norm", chunk_size=16),
    "mlp_f256_c64_lp_lq_bf16": plan(bias="lp", retention="lq"),
    "mlp_d128_f128_c64_plain_gd_lq_packed_bf16": plan(
        width=128, packed=True, expansion=1, norm=False, rule="gd", retention="lq", lq_power=3.0
    ),
    "linear_d32_c16_lq_bf16": plan(width=32, network="linear", retention="lq", chunk_size=16),
    "mlp_f256_c64_kl_packed_bf16": plan(packed=True, retention="kl"),
    "mlp_d128_f128_c64_plain_gd_kl_bf16": plan(width=128, expansion=1, norm=False, rule="gd", retention="kl"),
    "linear_d32_c16_kl_bf16": plan(width=32, network="linear", retention="kl", chunk_size=16),
    # The gated network: three matrices.
    "gated_f256_c64_bf16": plan(network="gated_mlp"),
    "gated_d128_f128_c64_plain_gd_packed_bf16": plan(
        width=128, packed=True, network="gated_mlp", expansion=1, norm=False, rule="gd"
    ),
    "gated_d128_f512_c64_bf16": plan(width=128, network="gated_mlp"),
    "gated_d32_f64_c32_lp_lq_packed_bf16": plan(
        width=32, packed=True, network="gated_mlp", expansion=2, bias="lp", retention="lq", chunk_size=32
    ),
    # Muon.
    "mlp_f256_c64_muon_bf16": plan(rule="muon"),
    "linear_d32_c32_muon_packed_bf16": plan(width=32, packed=True, network="linear", rule="muon", chunk_size=32),
    "gated_f256_c64_muon_gd_norm_retention_bf16": plan(network="gated_mlp", rule="muon_gd", retention="norm"),
    "mlp_d128_f128_c128_plain_muon_gd_packed_bf16": plan(
        width=128, packed=True, expansion=1, norm=False, rule="muon_gd", chunk_size=128, ns_every=64
    ),
    "mlp_f256_muon_decode_bf16": partial(call, MemorySpec(rule="muon"), length=1, decode=True),
    "gated_f256_decode_bf16": partial(call, MemorySpec(network="gated_mlp"), length=1, decode=True),
    # Windows: that of ATLAS; a linear memory with one; one so wide that steps have 16 tokens of their own, in chunks.
    "mlp_f256_c64_window16_bf16": plan(window=16),
    "mlp_f256_c64_muon_window16_bf16": plan(rule="muon", window=16),
    "linear_c16_dot_gd_window16_packed_bf16": plan(
        packed=True, network="linear", residual=True, bias="dot", rule="gd", chunk_size=16, window=16
    ),
    "linear_d128_c64_huber_late_window17_bf16": plan(
        width=128, network="linear", norm=True, bias="huber", read_after_write=False, window=17
    ),
    "mlp_f256_window16_decode_bf16": partial(call, MemorySpec(window=16), length=1, decode=True),
    "mlp_f256_huber_norm_retention_decode_bf16": partial(
        call, MemorySpec(bias="huber", retention="norm"), length=1, decode=True
    ),
    "mlp_f256_lp_lq_decode_bf16": partial(call, MemorySpec(bias="lp", retention="lq"), length=1, decode=True),
    "mlp_f256_kl_decode_bf16": partial(call, MemorySpec(retention="kl"), length=1, decode=True),
}
