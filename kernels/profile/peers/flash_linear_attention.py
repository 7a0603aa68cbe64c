"""flash-linear-attention's chunked kernels of the gated delta rule and of linear attention with scalar decay."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import Peer


def delta(arguments: Mapping[str, Any]) -> Tensor:
    """``chunk_gated_delta_rule``; its scale is D^-1/2 too."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, beta = (arguments[name] for name in ("q", "k", "v", "beta"))
    return chunk_gated_delta_rule(q, k, v, g=arguments["log_decay"], beta=beta)[0]


def linear(arguments: Mapping[str, Any]) -> Tensor:
    """``chunk_simple_gla``."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    return chunk_simple_gla(q, k, v, g=arguments["log_decay"])[0]


PEER = Peer(
    name="flash-linear-attention",
    package="fla",
    install="pip install flash-linear-attention",
    calls={"delta_rule": delta, "linear_attention": linear},
)
