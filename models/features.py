"""Feature maps on the queries and keys of a memory: with more features a linear map tells more of them apart."""

import math

import torch
from torch import Tensor, nn

from .mixer_config import Features


class FeatureMap(nn.Module):
    """φ on x [..., heads, D] → [..., heads, ``width``] (ATLAS, section 3.1).

        polynomial         φ(x) = Σ_{i ≤ p} a_i xⁱ, elementwise; a learnt per head, at first 1 / i!
        polynomial, width  φ(x) = [a_i Π_{l ≤ i} (x R_{i,l}) / √m_i]  for i = 1 … p, in m_i of ``width`` channels each:
                           ⟨φ(x), φ(y)⟩ ≈ Σ a_i² ⟨x, y⟩ⁱ, as of all monomials; R of random signs, fixed
        exp                φ(x) = exp(x), elementwise
        identity           φ(x) = x

    The heads of a call may be those of queries followed by those of keys: a multiple of ``heads``. The paper has all
    monomials of degree up to p, whose number is D^p; both forms of the polynomial here are cheaper, and chosen by us.
    It also leaves open where keys are normalised: here after φ.
    """

    signs: Tensor

    def __init__(self, features: Features, heads: int, dim: int) -> None:
        super().__init__()
        self.features, self.heads, self.dim = features, heads, dim
        self.width = features.width or dim
        self.blocks: list[int] = []
        self.coefficients = None
        if features.kind == "polynomial":
            first = 0 if features.width is None else 1
            self.coefficients = nn.Parameter(torch.empty(heads, features.degree + 1 - first))
            if features.width is not None:
                size, more = divmod(self.width, features.degree)
                self.blocks = [size + (i < more) for i in range(features.degree)]
                columns = sum((i + 1) * m for i, m in enumerate(self.blocks))
                self.register_buffer("signs", torch.empty(dim, columns))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """a_i = 1 / i!; R from a generator of its own, so that a model has the same one wherever it is made."""
        if self.coefficients is not None:
            first = 1 if self.blocks else 0
            start = [1 / math.factorial(i + first) for i in range(self.coefficients.shape[1])]
            with torch.no_grad():
                self.coefficients.copy_(torch.tensor(start).expand_as(self.coefficients))
        if self.blocks:
            drawn = torch.randint(0, 2, tuple(self.signs.shape), generator=torch.Generator().manual_seed(0))
            self.signs.copy_(drawn * 2.0 - 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """See the class; the dtype of x."""
        if self.features.kind == "identity":
            return x
        if self.features.kind == "exp":
            return x.exp()
        assert self.coefficients is not None
        rows = self.coefficients.to(x.dtype).repeat(x.shape[-2] // self.heads, 1)  # [heads of the call, terms]
        if self.blocks:
            return self._sketch(x, rows)
        out = rows[:, -1:].expand_as(x)
        for i in range(rows.shape[1] - 2, -1, -1):
            out = out * x + rows[:, i : i + 1]
        return out

    def _sketch(self, x: Tensor, rows: Tensor) -> Tensor:
        seen = x @ self.signs.to(x.dtype)
        parts, place = [], 0
        for i, size in enumerate(self.blocks):
            products = seen[..., place : place + (i + 1) * size].unflatten(-1, (i + 1, size)).prod(-2)
            parts.append(products * rows[:, i : i + 1] * size**-0.5)
            place += (i + 1) * size
        return torch.cat(parts, -1)
