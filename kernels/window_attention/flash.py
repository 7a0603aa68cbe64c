"""The flash-attn package, where it is installed and can express the call: the one place that chooses it."""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from ..backend import log_once

WIDEST = 256  # head width


def package(device: torch.device, dtype: torch.dtype, width: int, prefix: bool, state: bool) -> ModuleType | None:
    """The package when it can run this call, else None: half precision on a GPU, no prefix, no cached keys."""
    if device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
        return None
    half = dtype in (torch.float16, torch.bfloat16)
    if not half or width > WIDEST or prefix or state:
        return None
    found = importlib.import_module("flash_attn")
    log_once(f"window_attention: flash-attn {getattr(found, '__version__', 'of unknown version')} on {device.type}")
    return found


def attend(
    module: ModuleType, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """Causal attention by the package, differentiable by autograd."""
    limits = (-1 if window is None else window - 1, 0)
    if cu_seqlens is None:
        return module.flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=limits)
    longest = q.shape[1]  # only sizes the launch; the true lengths lie on the device
    packed = module.flash_attn_varlen_func(
        q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest,
        softmax_scale=scale, causal=True, window_size=limits,
    )  # fmt: skip
    return packed[None]
