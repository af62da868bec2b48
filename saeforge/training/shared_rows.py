"""`SharedLoader`: what one rank of a latent group reads, all of its ranks train on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from saeforge.data.loader import BATCH_RING, TrainLoader
from saeforge.data.plan import Plan
from saeforge.data.source import BlockSource, Rows, empty_rows
from saeforge.ops import Group


class SharedLoader(TrainLoader):
    """A `TrainLoader` of ranks that see the same rows: the first reads them and hands them on, the others read nothing.

    So a disk is read, a block is checked and a language model runs once for all of them, and no bit of a batch differs
    between them. All count the position alike.

    Args:
        latents: the ranks. The other arguments are `TrainLoader`'s.
    """

    def __init__(self, source: BlockSource, plan: Plan, total: int, *, latents: Group, **options: Any) -> None:
        super().__init__(source, plan, total, **options)
        self.latents = latents

    def __iter__(self) -> Iterator[Rows]:
        """See `TrainLoader`."""
        if self.latents.rank == 0:
            for batch in super().__iter__():
                yield self._share(batch)
            return
        rows = self.plan.lane_rows * len(self.lanes)
        ring: Iterator[Rows] | None = None
        if self.reuse and self.device.type == "cpu":
            ring = itertools.cycle([empty_rows(self.source, rows) for _ in range(BATCH_RING)])
        while self.position < self.total:
            batch = self._share(next(ring) if ring else empty_rows(self.source, rows, device=self.device))
            self.position += 1
            yield batch

    def _share(self, batch: Rows) -> Rows:
        return tuple(self.latents.copy_(part) for part in batch)
