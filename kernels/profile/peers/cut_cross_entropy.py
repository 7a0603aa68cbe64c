"""cut-cross-entropy's kernel, once as it comes (small gradients dropped, ``filter_eps="high"``)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import Peer


def loss(arguments: Mapping[str, Any]) -> Tensor:
    """``linear_cross_entropy`` of that package."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(arguments["x"], arguments["weight"], arguments["target"])


PEER = Peer(
    name="cut-cross-entropy",
    package="cut_cross_entropy",
    install="pip install cut-cross-entropy",
    calls={"linear_cross_entropy": loss},
)
