"""Which features fire on which row, and how strongly: exact draws from the law, a few per row instead of one each.

Given a row's shared factors, features are independent: one fires where its own Gaussian is above a level that depends
on them. One random byte decides that for most (it is the upper byte of the tail probability that was drawn); only where
the byte leaves it open, one in 256 times for a rare feature, is the rest of the number drawn. And a child is drawn only
where its parent fires, since elsewhere it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saeforge.data.synthetic.random import Stream
from saeforge.data.synthetic.truth import Truth

#: Rows at a time: levels and bytes of 700 features stay in the cache.
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Activity:
    """The true features of some rows, row by row (CSR), features ascending within a row.

    Attributes:
        values: (nnz,) float32 magnitudes, positive.
        features: (nnz,) int64.
        offsets: (rows + 1,) int64.
    """

    values: np.ndarray
    features: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def rows(self) -> np.ndarray:
        """(nnz,) the row of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def fires(self, features: int) -> Tensor:
        """(rows, features) bool."""
        dense = torch.zeros(len(self), features, dtype=torch.bool)
        dense[torch.from_numpy(self.rows()), torch.from_numpy(self.features)] = True
        return dense

    def activations(self, truth: Truth) -> Tensor:
        """(rows, d_in) float32: the sum of directions times magnitudes, plus the bias."""
        indices, offsets = torch.from_numpy(self.features), torch.from_numpy(self.offsets[:-1])
        weights = torch.from_numpy(self.values)
        return F.embedding_bag(indices, truth.directions, offsets, mode="sum", per_sample_weights=weights) + truth.bias


class Sampler:
    """Draws rows of a truth."""

    def __init__(self, truth: Truth) -> None:
        config = truth.config
        self.truth, self._branching = truth, config.branching
        self._own = np.sqrt(1 - np.square(truth.loadings).sum(axis=1))
        drawn = np.arange(config.features)
        self._drawn = drawn[truth.parents < 0]  # roots and free features; the others only below a parent that fires
        self._first_child = np.full(config.features, -1, dtype=np.int64)
        children = truth.children()
        self._first_child[truth.parents[children[::-1]]] = children[::-1]
        # level = (threshold - loadings . factors) / own deviation, as one product with (factors, 1).
        self._levels = np.concatenate([-truth.loadings, truth.thresholds[:, None]], axis=1) / self._own[:, None]
        self._drawn_levels = np.ascontiguousarray(self._levels[self._drawn].T.astype(np.float32))
        # A Gaussian whose tail probability has upper byte b is at most ndtri(1 - b / 256).
        bound = -torch.special.ndtri(torch.arange(256, dtype=torch.float64) / 256).numpy()
        self._highest = np.nextafter(bound.astype(np.float32), np.float32(np.inf))

    def draw(self, rows: int, *key: int) -> Activity:
        """The features of `rows` rows, as a pure function of `rows` and `key`."""
        stream = Stream(*key)
        parts = [self._chunk(min(CHUNK_ROWS, rows - at), stream) for at in range(0, rows, CHUNK_ROWS)]
        counts = np.concatenate([np.bincount(row, minlength=n) for n, row, _, _ in parts])
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return Activity(
            np.concatenate([values for *_, values in parts]).astype(np.float32),
            np.concatenate([features for _, _, features, _ in parts]),
            offsets,
        )

    def _chunk(self, n: int, stream: Stream) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """(n, rows, features, values) of n rows, sorted by row and feature."""
        rank = self.truth.loadings.shape[1]
        factors = np.ones((n, rank + 1))
        factors[:, :rank] = stream.normal(n * rank).reshape(n, rank)
        levels = factors.astype(np.float32) @ self._drawn_levels
        upper = stream.bytes(levels.size)
        open_ = np.flatnonzero(levels.ravel() < np.take(self._highest, upper))
        row, column = np.divmod(open_, len(self._drawn))
        feature = self._drawn[column]
        tail = (upper[open_] + stream.uniform(len(open_))) / 256
        fired = tail < _tail_probability(self._level(factors, row, feature))
        row, feature, value = self._magnitudes(row[fired], feature[fired], stream)
        rows, features, values = [row], [feature], [value]
        while True:
            row, feature, value = self._below(factors, row, feature, value, stream)
            if len(row) == 0:
                break
            rows.append(row)
            features.append(feature)
            values.append(value)
        row, feature, value = np.concatenate(rows), np.concatenate(features), np.concatenate(values)
        order = np.argsort(row * self.truth.config.features + feature)
        return n, row[order], feature[order], value[order]

    def _below(
        self, factors: np.ndarray, row: np.ndarray, feature: np.ndarray, value: np.ndarray, stream: Stream
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The children that fire below features that do: (rows, features, values)."""
        config, first = self.truth.config, self._first_child[feature]
        has = first >= 0
        above, factor = np.flatnonzero(has), self._branching
        group = np.repeat(np.arange(len(above)), factor)
        row = np.repeat(row[above], factor)
        child = (first[above][:, None] + np.arange(factor)).ravel()
        fired = stream.uniform(len(row)) < _tail_probability(self._level(factors, row, child))
        group = group[fired]
        row, child, size, kept = self._positive(row[fired], child[fired], stream)
        group = group[kept]
        if config.exclusive and len(row):
            # The winner of a group is the first after a shuffle within groups.
            order = np.argsort(group + stream.uniform(len(row)))
            winner = order[np.concatenate([[True], np.diff(group[order]) > 0])]
            winner.sort()
            row, child, size, group = row[winner], child[winner], size[winner], group[winner]
        if config.scale_by_parent:
            parent = above[group]
            size = size * value[parent] / self.truth.means[feature[parent]]
        return row, child, size

    def _level(self, factors: np.ndarray, row: np.ndarray, feature: np.ndarray) -> np.ndarray:
        """What each feature's own Gaussian must exceed, float64."""
        level: np.ndarray = np.einsum("nr,nr->n", factors[row], self._levels[feature])
        return level

    def _magnitudes(
        self, row: np.ndarray, feature: np.ndarray, stream: Stream
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        row, feature, value, _ = self._positive(row, feature, stream)
        return row, feature, value

    def _positive(
        self, row: np.ndarray, feature: np.ndarray, stream: Stream
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Magnitudes; what would be negative does not fire. The last result says who is left."""
        value = self.truth.means[feature] + self.truth.spreads[feature] * stream.normal(len(feature))
        kept = value > 0
        return row[kept], feature[kept], value[kept], kept


def _tail_probability(level: np.ndarray) -> np.ndarray:
    """P(Gaussian > level), float64."""
    probability: np.ndarray = torch.special.ndtr(torch.from_numpy(-level)).numpy()
    return probability
