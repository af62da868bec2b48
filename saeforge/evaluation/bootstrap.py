"""Bootstrap intervals over documents: tokens of one document are alike, so documents are what is drawn again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 20


def resample(sums: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Return the totals of documents drawn with replacement, as many as there are.

    Args:
        sums: (documents, columns) per-document sums.
        seed: of the draws; equal seeds and shapes give equal draws.
        resamples: how often to draw.

    Returns:
        (resamples, columns) totals.
    """
    return np.concatenate([times @ sums for times in _draws(len(sums), seed, resamples)])


def interval(values: np.ndarray, *, level: float = LEVEL) -> tuple[float, float] | None:
    """Return the percentile interval of resampled values, or None where one of them is undefined.

    Args:
        values: (resamples,) the metric of each resample.
        level: share of resamples inside.
    """
    if not np.isfinite(values).all():
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _draws(documents: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield (some resamples, documents): how often each document was drawn; in parts, for many documents."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // documents)
    for start in range(0, resamples, at_once):
        n = min(at_once, resamples - start)
        drawn = generator.integers(documents, size=(n, documents)) + documents * np.arange(n)[:, None]
        yield np.bincount(drawn.ravel(), minlength=n * documents).reshape(n, documents).astype(np.float64)
