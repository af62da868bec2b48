"""Which rows of the sources go to which split, and in which order they are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from saeforge.data.imports.arrays import ForeignArray
from saeforge.errors import ConfigError

RUN_ROWS = 256
STRIPES = 16
READ_ROWS = 8192
SCAN_ROWS = 2**20


class Units:
    """Where every unit of rows lies, which split it is in, and the order of the kept rows of a split.

    Args:
        arrays: the sources.
        validation_share: share of the units held out.
        seed: of the order. shuffle: False keeps the order of the sources.
        skip_tokens: rows of these token ids are left out.

    Attributes:
        array, start, rows: (units,) which array a unit is in, its first row there, and how many are kept.
        skipped_rows: left out, over all units.
        order: by split, its units in order.
        before: by split, (units + 1,) kept rows before each.

    Raises:
        ConfigError: tokens to skip, and an array does not say which tokens its rows are of.
    """

    def __init__(
        self,
        arrays: Sequence[ForeignArray],
        *,
        validation_share: float,
        seed: int,
        shuffle: bool,
        skip_tokens: Sequence[int] = (),
    ) -> None:
        lengths = np.array([array.context or RUN_ROWS for array in arrays], dtype=np.int64)
        totals = np.array([array.rows for array in arrays], dtype=np.int64)
        counts = -(-totals // lengths)
        self.array = np.repeat(np.arange(len(arrays)), counts)
        self.start = (np.arange(len(self.array)) - np.repeat(np.cumsum(counts) - counts, counts)) * lengths[self.array]
        self._stop = np.minimum(self.start + lengths[self.array], totals[self.array])
        self._skipped = [_rows_of(array, skip_tokens) for array in arrays]
        self.rows = self._stop - self.start
        for number, skipped in enumerate(self._skipped):
            here = np.flatnonzero(self.array == number)
            self.rows[here] -= np.diff(np.searchsorted(skipped, np.append(self.start[here], totals[number])))
        self.skipped_rows = sum(map(len, self._skipped))
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

    def reads(self, split: str, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield what to read for kept rows start to stop of a split, in the order of the sources.

        Yields:
            Array, ascending rows of it in a range worth reading at once, and of each its kept number and its unit.
        """
        order, before = self.order[split], self.before[split]
        first = int(np.searchsorted(before, start, side="right")) - 1
        last = int(np.searchsorted(before, stop, side="left"))
        pending: list[tuple[int, np.ndarray, int]] = []  # unit, its rows that are wanted, the first one's kept number

        def flush() -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
            kept = np.concatenate([np.arange(low, low + len(rows)) for _, rows, low in pending])
            units = np.repeat([unit for unit, *_ in pending], [len(rows) for _, rows, _ in pending])
            return int(self.array[units[0]]), np.concatenate([rows for _, rows, _ in pending]), kept, units

        for at in first + np.argsort(order[first:last]):
            unit = int(order[at])
            low, high = max(start, int(before[at])), min(stop, int(before[at + 1]))
            if low >= high:  # nothing of it is kept
                continue
            rows = self._kept(unit)[low - before[at] : high - before[at]]
            beside = pending and unit == pending[-1][0] + 1 and self.array[unit] == self.array[unit - 1]
            if pending and not (beside and rows[0] - pending[0][1][0] < READ_ROWS):
                yield flush()
                pending = []
            pending.append((unit, rows, low))
        if pending:
            yield flush()

    def _kept(self, unit: int) -> np.ndarray:
        """The rows of a unit that are not skipped, ascending."""
        start, stop = int(self.start[unit]), int(self._stop[unit])
        skipped = self._skipped[self.array[unit]]
        here = skipped[slice(*np.searchsorted(skipped, (start, stop)))]
        return np.delete(np.arange(start, stop), here - start)


def _rows_of(array: ForeignArray, tokens: Sequence[int]) -> np.ndarray:
    """The rows of an array that are of these tokens, ascending."""
    found = [np.zeros(0, dtype=np.int64)]
    if tokens and not array.has_tokens:
        raise ConfigError(
            f"{array.where} does not say which tokens its rows are of, so none can be skipped; leave out "
            "--skip_token_ids"
        )
    for start in range(0, array.rows if tokens else 0, SCAN_ROWS):
        ids = array.tokens(start, min(start + SCAN_ROWS, array.rows))
        found.append(start + np.flatnonzero(np.isin(np.asarray(ids), tokens)))
    return np.concatenate(found)


def _striped(units: int, share: float) -> np.ndarray:
    """Mark the units that are held out: the last ones of each of up to 16 equal stripes."""
    wanted = round(share * units)
    held_out = np.zeros(units, dtype=bool)
    stripes = max(1, min(STRIPES, wanted))
    for stripe in range(stripes):
        start, end = stripe * units // stripes, (stripe + 1) * units // stripes
        held_out[end - (end * wanted // units - start * wanted // units) : end] = True
    return held_out
