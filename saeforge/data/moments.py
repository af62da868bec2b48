"""Statistics of activations: exact float64 accumulators that merge, and the frozen record that a manifest keeps.

The accumulators follow Chan, Golub and LeVeque (1979): mean and centred second moment per dimension, so that merging
buckets loses nothing to cancellation. Pure numpy: no torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


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
    """

    count: int
    mean: list[float]
    variance: list[float]
    mean_norm: float
    mean_square_norm: float
    max_norm: float


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
    """

    count: int
    mean: np.ndarray
    m2: np.ndarray
    norm_sum: float
    square_norm_sum: float
    norm_max: float

    @classmethod
    def empty(cls, d: int) -> Moments:
        """Return the accumulator of no rows, `d` wide."""
        return cls(0, np.zeros(d), np.zeros(d), 0.0, 0.0, 0.0)

    @classmethod
    def of(cls, x: np.ndarray) -> Moments:
        """Return the accumulator of the rows of `x` (rows, d), any float dtype; two passes, so no cancellation."""
        x = np.asarray(x, dtype=np.float64)
        if len(x) == 0:
            return cls.empty(x.shape[1])
        mean = x.mean(axis=0)
        square_norms = np.einsum("rd,rd->r", x, x)
        norms = np.sqrt(square_norms)
        centred = x - mean
        m2 = np.einsum("rd,rd->d", centred, centred)
        return cls(len(x), mean, m2, float(norms.sum()), float(square_norms.sum()), float(norms.max()))

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
        )
