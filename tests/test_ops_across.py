"""A selection over the rows of several ranks equals the selection over all of them on one."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saeforge.ops import BatchTopK, Group, SparseCode, encode
from saeforge.ops.across import largest


class Threads:
    """Ranks of a group as threads of this process."""

    def __init__(self, size: int) -> None:
        self.size, self.places = size, [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def share(self, rank: int, tensor: Tensor) -> Tensor:
        self.places[rank] = tensor
        self.barrier.wait()
        together = torch.stack(self.places)
        self.barrier.wait()
        return together

    def run(self, work: Callable[[Group], object]) -> list[object]:
        """What `work` returns on each rank."""
        found: list[object] = [None] * self.size

        def one(rank: int) -> None:
            try:
                found[rank] = work(ThreadGroup(self, rank))
            except BaseException as error:
                found[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in found:
            if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return found


class ThreadGroup(Group):
    def __init__(self, threads: Threads, rank: int) -> None:
        super().__init__(threads.size, rank)
        self._threads = threads

    def sum(self, tensor: Tensor) -> Tensor:
        return self._threads.share(self.rank, tensor.detach()).sum(0)

    def minimum(self, tensor: Tensor) -> Tensor:
        return self._threads.share(self.rank, tensor.detach()).amin(0)

    def gather(self, tensor: Tensor) -> Tensor:
        return self._threads.share(self.rank, tensor.detach())


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
        together = torch.cat([part for part in parts if isinstance(part, Tensor)])
        assert torch.equal(together, whole), k


def test_no_more_and_no_fewer_than_asked_for_are_taken() -> None:
    values = torch.tensor([3.0, 3.0, 3.0, float("nan"), -1.0, 3.0])
    indices = torch.tensor([4, 1, 1, 2, 0, 1])
    for total in range(7):
        taken = largest(values, indices, 5, total, Group())
        assert taken.sum() == total
    assert largest(values, indices, 5, 3, Group()).tolist() == [False, True, True, True, False, False]
