"""What a workload's arguments are drawn from."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

BITS = {torch.float64: 64, torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}


class Draw:
    """Random tensors of a dtype on a device; for ``empty`` uninitialised ones, and zeros for integers."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", *, seed: int = 0, empty: bool = False) -> None:
        self.dtype, self.device, self.empty = dtype, device, empty
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of standard deviation ``scale``."""
        if self.empty:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return (scale * torch.randn(shape, generator=self.generator, device=self.device)).to(self.dtype)

    def unit(self, *shape: int) -> Tensor:
        """Vectors of length 1 along the last dimension."""
        return self.normal(*shape) if self.empty else normalize(self.normal(*shape).float(), dim=-1).to(self.dtype)

    def gate(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform numbers between two bounds, in float32 (float64 for float64)."""
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.empty:
            return torch.empty(shape, dtype=kind, device=self.device)
        return (low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)).to(kind)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in 0 .. high - 1."""
        if self.empty:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)
        return torch.randint(high, shape, generator=self.generator, device=self.device)
