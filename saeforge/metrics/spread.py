"""`Spread`: a distribution over latents in four numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Mean, 5th, 50th and 95th percentile (nearest rank: values that occur, never between two)."""

    mean: float
    p5: float
    p50: float
    p95: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Of (n,) values, n at least 1."""
        ordered = values.double().sort().values
        n = len(ordered)
        return cls(float(ordered.mean()), *(float(ordered[-(-percent * n // 100) - 1]) for percent in (5, 50, 95)))
