"""`Plan`: which rows make up batch number g. Pure integers: the same for every number of ranks, threads and restarts.

Blocks are dealt to a fixed number of lanes; a lane reads its blocks in windows and permutes the rows of each window.
A global batch takes the same number of rows from every lane, and a rank serves whole lanes. So the batches, and their
order, do not depend on the number of ranks, and the position in the data is one integer.

Randomness is the raw stream of numpy's Philox generator, which numpy keeps stable across versions (its `permutation`
is not promised to be); permutations are stable argsorts of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from saeforge.errors import ConfigError, DatasetError

RNG = "philox-argsort-1"


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of a lane's permuted window."""

    window: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """The order of a split.

    Attributes:
        n_blocks: blocks of the split. block_rows: rows of every block.
        batch_rows: rows of a global batch, over all ranks.
        lanes: number of lanes; a multiple of every number of ranks that will ever train on this order.
        window_blocks: blocks that are mixed with each other.
        seed: of the order.
        unit: rows that stay together, in order (neighbouring tokens for sequence-aware variants).

    Raises:
        ConfigError: numbers that do not divide each other. DatasetError: not one batch in the split.
    """

    n_blocks: int
    block_rows: int
    batch_rows: int
    lanes: int = 8
    window_blocks: int = 4
    seed: int = 0
    unit: int = 1

    def __post_init__(self) -> None:
        if min(self.batch_rows, self.lanes, self.window_blocks, self.unit) < 1:
            raise ConfigError("batch_size, lanes, window_blocks and unit must be positive")
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed}: expected 0 or a positive number")
        if self.batch_rows % (self.lanes * self.unit):
            raise ConfigError(
                f"batch_size = {self.batch_rows} is not a multiple of lanes = {self.lanes}"
                f"{f' times unit = {self.unit}' if self.unit > 1 else ''}; "
                f"use {max(1, self.batch_rows // (self.lanes * self.unit)) * self.lanes * self.unit}"
            )
        if self.block_rows % self.unit:
            raise ConfigError(f"blocks of {self.block_rows} rows do not divide into units of {self.unit}")
        if self.batches_per_pass == 0:
            raise DatasetError(
                f"{self.n_blocks} blocks of {self.block_rows} rows over {self.lanes} lanes hold no batch of "
                f"{self.batch_rows}; use a smaller batch_size, fewer lanes, or harvest more tokens"
            )

    @property
    def blocks_per_lane(self) -> int:
        """Blocks that each lane reads in a pass; up to lanes - 1 blocks sit out, others in every pass."""
        return self.n_blocks // self.lanes

    @property
    def windows_per_lane(self) -> int:
        """Windows of a pass. Their sizes differ by at most one block: windows shrink before data is dropped."""
        return -(-self.blocks_per_lane // self.window_blocks)

    @property
    def lane_rows(self) -> int:
        """Rows that each lane gives to a batch."""
        return self.batch_rows // self.lanes

    @property
    def batches_per_pass(self) -> int:
        """Global batches in one pass over the split."""
        return self.blocks_per_lane * self.block_rows // self.lane_rows

    def window_bounds(self, window: int) -> tuple[int, int]:
        """First and last + 1 of a lane's blocks in a window."""
        n, total = self.windows_per_lane, self.blocks_per_lane
        return window * total // n, (window + 1) * total // n

    def blocks(self, pass_index: int, lane: int, window: int) -> list[int]:
        """The blocks of one window of one lane."""
        start, stop = self.window_bounds(window)
        order = _block_order(self.n_blocks, self.seed, pass_index)
        return [int(block) for block in order[lane :: self.lanes][start:stop]]

    def rows(self, pass_index: int, lane: int, window: int) -> np.ndarray:
        """The order of the rows of one window: int64, a permutation that keeps units together."""
        start, stop = self.window_bounds(window)
        units = (stop - start) * self.block_rows // self.unit
        order = permutation(units, self.seed, 1, pass_index, lane, window)
        if self.unit == 1:
            return order
        return (order[:, None] * self.unit + np.arange(self.unit)).ravel()

    def pieces(self, batch: int) -> tuple[int, list[Piece]]:
        """Where batch number `batch` (counted over all passes) lies: its pass, and the pieces of every lane."""
        pass_index, index = divmod(batch, self.batches_per_pass)
        start, stop = index * self.lane_rows, (index + 1) * self.lane_rows
        pieces = []
        while start < stop:
            window = self._window_of(start // self.block_rows)
            first, last = (bound * self.block_rows for bound in self.window_bounds(window))
            pieces.append(Piece(window, start - first, min(stop, last) - first))
            start = last
        return pass_index, pieces

    def first_batch(self, pass_index: int, window: int) -> int:
        """The first batch that takes rows from a window; one of a later pass where it lies in a pass's unused rest."""
        first = self.window_bounds(window)[0] * self.block_rows // self.lane_rows
        return pass_index * self.batches_per_pass + first

    def _window_of(self, block: int) -> int:
        """The window of a lane's block: the last w with w * total // n <= block."""
        return ((block + 1) * self.windows_per_lane - 1) // self.blocks_per_lane


@functools.lru_cache(maxsize=4)  # this pass and the next, of a training and perhaps another order
def _block_order(n_blocks: int, seed: int, pass_index: int) -> np.ndarray:
    return permutation(n_blocks, seed, 0, pass_index)


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of n as a pure function of `key`."""
    return stable_order(np.random.Philox(np.random.SeedSequence(list(key))).random_raw(n))


def stable_order(values: np.ndarray) -> np.ndarray:
    """A stable argsort, int64. Where there are no ties any argsort gives it, and numpy's default is 3 times as fast."""
    order = np.argsort(values)
    ascending = values[order]
    if (ascending[1:] == ascending[:-1]).any():
        order = np.argsort(values, kind="stable")
    return order.astype(np.int64, copy=False)
