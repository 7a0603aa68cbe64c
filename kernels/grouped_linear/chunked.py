"""Grouped linear map in plain torch: a product per sequence on a CPU, masked products of all tokens elsewhere."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ..check import compute_dtype
from ..packing import document_of
from ..routing.chunked import gather


def reads_borders(x: Tensor) -> bool:
    """Whether the borders of sequences may be read: where that does not stall a stream."""
    return x.device.type == "cpu"


def sequences(cu_seqlens: Tensor, memories: int) -> Iterator[tuple[int, slice]]:
    """Memory and slots of every sequence that is not empty; reads the borders."""
    for n, (first, last) in enumerate(pairwise(cu_seqlens.tolist())):
        if last > first:
            yield n % memories, slice(first, last)


def masks(cu_seqlens: Tensor, slots: int, memories: int) -> Iterator[tuple[int, Tensor]]:
    """Every memory and which slots are its own, [S, 1]."""
    memory = document_of(cu_seqlens, slots) % memories
    for m in range(memories):
        yield m, (memory == m)[:, None]


def multiply(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x [S, in], in the order of slots, times the matrices [M', in, out] of their memories: [S, out]."""
    y = x.new_empty(x.shape[0], weight.shape[2])
    if reads_borders(x):
        for m, part in sequences(cu_seqlens, weight.shape[0]):
            torch.mm(x[part], weight[m], out=y[part])
        return y
    for m, mask in masks(cu_seqlens, x.shape[0], weight.shape[0]):
        y = torch.where(mask, x @ weight[m], y)
    return y


def forward(x: Tensor, weight: Tensor, token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y [1, S, out]."""
    return multiply(x.flatten(0, 1).index_select(0, token), weight.to(x.dtype), cu_seqlens)[None]


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, token: Tensor, slot: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; the latter is added up in the order of sequences."""
    g, kind = grad[0], compute_dtype(x)
    d_x = gather(multiply(g, weight.to(x.dtype).mT, cu_seqlens)[None], None, slot)
    slots = x.flatten(0, 1).index_select(0, token).to(kind)
    g = g.to(kind)
    d_weight = weight.new_zeros(weight.shape, dtype=kind)
    if reads_borders(x):
        for m, part in sequences(cu_seqlens, weight.shape[0]):
            d_weight[m].addmm_(slots[part].T, g[part])
    else:
        for m, mask in masks(cu_seqlens, slots.shape[0], weight.shape[0]):
            d_weight[m] = torch.where(mask, slots, 0).T @ g
    return d_x, d_weight.to(weight.dtype)
