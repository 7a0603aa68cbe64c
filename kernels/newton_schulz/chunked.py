"""The Newton-Schulz iteration as batched products, with a hand-written backward that keeps nothing but x."""

import torch
from torch import Tensor

from ..check import compute_dtype


def start(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """X_0 as [N, k, l], k <= l, and the factor [N, 1, 1] that made it from x."""
    wide = x.to(compute_dtype(x))
    if x.shape[1] > x.shape[2]:
        wide = wide.mT
    factor = torch.rsqrt(wide.square().sum((1, 2), keepdim=True) + eps**2)
    return wide * factor, factor


def polynomial(y: Tensor, b: float, c: float) -> tuple[Tensor, Tensor]:
    """A = Y Y^T and b A + c A^2."""
    square = torch.bmm(y, y.mT)
    return square, torch.baddbmm(square, square, square, beta=b, alpha=c)


def forward(x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """The last iterate, in x's shape [N, m, n]."""
    y, _ = start(x, eps)
    for _ in range(steps):
        y = torch.baddbmm(y, polynomial(y, b, c)[1], y, beta=a)
    return _like(y, x)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """[N, k, l] in the shape and dtype of x."""
    y = y.mT if x.shape[1] > x.shape[2] else y
    return y.to(x.dtype).contiguous()


def backward(grad: Tensor, x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """Gradient of x. With G that of Y' = a Y + P Y, where P = b A + c A^2, and Q = G Y^T + Y G^T:

    dY = a G + P G + (b Q + c (Q A + A Q)) Y
    """
    y, factor = start(x, eps)
    iterates = [y]
    for _ in range(steps - 1):
        y = torch.baddbmm(y, polynomial(y, b, c)[1], y, beta=a)
        iterates.append(y)
    g = grad.to(y.dtype)
    if x.shape[1] > x.shape[2]:
        g = g.mT
    for y in reversed(iterates[:steps]):
        square, p = polynomial(y, b, c)
        q = torch.bmm(g, y.mT)
        q = q + q.mT
        r = torch.bmm(q, square)
        r = (r + r.mT).mul_(c).add_(q, alpha=b)
        g = torch.baddbmm(torch.baddbmm(g, p, g, beta=a), r, y)
    along = (g * iterates[0]).sum((1, 2), keepdim=True)
    return _like((g - iterates[0] * along) * factor, x)
