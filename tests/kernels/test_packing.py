"""Packed rows: owners of tokens, and last entries of every document."""

from itertools import pairwise

import torch
from harness import Draw, assert_same
from torch import Tensor

from palimpsest.kernels.packing import document_of, tail


def test_tokens_belong_to_their_documents() -> None:
    borders = torch.tensor([0, 0, 2, 3, 3, 6], dtype=torch.int32)
    assert document_of(borders, 6).tolist() == [1, 1, 2, 4, 4, 4]


def by_hand(x: Tensor, cache: Tensor, size: int) -> Tensor:
    whole = torch.cat([torch.zeros(size, *x.shape[1:], dtype=x.dtype), cache, x])
    return whole[whole.shape[0] - size :]


def test_tails_of_rows_and_documents() -> None:
    source = Draw(0, torch.float64)
    borders = torch.tensor([0, 0, 2, 3, 9], dtype=torch.int32)
    x, cache = source.normal(1, 9, 2), source.normal(4, 3, 2)
    rows = source.normal(4, 2, 2)
    for size in range(12):
        wanted = [by_hand(x[0, a:b], cache[n], size) for n, (a, b) in enumerate(pairwise(borders))]
        assert_same([tail(x, cache, size, borders)], [torch.stack(wanted)], f"documents, {size}")
        wanted = [by_hand(rows[n], cache[n], size) for n in range(4)]
        assert_same([tail(rows, cache, size)], [torch.stack(wanted)], f"rows, {size}")
        empty = cache[:, :0]
        wanted = [by_hand(rows[n], empty[n], size) for n in range(4)]
        assert_same([tail(rows, empty, size)], [torch.stack(wanted)], f"rows without cache, {size}")
