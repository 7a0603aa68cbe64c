"""Cross-entropy over a vocabulary, one token at a time."""

import torch
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk: int | None,
    threshold: float | None,
) -> Tensor:
    """The loss of x [N, d] and target [N], as the public function defines it, in one piece and unfiltered."""
    kind = torch.promote_types(x.dtype, torch.float32)
    losses = []
    for token, label in zip(x, target.tolist(), strict=True):
        logits = weight.to(kind) @ token.to(kind)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_sum = torch.logsumexp(logits, 0)
        if label == ignore_index:
            losses.append(0 * log_sum)
            continue
        expected = (1 - label_smoothing) * logits[label] + label_smoothing * logits.mean()
        losses.append(log_sum - expected + z_loss * log_sum**2)
    loss = torch.stack(losses) if losses else x.new_zeros(0, dtype=kind)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum().clamp(min=1)
