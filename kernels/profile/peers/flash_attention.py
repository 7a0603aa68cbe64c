"""flash-attn's kernel, which has windows and grouped queries but no prefix."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import Peer


def attention(arguments: Mapping[str, Any]) -> Tensor:
    """``flash_attn_func``; a window counts the tokens before this one."""
    from flash_attn import flash_attn_func

    if arguments["prefix"] is not None:
        raise NotImplementedError("flash-attn has no prefix beside a window")
    window = arguments["window"]
    before = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn_func(arguments["q"], arguments["k"], arguments["v"], causal=True, window_size=before)


PEER = Peer(
    name="flash-attn",
    package="flash_attn",
    install="pip install flash-attn --no-build-isolation",
    calls={"window_attention": attention},
)
