"""liger-kernel's fused linear cross-entropy and RMSNorm."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import Peer


def loss(arguments: Mapping[str, Any]) -> Tensor:
    """``LigerFusedLinearCrossEntropyLoss``, over tokens in one row."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    x, target = arguments["x"].flatten(0, -2), arguments["target"].flatten()
    return LigerFusedLinearCrossEntropyLoss()(arguments["weight"], x, target)


def norm(arguments: Mapping[str, Any]) -> Tensor:
    """``LigerRMSNormFunction``, which must not overwrite the gradient that it is given."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if "gate" in arguments:
        raise NotImplementedError("liger-kernel has no gated RMSNorm")
    return LigerRMSNormFunction.apply(arguments["x"], arguments["weight"], 1e-6, 0.0, "llama", False)


PEER = Peer(
    name="liger-kernel",
    package="liger_kernel",
    install="pip install liger-kernel",
    calls={"linear_cross_entropy": loss, "rms_norm": norm},
)
