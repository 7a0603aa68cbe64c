"""Causal attention on a GPU by kernels that exist: the flash-attn package, and torch's own. The one place that chooses.

These run outside the registered operator, under autograd and as operators of their own.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import log_once

WIDEST = 256  # head width that flash-attn takes

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, int | None, float], Tensor]


def choose(device: torch.device, dtype: torch.dtype, width: int, everything: bool) -> Run | None:
    """A function of (q, k, v, cu_seqlens, window, scale) for attention without prefix and cache, or None.

    Args:
        width: of a head.
        everything: every token sees all tokens before it; no window, no documents.
    """
    if device.type != "cuda":
        return None
    compiling = torch.compiler.is_compiling()
    half = dtype in (torch.float16, torch.bfloat16)
    if half and width <= WIDEST and importlib.util.find_spec("flash_attn") is not None:
        package = importlib.import_module("flash_attn")
        if not compiling:
            log_once(f"window_attention: flash-attn {getattr(package, '__version__', 'of unknown version')}")
        return partial(flash_attention, package)
    if everything:
        if not compiling:
            log_once("window_attention: scaled_dot_product_attention for full attention")
        return scaled_dot_product
    return None


def flash_attention(
    package: ModuleType, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """By the flash-attn package."""
    options = {"softmax_scale": scale, "causal": True, "window_size": (-1 if window is None else window - 1, 0)}
    if cu_seqlens is None:
        return package.flash_attn_func(q, k, v, **options)
    longest = q.shape[1]  # only sizes the launch; the true lengths lie on the device
    packed = (q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest)
    return package.flash_attn_varlen_func(*packed, **options).unsqueeze(0)


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """By torch: full attention alone."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
