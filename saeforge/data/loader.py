"""Batches from blocks, in the order of a `Plan`, prefetched on threads, resumable from one integer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.data.plan import RNG, Plan
from saeforge.data.source import BlockSource
from saeforge.errors import CheckpointError, ConfigError, DatasetError

Window = tuple[Tensor, Tensor | None, np.ndarray]
Key = tuple[int, int, int]  # pass, lane, window


class TrainLoader:
    """Yields this rank's share of the global batches `position` .. `total - 1`.

    The state is the absolute batch number plus what must not change: it is the same on every rank, as Lightning saves
    rank 0's only. The loader has a length, so that Lightning does not run one batch ahead of what it saves.

    Args:
        source: where blocks come from.
        plan: the order.
        total: batches of the whole run; passes repeat, each in another order.
        rank, world: this process's place; `plan.lanes` must be a multiple of `world`.

    Raises:
        ConfigError: lanes not a multiple of world.
    """

    def __init__(self, source: BlockSource, plan: Plan, total: int, *, rank: int = 0, world: int = 1) -> None:
        if plan.lanes % world:
            raise ConfigError(f"lanes = {plan.lanes} is not a multiple of {world} ranks; set data.lanes to one")
        self.source, self.plan, self.total = source, plan, total
        self.lanes = [lane for lane in range(plan.lanes) if lane % world == rank]
        self.position = 0
        self._windows: dict[Key, Future[Window]] = {}

    def __len__(self) -> int:
        """Batches of the whole run, on every rank."""
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        """From the current position to the end; nothing but a consumed batch moves the position."""
        pool = ThreadPoolExecutor(2, thread_name_prefix="saeforge-read")
        try:
            while self.position < self.total:
                batch = self._batch(self.position, pool)
                self.position += 1
                yield batch
        finally:
            self._windows.clear()
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, index: int, pool: ThreadPoolExecutor) -> Batch:
        pass_index, pieces = self.plan.pieces(index)
        wanted = {(pass_index, lane, piece.window) for lane in self.lanes for piece in pieces}
        upcoming = self._next(pass_index, pieces[-1].window)
        wanted |= {(upcoming[0], lane, upcoming[1]) for lane in self.lanes}
        for key in self._windows.keys() - wanted:
            del self._windows[key]
        for key in sorted(wanted - self._windows.keys()):
            self._windows[key] = pool.submit(self._read, key)
        xs, targets = [], []
        for lane in self.lanes:
            for piece in pieces:
                x, target, order = self._windows[pass_index, lane, piece.window].result()
                rows = torch.from_numpy(order[piece.start : piece.stop])
                xs.append(x.index_select(0, rows))
                if target is not None:
                    targets.append(target.index_select(0, rows))
        x = torch.cat(xs)
        return Batch(x, torch.cat(targets) if targets else x)

    def _next(self, pass_index: int, window: int) -> tuple[int, int]:
        return (pass_index, window + 1) if window + 1 < self.plan.windows_per_lane else (pass_index + 1, 0)

    def _read(self, key: Key) -> Window:
        blocks = [self.source.read_block("train", block) for block in self.plan.blocks(*key)]
        x = torch.cat([block[0] for block in blocks])
        targets = [block[1] for block in blocks if block[1] is not None]
        return x, torch.cat(targets) if targets else None, self.plan.rows(*key)

    def state_dict(self) -> dict[str, Any]:
        """Plain integers and strings, equal on all ranks."""
        return {"position": self.position, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position.

        Raises:
            CheckpointError: the data or its order differ from those of the checkpoint.
        """
        for name, value in self._fixed().items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the checkpoint was trained with data {name} = {state.get(name)}, this run has {value}; "
                    "resume with the same dataset and split, batch_size, lanes, window_blocks and seed"
                )
        self.position = int(state["position"])

    def _fixed(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "schema": 1,
            "rng": RNG,
            "dataset": self.source.fingerprint,
            "blocks": plan.n_blocks,  # rows in memory: another validation_share cuts the same data elsewhere
            "block_rows": plan.block_rows,
            "batch_size": plan.batch_rows,
            "lanes": plan.lanes,
            "window_blocks": plan.window_blocks,
            "seed": plan.seed,
            "unit": plan.unit,
        }


class ValidationLoader:
    """Held-out rows in stored order, whole blocks, batch i on rank i % world. Metrics are sums, so shares may differ.

    Args:
        source: where blocks come from.
        batch_rows: rows of a batch at most (at least one block).
        max_rows: rows to read at most, over all ranks; None for all.
        rank, world: this process's place.
        split: another split than "validation", read in the same way.
    """

    def __init__(
        self,
        source: BlockSource,
        batch_rows: int,
        *,
        max_rows: int | None = None,
        rank: int = 0,
        world: int = 1,
        split: str = "validation",
    ) -> None:
        self.source, self.split = source, split
        n_blocks = source.n_blocks(split)
        rows = source.block_rows(split) if n_blocks else 1
        if max_rows is not None:
            n_blocks = min(n_blocks, max(world, max_rows // rows))
        if 0 < n_blocks < world:
            raise DatasetError(f"{n_blocks} held-out blocks for {world} ranks; harvest more validation tokens")
        # Small held-out sets are cut finer, so that every rank has a batch: Lightning fails where one rank has none.
        step = max(1, min(batch_rows // rows, n_blocks // world))
        self._batches = [range(i, min(i + step, n_blocks)) for i in range(0, n_blocks, step)][rank::world]

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """All batches of this rank."""
        for blocks in self._batches:
            parts = [self.source.read_block(self.split, block) for block in blocks]
            x = torch.cat([part[0] for part in parts])
            targets = [part[1] for part in parts if part[1] is not None]
            yield Batch(x, torch.cat(targets) if targets else x)


def sample_rows(source: BlockSource, rows: int) -> Batch:
    """About `rows` training rows from blocks spread over the dataset: the same on every rank.

    Used for initialisation: 32,768 rows of at most 256 blocks.
    """
    n_blocks, block_rows = source.n_blocks("train"), source.block_rows("train")
    chosen = np.linspace(0, n_blocks - 1, num=min(n_blocks, 256)).astype(int)
    take = max(1, min(block_rows, -(-rows // len(chosen))))
    xs, targets = [], []
    for block in dict.fromkeys(int(block) for block in chosen):
        x, target = source.read_block("train", block)
        xs.append(x[:take])
        if target is not None:
            targets.append(target[:take])
    x = torch.cat(xs)
    return Batch(x, torch.cat(targets) if targets else x)
