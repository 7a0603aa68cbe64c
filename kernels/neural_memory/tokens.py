"""The token tensors of one call, laid out so that a chunk of every active sequence is one tensor [rows·H, c, ·]."""

import torch
from einops import rearrange
from torch import Tensor

from .schedule import Step


class Tokens:
    """Dense: tensors become [B·H, T, ·] and a chunk is a view. Ragged: [B·T, H, ·] and a chunk is gathered."""

    def __init__(self, batch: int, heads: int, dense: bool) -> None:
        self.batch, self.heads, self.dense = batch, heads, dense

    def lay(self, x: Tensor | None, kind: torch.dtype) -> Tensor | None:
        """A token tensor [B, T, H, ·], or a gate [B, T, H], in its layout for chunks."""
        if x is None:
            return None
        x = x.to(kind)
        if self.dense:
            return rearrange(x, "b t h ... -> (b h) t ...").contiguous()
        return rearrange(x, "b t h ... -> (b t) h ...")

    def restore(self, x: Tensor) -> Tensor:
        """Back to [B, T, H, ·], contiguous."""
        if self.dense:
            return rearrange(x, "(b h) t ... -> b t h ...", b=self.batch).contiguous()
        return rearrange(x, "(b t) h ... -> b t h ...", b=self.batch).contiguous()

    def take(self, x: Tensor | None, step: Step) -> Tensor | None:
        """The chunk [rows·H, c, ·]; zero in slots that hold no token, whatever the rest of the tensor holds."""
        if x is None:
            return None
        if step.span is not None:
            return x[:, step.span[0] : step.span[1]]
        assert step.index is not None and step.valid is not None
        empty = ~step.valid[(...,) + (None,) * (x.dim() - 1)]
        return rearrange(x[step.index].masked_fill(empty, 0.0), "n c h ... -> (n h) c ...")

    def put(self, out: Tensor, chunk: Tensor, step: Step) -> None:
        """Write a chunk to its place in ``out``, laid out like the inputs; slots that hold no token are dropped."""
        if step.span is not None:
            out[:, step.span[0] : step.span[1]] = chunk
            return
        assert step.index is not None and step.valid is not None
        own = rearrange(chunk, "(n h) c ... -> n c h ...", n=step.rows)
        out[step.index[step.valid]] = own[step.valid]
