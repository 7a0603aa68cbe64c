"""Cross-entropy of a linear map to a vocabulary, never holding all its logits."""

from typing import Literal

import torch
from torch import Tensor

from .. import check
from ..op import register
from . import chunked, fused, reference
from .cost import cost

__all__ = ["linear_cross_entropy"]

OPERATION = register(
    "linear_cross_entropy",
    cost=cost,
    reference=reference.linear_cross_entropy,
    torch=chunked.linear_cross_entropy,
    triton=fused.linear_cross_entropy,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    filter: float | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(x W^T) in nats, never with all logits in memory, forward or backward.

        z = x W^T, or softcap * tanh(x W^T / softcap)
        loss = lse(z) - (1 - s) z_target - s mean(z) + z_loss * lse(z)^2        s = label_smoothing

    After Cut Your Losses (Wijmans et al. 2024), with its gradient filtering; the z-loss is PaLM's (Chowdhery et al.
    2022, section 5).

    Args:
        x: [..., d], float16, bfloat16, float32 or float64. The log-sum-exp is float32 at least.
        weight: [V, d]; a dtype of its own is allowed, and then x's is multiplied with.
        target: int64 [...], in 0 .. V - 1 or ``ignore_index``: such a token has loss 0 and gradient 0.
        reduction: "mean" over the tokens that are not ignored (0 when there are none), "sum", or "none".
        label_smoothing: in [0, 1].
        z_loss: coefficient >= 0.
        softcap: bound of the logits, > 0; None: no bound.
        filter: blocks of 128 tokens and 128 entries in which no |d loss_t / d (x W^T)_tv| reaches it (for plain losses
            the distance of the softmax from the label) count as zero in the backward; their products are skipped. With
            g_t the gradient of loss_t, that of x_t is then off by less than filter * |g_t| * sum_v |W_v|, and that of
            W_v by less than filter * sum_t |g_t x_t|, in every entry. Cut Your Losses takes 2^-12, which bfloat16 loses
            anyway. In (0, 1]; None: exact. Only Triton skips; the others are exact, which is within that bound.
        chunk: as many logits, or gradients of logits, may exist at a time as this many tokens have; None: 2^22 logits
            in plain torch, and 2^26 gradients of logits in Triton's backward, whose forward holds none.
        backend: "reference", "torch" or "triton" (not for float64); None: see
            :func:`palimpsest.kernels.backend.resolve`.

    Returns: the loss, [] or in target's shape, float32 (float64 for float64 x).

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    _check(x, weight, target, ignore_index, reduction, label_smoothing, z_loss, softcap, filter, chunk)
    run = OPERATION.choose(x.device, backend, check.no_float64("x", x))
    loss = run(
        x.flatten(0, -2) if x.dim() > 1 else x[None], weight, target.flatten(), ignore_index, reduction,
        float(label_smoothing), float(z_loss), None if softcap is None else float(softcap), chunk,
        None if filter is None else float(filter),
    )  # fmt: skip
    return loss.view(target.shape) if reduction == "none" else loss


def _check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    filter: float | None,
    chunk: int | None,
) -> None:
    check.require(isinstance(x, Tensor) and x.dim() >= 1, "x", type(x).__name__, "be a tensor [..., d]")
    check.dtype("x", x, check.FLOATS)
    check.shape("weight", weight, (None, x.shape[-1]), "[V, d]")
    check.dtype("weight", weight, check.FLOATS)
    check.shape("target", target, x.shape[:-1], "[...] like x without its last dimension")
    check.dtype("target", target, (torch.int64,))
    check.device("weight", weight, x.device)
    check.device("target", target, x.device)
    check.require(isinstance(ignore_index, int), "ignore_index", repr(ignore_index), "be an integer")
    choices = ("mean", "sum", "none")
    check.require(reduction in choices, "reduction", repr(reduction), 'be "mean", "sum" or "none"')
    check.require(0 <= label_smoothing <= 1, "label_smoothing", label_smoothing, "lie in 0 .. 1")
    check.require(z_loss >= 0, "z_loss", z_loss, "be >= 0")
    check.require(softcap is None or softcap > 0, "softcap", softcap, "be None or > 0")
    check.require(filter is None or 0 < filter <= 1, "filter", filter, "be None or lie in (0, 1]")
    check.require(chunk is None or chunk >= 1, "chunk", chunk, "be None or >= 1")
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and target.numel():
        real = target[target != ignore_index]
        low, high = (int(real.min()), int(real.max())) if real.numel() else (0, 0)
        bound = f"lie in 0 .. V - 1 = {weight.shape[0] - 1} or be ignore_index = {ignore_index}"
        check.require(low >= 0, "target", low, bound)
        check.require(high < weight.shape[0], "target", high, bound)
