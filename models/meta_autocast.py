"""Autocast for meta tensors, which torch's does not know: so that what a model keeps in bfloat16 can be counted."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from typing_extensions import Self

PRODUCTS = frozenset(
    {F.linear, F.conv1d, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.einsum}
    | {torch.baddbmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.__matmul__, Tensor.__rmatmul__}
)
"""What autocast casts the operands of, among what models are made of."""

_active: "list[MetaAutocast]" = []


def meta_autocast_dtype() -> torch.dtype | None:
    """What products of meta tensors are computed in; None outside of :class:`MetaAutocast`."""
    return _active[-1].dtype if _active else None


class MetaAutocast(TorchFunctionMode):
    """Inside, float32 operands of products on the meta device are cast to ``dtype``, as ``torch.autocast`` does on the
    devices that it knows: a parameter once for all of the context, everything else at each use. None: not cast.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.cast: dict[int, tuple[Tensor, Tensor]] = {}  # by identity, with what it was made of, which so stays alive

    def __enter__(self) -> Self:
        _active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _active.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and self is _active[-1] and self.dtype is not None:
            args, kwargs = tree_map_only(Tensor, self._lowered, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _lowered(self, x: Tensor) -> Tensor:
        assert self.dtype is not None
        if x.dtype != torch.float32 or not x.is_meta:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self.dtype)
        if id(x) not in self.cast:
            self.cast[id(x)] = x, x.to(self.dtype)
        return self.cast[id(x)][1]
