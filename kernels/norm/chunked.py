"""Normalisation over the last dimension with a hand-written backward that keeps one number per token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import compute_dtype
from ..op import flop_formula
from ..operator import absent, operator, present
from .cost import cost


@operator("norm")
def forward(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool) -> tuple[Tensor, Tensor]:
    """The output and the factor that each token was multiplied by, [..., 1] in the dtype of accumulations."""
    kind = compute_dtype(x)
    wide = x.to(kind)
    factor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    if mean:
        factor /= x.shape[-1]
    factor = factor.add_(eps).rsqrt_()
    y = wide * factor
    if weight is not None:
        y *= weight.to(kind)
    if gate is not None:
        y *= F.silu(gate.to(kind))
    return y.to(x.dtype).contiguous(), factor


@forward.register_fake
def _(x, weight, gate, eps, mean):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x))


@operator("norm_backward")
def backward(
    grad: Tensor, factor: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, mean: bool
) -> list[Tensor]:
    """Gradients of x, weight and gate; empty for those that were None.

    With n = x r and r = (a sum x^2 + eps)^(-1/2), and g the gradient of n: dx = r (g - a n sum(g n)).
    """
    if mean and weight is not None and gate is None and x.device.type == "cpu":
        return [*_backward_of_layer_norm(grad, factor, x, weight), absent(x)]
    kind = compute_dtype(x)
    n = x.to(kind) * factor
    g = grad.to(kind)
    d_gate, d_weight = absent(x), absent(x)
    if gate is not None:
        wide = gate.to(kind)
        scaled = n if weight is None else n * weight.to(kind)
        d_gate = torch.ops.aten.silu_backward(g * scaled, wide).to(gate.dtype).contiguous()
        g = g * F.silu(wide)
    product = g * n
    if weight is not None:
        d_weight = product.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        along = (product @ weight.to(kind)).unsqueeze(-1)
        d_x = torch.mul(g, weight.to(kind), out=product)  # in its place: new memory costs more than a product
    else:
        along = product.sum(-1, keepdim=True)
        d_x = product.copy_(g)
    if mean:
        along /= x.shape[-1]
    d_x.addcmul_(n, along, value=-1).mul_(factor)
    return [d_x.to(x.dtype).contiguous(), d_weight, d_gate]


def _backward_of_layer_norm(grad: Tensor, factor: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight by ATen's fused backward of LayerNorm, told that the mean of x was 0.

    It also takes away what a gradient through the mean would be, r mean(g), which is then added again. Three passes
    over the tokens instead of seven.
    """
    kind, width = compute_dtype(x), x.shape[-1]
    g, w = grad.to(kind).contiguous(), weight.to(kind)
    zero = torch.zeros_like(factor)
    mask = [True, True, False]
    d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
        g, x.to(kind).contiguous(), [width], zero, factor, w, None, mask
    )
    d_x += (g @ w).unsqueeze(-1).mul_(factor).div_(width)
    return d_x.to(x.dtype), d_weight.to(weight.dtype)


@backward.register_fake
def _(grad, factor, x, weight, gate, mean):
    return [absent(x) if y is None else y.new_empty(y.shape) for y in (x, weight, gate)]


def _keep(ctx, inputs, output) -> None:
    x, weight, gate, _, ctx.mean = inputs
    ctx.save_for_backward(output[1], x, weight, gate)


def _differentiate(ctx, grad, _):
    factor, *tensors = ctx.saved_tensors
    return *present(backward(grad, factor, *tensors, ctx.mean), tensors), None, None


forward.register_autograd(_differentiate, setup_context=_keep)
flop_formula(
    torch.ops.palimpsest.norm,
    lambda x, weight, gate, *_, out_shape: cost(x, weight=weight is not None, gate=gate is not None).flops,
)
flop_formula(
    torch.ops.palimpsest.norm_backward,
    lambda grad, factor, x, weight, gate, *_, out_shape: (
        cost(x, weight=weight is not None, gate=gate is not None, backward=True).flops
    ),
)


def normalise(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool) -> Tensor:
    """The registered operator."""
    return forward(x, weight, gate, eps, mean)[0]
