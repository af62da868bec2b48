"""Statistics of activations: exact float64 accumulators that merge, and the frozen record that a manifest keeps.

The accumulators follow Chan, Golub and LeVeque (1979): mean and centred second moment per dimension, so that merging
buckets loses nothing to cancellation. Pure numpy: no torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BINS_PER_OCTAVE = 8
_CHUNK_VALUES = 2**16  # values in float64 at once: half a MiB stays in the cache
_SHIFT_ROWS = 64


@dataclass(frozen=True)
class Statistics:
    """What a variant needs to know of a site before training: raw units, train split only.

    Attributes:
        count: rows seen.
        mean: mean of each dimension, length d.
        variance: population variance of each dimension, length d.
        mean_norm: mean Euclidean norm of a row.
        mean_square_norm: mean squared Euclidean norm of a row.
        max_norm: largest Euclidean norm of a row.
        norm_histogram: pairs (bin, rows), ascending, without empty bins: bin b holds norms from 2**(b/8) to less than
            2**((b+1)/8); rows of norm 0 are in no bin. None in datasets that were made before it was kept.
    """

    count: int
    mean: list[float]
    variance: list[float]
    mean_norm: float
    mean_square_norm: float
    max_norm: float
    norm_histogram: list[list[int]] | None = None

    @classmethod
    def beside(cls, parts: Sequence[Statistics]) -> Statistics:
        """Of rows that stand side by side; norms of the joined rows are bounded only: `mean_norm` is NaN."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            count=parts[0].count,
            mean=[value for part in parts for value in part.mean],
            variance=[value for part in parts for value in part.variance],
            mean_norm=math.nan,
            mean_square_norm=sum(part.mean_square_norm for part in parts),
            max_norm=math.sqrt(sum(part.max_norm**2 for part in parts)),
        )

    @property
    def median_norm(self) -> float | None:
        """The (lower) median norm to within 5 percent, the middle of its bin; None without a histogram."""
        if self.norm_histogram is None:
            return None
        seen = self.count - sum(rows for _, rows in self.norm_histogram)  # rows of norm 0
        if 2 * seen >= self.count:
            return 0.0
        for number, rows in self.norm_histogram:
            seen += rows
            if 2 * seen >= self.count:
                return float(2.0 ** ((number + 0.5) / BINS_PER_OCTAVE))
        raise ValueError(f"the norm histogram holds {seen} of {self.count} rows")


@dataclass
class Moments:
    """Mergeable sums behind `Statistics`, all in float64.

    Attributes:
        count: rows seen.
        mean: (d,) running mean.
        m2: (d,) sum of squared distances from the mean.
        norm_sum: sum of row norms.
        square_norm_sum: sum of squared row norms.
        norm_max: largest row norm.
        norm_bins: rows by bin of their norm, see `Statistics.norm_histogram`.
    """

    count: int
    mean: np.ndarray
    m2: np.ndarray
    norm_sum: float
    square_norm_sum: float
    norm_max: float
    norm_bins: dict[int, int] = field(default_factory=dict)

    @classmethod
    def empty(cls, d: int) -> Moments:
        """Return the accumulator of no rows, `d` wide."""
        return cls(0, np.zeros(d), np.zeros(d), 0.0, 0.0, 0.0)

    @classmethod
    def of(cls, x: np.ndarray) -> Moments:
        """Return the accumulator of the rows of `x` (rows, d): float32, float64, or uint16 = the bits of bfloat16.

        One pass in chunks that stay in the cache. Sums are taken around the mean of the first 64 rows: the distance of
        that from the mean of all n is at most sqrt(n / 64) deviations, so at most log10(n / 64) digits of 16 are lost.
        """
        rows, d = x.shape
        if rows == 0:
            return cls.empty(d)
        shift = _as_float(x[:_SHIFT_ROWS]).mean(axis=0, dtype=np.float64)
        total, squares, square_norms = np.zeros(d), np.zeros(d), np.empty(rows)
        chunk = max(1, _CHUNK_VALUES // d)
        buffer = np.empty((min(chunk, rows), d))
        for start in range(0, rows, chunk):
            part = x[start : start + chunk]
            values = buffer[: len(part)]
            values[...] = _as_float(part)
            np.einsum("rd,rd->r", values, values, out=square_norms[start : start + chunk])
            values -= shift
            total += values.sum(axis=0)
            squares += np.einsum("rd,rd->d", values, values)
        norms = np.sqrt(square_norms)
        return cls(
            rows,
            shift + total / rows,
            np.maximum(squares - total * total / rows, 0.0),  # rounding may leave a constant dimension below 0
            float(norms.sum()),
            float(square_norms.sum()),
            float(norms.max()),
            _bins(square_norms),
        )

    def merge(self, other: Moments) -> Moments:
        """Return the accumulator of both sets of rows."""
        if self.count == 0:
            return other
        if other.count == 0:
            return self
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta * delta * (self.count * other.count / count),
            self.norm_sum + other.norm_sum,
            self.square_norm_sum + other.square_norm_sum,
            max(self.norm_max, other.norm_max),
            {
                number: self.norm_bins.get(number, 0) + other.norm_bins.get(number, 0)
                for number in sorted({*self.norm_bins, *other.norm_bins})
            },
        )

    def statistics(self) -> Statistics:
        """Return the frozen record; raises ValueError when no row was seen."""
        if self.count == 0:
            raise ValueError("statistics of no rows are undefined")
        return Statistics(
            count=self.count,
            mean=self.mean.tolist(),
            variance=(self.m2 / self.count).tolist(),
            mean_norm=self.norm_sum / self.count,
            mean_square_norm=self.square_norm_sum / self.count,
            max_norm=self.norm_max,
            norm_histogram=[[number, rows] for number, rows in sorted(self.norm_bins.items())],
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; Python's float repr round-trips float64 exactly."""
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "m2": self.m2.tolist(),
            "norm_sum": self.norm_sum,
            "square_norm_sum": self.square_norm_sum,
            "norm_max": self.norm_max,
            "norm_bins": [[number, rows] for number, rows in sorted(self.norm_bins.items())],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Moments:
        """Read back `to_json`."""
        return cls(
            int(data["count"]),
            np.asarray(data["mean"], dtype=np.float64),
            np.asarray(data["m2"], dtype=np.float64),
            float(data["norm_sum"]),
            float(data["square_norm_sum"]),
            float(data["norm_max"]),
            {int(number): int(rows) for number, rows in data["norm_bins"]},
        )


def _as_float(x: np.ndarray) -> np.ndarray:
    """Return float rows; bits of bfloat16 are the upper half of those of float32."""
    if x.dtype != np.uint16:
        return x
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bins(square_norms: np.ndarray) -> dict[int, int]:
    """Count norms by bin; those that are 0 or not finite are in none."""
    positive = square_norms[(square_norms > 0) & np.isfinite(square_norms)]
    numbers = np.floor(np.log2(positive) * (BINS_PER_OCTAVE / 2)).astype(np.int64)
    found, rows = np.unique(numbers, return_counts=True)
    return dict(zip(found.tolist(), rows.tolist(), strict=True))
