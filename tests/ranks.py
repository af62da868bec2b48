"""Ranks of a group as threads of this process, so that what several devices compute can be compared in one test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from saeforge.ops import Group
from saeforge.ops.group import Kind

Result = TypeVar("Result")


class Threads:
    """Where the threads of a group leave what they share."""

    def __init__(self, size: int) -> None:
        self.size, self.places = size, [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def share(self, rank: int, tensor: Tensor) -> Tensor:
        self.places[rank] = tensor
        self.barrier.wait()
        together = torch.stack(self.places)
        self.barrier.wait()
        return together

    def run(self, work: Callable[[Group], Result]) -> list[Result]:
        """What `work` returns on each rank."""
        return in_threads([partial(work, ThreadGroup(self, rank)) for rank in range(self.size)], [self])


class ThreadGroup(Group):
    """One of these threads."""

    def __init__(self, threads: Threads, rank: int) -> None:
        super().__init__(threads.size, rank)
        self._threads = threads

    def _all_reduce(self, tensor: Tensor, kind: Kind) -> Tensor:
        together = self._threads.share(self.rank, tensor)
        return together.sum(0) if kind == "sum" else together.amin(0)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        return self._threads.share(self.rank, tensor)

    def _broadcast(self, tensor: Tensor) -> None:
        tensor.copy_(self._threads.share(self.rank, tensor)[0])


def on_mesh(data: int, latents: int, work: Callable[[Group, Group], Result]) -> list[list[Result]]:
    """`work(latent group, data group)` on every rank of a mesh: a list for each rank of data, of those of latents."""
    across, along = [Threads(latents) for _ in range(data)], [Threads(data) for _ in range(latents)]
    calls = [
        partial(work, ThreadGroup(across[row], column), ThreadGroup(along[column], row))
        for row in range(data)
        for column in range(latents)
    ]
    flat = in_threads(calls, [*across, *along])
    return [flat[row * latents : (row + 1) * latents] for row in range(data)]


def in_threads(calls: Sequence[Callable[[], Result]], groups: list[Threads]) -> list[Result]:
    """What each call returns; the first true error is raised, and the others do not wait for its thread."""
    found: list[Result | BaseException | None] = [None] * len(calls)

    def one(number: int) -> None:
        try:
            found[number] = calls[number]()
        except BaseException as error:
            found[number] = error
            for group in groups:
                group.barrier.abort()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in found if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return found  # type: ignore[return-value]
