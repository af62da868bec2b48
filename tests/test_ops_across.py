"""A selection over the rows of several ranks equals the selection over all of them on one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saeforge.ops import BatchTopK, Group, SparseCode, encode
from saeforge.ops.across import largest
from tests.ranks import Threads


def selected(code: SparseCode) -> Tensor:
    return code.to_dense()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["random", "ties", "one row", "signed zeros"])
def test_batch_top_k_over_ranks_is_that_of_one_device(ranks: int, kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(ranks)
    pre = torch.randn(8 * ranks, 20, generator=generator).to(dtype)
    if kind == "ties":
        pre = (2 * pre).round() / 2
    elif kind == "one row":
        pre[3] += 10  # takes all its offers, so every rank must offer more
    elif kind == "signed zeros":
        pre = pre.round()
        pre[0, :7] = -0.0
    weight = torch.eye(20, dtype=dtype)
    for k in (0.5, 2.5, 6.0):
        whole = selected(encode(pre, weight, None, BatchTopK(k)))

        def one(group: Group, k: float = k) -> Tensor:
            select = BatchTopK(k)
            select.group = group
            return selected(encode(pre.chunk(ranks)[group.rank], weight, None, select))

        parts = Threads(ranks).run(one)
        together = torch.cat(parts)
        assert torch.equal(together, whole), k


def test_no_more_and_no_fewer_than_asked_for_are_taken() -> None:
    values = torch.tensor([3.0, 3.0, 3.0, float("nan"), -1.0, 3.0])
    indices = torch.tensor([4, 1, 1, 2, 0, 1])
    for total in range(7):
        taken = largest(values, indices, 5, total, Group())
        assert taken.sum() == total
    assert largest(values, indices, 5, 3, Group()).tolist() == [False, True, True, True, False, False]
