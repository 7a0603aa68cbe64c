"""Cross-entropy over a vocabulary with the logits of a few tokens at a time, forward and backward.

A summed loss has one incoming gradient, a number: the forward computes the gradients of x and weight along with the
loss, while the logits of a chunk are there, and the backward only scales them. Losses of single tokens have an incoming
gradient each, so there the backward computes the logits again.

On a CPU, tokens whose target is ignored are left out before anything is computed; elsewhere to know how many those are
would stall the device.
"""

import torch
from torch import Tensor

from ..check import compute_dtype
from ..op import flop_formula
from ..operator import absent, operator
from .cost import backward_flops, cost

LOGITS = 2**22  # held at a time when ``chunk`` is not given


class Chunk:
    """Losses of a few tokens, and their gradients, which consume the logits in place."""

    def __init__(
        self, x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, smoothing: float, z_loss: float,
        softcap: float | None,
    ) -> None:  # fmt: skip
        self.x, self.weight, self.smoothing, self.z_loss, self.softcap = x, weight, smoothing, z_loss, softcap
        logits = (x @ weight.mT).to(compute_dtype(x))
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        self.logits = logits
        self.valid = target != ignore_index
        self.label = target.where(self.valid, 0).unsqueeze(1)
        self.log_probability = torch.log_softmax(logits, 1)
        chosen = self.log_probability.gather(1, self.label).squeeze(1)
        # log softmax is logits - lse, so that one entry of each tells lse without another pass.
        self.log_sum = logits.gather(1, self.label).squeeze(1) - chosen
        if smoothing:
            chosen = (1 - smoothing) * chosen + smoothing * self.log_probability.mean(1)
        loss = -chosen
        if z_loss:
            loss = loss + z_loss * self.log_sum.square()
        self.loss = loss.where(self.valid, 0)

    def gradients(self, grad: Tensor | None, d_weight: Tensor) -> Tensor:
        """Gradient of x for the tokens' incoming gradients ``grad`` (None: ones); adds to ``d_weight``."""
        rows = self.valid.to(self.logits.dtype)
        if grad is not None:
            rows = rows * grad
        d_logits = self.log_probability.exp_()
        if grad is not None or self.z_loss or rows.device.type != "cpu":  # there, all rows are 1: see counted
            d_logits *= (rows * (1 + 2 * self.z_loss * self.log_sum) if self.z_loss else rows).unsqueeze(1)
        d_logits.scatter_add_(1, self.label, (rows * (self.smoothing - 1)).unsqueeze(1))
        if self.smoothing:
            d_logits -= (rows * (self.smoothing / d_logits.shape[1])).unsqueeze(1)
        if self.softcap is not None:
            d_logits *= self.logits.div_(self.softcap).square_().neg_().add_(1)
        d_logits = d_logits.to(self.x.dtype)
        if d_weight.dtype == self.x.dtype:
            d_weight.addmm_(d_logits.mT, self.x)
        else:
            d_weight += d_logits.mT @ self.x
        return d_logits @ self.weight


def counted(target: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the tokens that count, on a CPU where fewer than all do; None: take all."""
    if target.device.type != "cpu":
        return None
    rows = (target != ignore_index).nonzero().squeeze(1)
    return rows if rows.numel() < target.numel() else None


def spread(x: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """``x`` [n, ...] of the tokens ``rows`` among ``count`` tokens, zeros for the others."""
    return x if rows is None else x.new_zeros(count, *x.shape[1:]).index_copy_(0, rows, x)


@operator("linear_cross_entropy")
def forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk: int,
    total: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N] or, with ``total``, their sum [], and then with ``gradients`` those of x [N, d] and weight [V, d]."""
    losses, d_x, count = [], [], x.shape[0]
    rows = counted(target, ignore_index)
    if rows is not None:
        x, target = x[rows], target[rows]
    narrow = weight.to(x.dtype)
    keep = total and gradients
    d_weight = weight.new_zeros(weight.shape, dtype=compute_dtype(x)) if keep else absent(weight)
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        tokens = Chunk(x[part], narrow, target[part], ignore_index, smoothing, z_loss, softcap)
        losses.append(tokens.loss)
        if keep:
            d_x.append(tokens.gradients(None, d_weight))
        del tokens  # its logits, before the next chunk's are there
    loss = torch.cat([x.new_empty(0, dtype=compute_dtype(x)), *losses])
    if keep:
        return loss.sum(), spread(d_x[0] if len(d_x) == 1 else torch.cat([x[:0], *d_x]), rows, count), d_weight
    return loss.sum() if total else spread(loss, rows, count), absent(x), d_weight


@forward.register_fake
def _(x, weight, target, ignore_index, smoothing, z_loss, softcap, chunk, total, gradients):
    kind = compute_dtype(x)
    loss = x.new_empty(() if total else target.shape, dtype=kind)
    if not (total and gradients):
        return loss, absent(x), absent(weight)
    return loss, x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=kind)


@operator("linear_cross_entropy_backward")
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, d] and weight [V, d] for the incoming gradients ``grad`` [N] of the tokens' losses.

    These are divided by the largest, and the sums multiplied with it: those of a mean would underflow in float16.
    """
    narrow, kind, count = weight.to(x.dtype), compute_dtype(x), x.shape[0]
    rows = counted(target, ignore_index)
    if rows is not None:
        x, target, grad = x[rows], target[rows], grad[rows]
    d_weight = weight.new_zeros(weight.shape, dtype=kind)
    d_x = [x[:0]]
    scale = torch.cat([grad.abs(), grad.new_zeros(1)]).amax()
    grad = grad / scale.where(scale > 0, 1)
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        tokens = Chunk(x[part], narrow, target[part], ignore_index, smoothing, z_loss, softcap)
        d_x.append((tokens.gradients(grad[part], d_weight).to(kind) * scale).to(x.dtype))
        del tokens
    return spread(torch.cat(d_x), rows, count), (d_weight * scale).to(weight.dtype)


@backward.register_fake
def _(grad, x, weight, *_):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:
    x, weight, target, *ctx.rest, _, _ = inputs
    _, d_x, d_weight = output
    ctx.mark_non_differentiable(d_x, d_weight)
    ctx.known = d_weight.numel() > 0
    ctx.kinds = x.dtype, weight.dtype
    ctx.save_for_backward(*((d_x, d_weight) if ctx.known else (x, weight, target)))


def _differentiate(ctx, grad, *_):
    if ctx.known:
        pair = [(grad * d.to(grad.dtype)).to(kind) for d, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)]
    else:
        x, weight, target = ctx.saved_tensors
        pair = backward(grad.expand(target.shape), x, weight, target, *ctx.rest)
    return *pair, *(None for _ in range(8))


forward.register_autograd(_differentiate, setup_context=_keep)


def _flops(x, weight, target, a, b, c, d, e, total, gradients, *, out_shape) -> int:
    flops = cost(x, weight).flops
    return flops + cost(x, weight, backward=True).flops if total and gradients else flops


flop_formula(torch.ops.palimpsest.linear_cross_entropy, _flops)
flop_formula(torch.ops.palimpsest.linear_cross_entropy_backward, backward_flops)


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
    """The registered operator for x [N, d] and target [N], and the mean over the tokens that count; no filter."""
    chunk = max(1, LOGITS // weight.shape[0]) if chunk is None else chunk
    total = reduction != "none"
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss = forward(x, weight, target, ignore_index, label_smoothing, z_loss, softcap, chunk, total, wanted)[0]
    return loss / (target != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss
