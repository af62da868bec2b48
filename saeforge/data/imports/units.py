"""Which rows of the sources go to which split, and in which order they are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from saeforge.data.imports.arrays import ForeignArray

RUN_ROWS = 256
STRIPES = 16
READ_ROWS = 8192


class Units:
    """Where every unit of rows lies, which split it is in, and the order of the kept rows of a split.

    Args:
        arrays: the sources.
        validation_share: share of the units held out.
        seed: of the order. shuffle: False keeps the order of the sources.

    Attributes:
        array, start, rows: (units,) which array a unit is in, its first row there, and how many.
        order: by split, its units in order.
        before: by split, (units + 1,) kept rows before each.
    """

    def __init__(self, arrays: Sequence[ForeignArray], *, validation_share: float, seed: int, shuffle: bool) -> None:
        lengths = np.array([array.context or RUN_ROWS for array in arrays], dtype=np.int64)
        totals = np.array([array.rows for array in arrays], dtype=np.int64)
        counts = -(-totals // lengths)
        self.array = np.repeat(np.arange(len(arrays)), counts)
        self.start = (np.arange(len(self.array)) - np.repeat(np.cumsum(counts) - counts, counts)) * lengths[self.array]
        self.rows = np.minimum(lengths[self.array], totals[self.array] - self.start)
        held_out = _striped(len(self.array), validation_share)
        parts = {"train": ~held_out, "validation": held_out} if validation_share else {"train": ~held_out}
        self.order: dict[str, np.ndarray] = {}
        self.before: dict[str, np.ndarray] = {}
        for split, chosen in parts.items():
            units = np.flatnonzero(chosen)
            if shuffle:
                digest = hashlib.sha256(f"saeforge import {seed} {split}".encode()).digest()
                generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")))
                units = units[generator.permutation(len(units))]
            self.order[split] = units
            self.before[split] = np.concatenate([[0], np.cumsum(self.rows[units])])

    def kept_rows(self, split: str) -> int:
        """Rows of a split."""
        return int(self.before[split][-1])

    def reads(self, split: str, start: int, stop: int) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
        """Yield what to read for kept rows start to stop of a split, in the order of the sources.

        Yields:
            Array, first and last-plus-one row of it, and for each of these rows its kept number and its unit.
        """
        order, before = self.order[split], self.before[split]
        first = int(np.searchsorted(before, start, side="right")) - 1
        last = int(np.searchsorted(before, stop, side="left"))
        pending: list[tuple[int, int, int, int, int]] = []  # array, first row, last row, first kept row, unit

        def flush() -> tuple[int, int, int, np.ndarray, np.ndarray]:
            kept = np.concatenate([np.arange(k, k + b - a) for _, a, b, k, _ in pending])
            units = np.repeat([unit for *_, unit in pending], [b - a for _, a, b, _, _ in pending])
            return pending[0][0], pending[0][1], pending[-1][2], kept, units

        for at in first + np.argsort(order[first:last]):
            unit = int(order[at])
            low, high = max(start, int(before[at])), min(stop, int(before[at + 1]))
            a = int(self.start[unit]) + low - int(before[at])
            array = int(self.array[unit])
            if pending and (pending[-1][:1] + pending[-1][2:3] != (array, a) or a - pending[0][1] >= READ_ROWS):
                yield flush()
                pending = []
            pending.append((array, a, a + high - low, low, unit))
        if pending:
            yield flush()


def _striped(units: int, share: float) -> np.ndarray:
    """Mark the units that are held out: the last ones of each of up to 16 equal stripes."""
    wanted = round(share * units)
    held_out = np.zeros(units, dtype=bool)
    stripes = max(1, min(STRIPES, wanted))
    for stripe in range(stripes):
        start, end = stripe * units // stripes, (stripe + 1) * units // stripes
        held_out[end - (end * wanted // units - start * wanted // units) : end] = True
    return held_out
