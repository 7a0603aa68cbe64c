"""What torch itself has: scaled-dot-product attention, its norms, its convolution, and a loss over full logits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import Peer

MOST_MASKED = 16384  # tokens whose mask, T x T booleans, is still small beside the rest


def attention(arguments: Mapping[str, Any]) -> Tensor:
    """``scaled_dot_product_attention``: causal, or with a mask for a window and a prefix, which stands before k."""
    q, k, v = (arguments[name].transpose(1, 2) for name in "qkv")
    window, prefix = arguments["window"], arguments["prefix"]
    shared = q.shape[1] != k.shape[1]
    if window is None and prefix is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared).transpose(1, 2)
    length, front = q.shape[2], 0 if prefix is None else prefix[0].shape[0]
    if length > MOST_MASKED:
        raise NotImplementedError(f"a mask of {length} tokens squared")
    if prefix is not None:
        k, v = (
            torch.cat([p.transpose(0, 1).expand(x.shape[0], -1, -1, -1), x], 2)
            for p, x in zip(prefix, (k, v), strict=True)
        )
    token, seen = torch.arange(length, device=q.device)[:, None], torch.arange(-front, length, device=q.device)
    mask = (seen < 0) | ((seen <= token) & (seen > token - (window or length)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared).transpose(1, 2)


def loss(arguments: Mapping[str, Any]) -> Tensor:
    """All logits at once, in the dtype of the product; their softmax in float32."""
    x, weight, target = arguments["x"], arguments["weight"], arguments["target"]
    return F.cross_entropy((x @ weight.mT).flatten(0, -2).float(), target.flatten())


def norm(arguments: Mapping[str, Any]) -> Tensor:
    """``rms_norm``, times the gate's SiLU in float32 where there is a gate."""
    x, weight = arguments["x"], arguments["weight"]
    y = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    if "gate" not in arguments:
        return y
    return (y.float() * F.silu(arguments["gate"].float())).to(x.dtype)


def length_one(arguments: Mapping[str, Any]) -> Tensor:
    """``normalize``; its ε bounds the length where ours is added under the root."""
    return F.normalize(arguments["x"].float(), dim=-1).to(arguments["x"].dtype)


def convolution(arguments: Mapping[str, Any]) -> Tensor:
    """A depthwise ``conv1d`` over [B, C, T], and SiLU."""
    x, weight = arguments["x"], arguments["weight"]
    channels, width = weight.shape
    y = F.conv1d(x.mT, weight[:, None], padding=width - 1, groups=channels)[..., : x.shape[1]]
    return F.silu(y).mT


PEER = Peer(
    name="torch.nn",
    package="torch",
    install="pip install torch",
    calls={
        "window_attention": attention,
        "linear_cross_entropy": loss,
        "rms_norm": norm,
        "l2_norm": length_one,
        "short_conv": convolution,
    },
    gpu=False,
)
