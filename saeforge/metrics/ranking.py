"""How well scores tell two sets of rows apart: AUROC, average precision and F1 from the non-zeros of many latents.

A latent is silent on most rows. Those rows tie at 0, so their share of every figure follows from their number: the cost
is one sort of the non-zeros, O(nnz log nnz) for all latents together, then a few passes over them for each question
asked. Nothing here knows of models, labels or documents; ties are ties of float32 values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
COVERAGE = 0.95
BOOTSTRAP_BUFFER = 1 << 22  # numbers of a temporary array, so that it stays in a cache level or two


@dataclass(frozen=True)
class Estimate:
    """A figure with its percentile interval (95%) from a bootstrap over documents."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @classmethod
    def of(cls, value: float, resampled: np.ndarray) -> Estimate:
        """A figure and its values (resamples,) in resamples."""
        low, high = np.quantile(resampled, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
        return cls(value, float(low), float(high))


@dataclass(frozen=True)
class Entries:
    """Non-zeros of a block of latents over numbered rows, in any order; a pair (latent, row) comes at most once.

    Attributes:
        latent: int (nnz,), 0 to n_latents - 1.
        row: int (nnz,).
        value: float32 (nnz,); zeros are allowed and mean what an absent entry means.
        n_latents: number of latents, silent ones included.
    """

    latent: np.ndarray
    row: np.ndarray
    value: np.ndarray
    n_latents: int

    @classmethod
    def of_score(cls, score: np.ndarray) -> Entries:
        """One latent with a score (rows,) for every row."""
        row = np.flatnonzero(score)
        return cls(np.zeros(row.size, np.int64), row, score[row].astype(np.float32), 1)


@dataclass(frozen=True)
class Ranking:
    """Figures of every latent of a block, each float64 (n_latents,).

    Attributes:
        auroc: chance that a positive row has a greater value than a negative one, ties counting half.
        average_precision: sum over the values t, from the greatest down, of precision(value >= t) times the recall
            gained at t; silent rows come in as the value 0. scikit-learn's definition.
        f1: the greatest F1 of "value >= t" with t among the non-zero values, so that a silent row always means no.
        threshold: the greatest t that reaches it; infinity for a latent without non-zeros.
    """

    auroc: np.ndarray
    average_precision: np.ndarray
    f1: np.ndarray
    threshold: np.ndarray


class Ordered:
    """The entries of a block of latents, sorted once by latent and value; then `rank` answers any question."""

    def __init__(self, entries: Entries) -> None:
        used = entries.value != 0
        value = entries.value[used].astype(np.float32)
        # One integer sorts as (latent, value) does: floats order like their bits once negative ones are flipped.
        bits = value.view(np.uint32)
        bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
        key = entries.latent[used].astype(np.uint64) << np.uint64(32) | bits.astype(np.uint64)
        order = np.argsort(key)
        key = key[order]
        self.n_latents = entries.n_latents
        self.row = entries.row[used][order]
        # A group is the entries of one latent that tie.
        self.start = np.flatnonzero(np.diff(key, prepend=~key[:1]))
        self.value = value[order][self.start]
        self.latent = (key[self.start] >> np.uint64(32)).astype(np.int64)
        first = np.searchsorted(self.latent, np.arange(entries.n_latents + 1))  # first group of each latent
        self.first, self.empty = first[:-1], first[:-1] == first[1:]

    def rank(self, positive: np.ndarray, negative: np.ndarray) -> Ranking:
        """Figures for telling positive rows from negative ones; rows that are neither do not count.

        Args:
            positive: bool (rows,).
            negative: bool (rows,), disjoint; each holds a row at least.
        """
        total = float(np.count_nonzero(positive)), float(np.count_nonzero(negative))
        p, n = (self._sums(mask) for mask in (positive, negative))
        below_p, below_n = self._before(p), self._before(n)  # active rows of this latent with smaller values
        active_p, active_n = self._per_latent(p), self._per_latent(n)
        zero_p, zero_n = total[0] - active_p, total[1] - active_n
        up = self.value > 0
        minus_p, minus_n = self._per_latent(np.where(up, 0, p)), self._per_latent(np.where(up, 0, n))
        latent = self.latent

        wins = self._per_latent(p * (below_n + n / 2 + np.where(up, zero_n[latent], 0)))
        auroc = (wins + zero_p * (minus_n + zero_n / 2)) / (total[0] * total[1])

        # Rows with this group's value or a greater one.
        true = active_p[latent] - below_p + np.where(up, 0, zero_p[latent])
        called = true + active_n[latent] - below_n + np.where(up, 0, zero_n[latent])
        precision = true / np.maximum(called, 1)
        at_zero = active_p - minus_p + zero_p
        called_zero = at_zero + active_n - minus_n + zero_n
        ap = self._per_latent(p * precision) + zero_p * at_zero / np.maximum(called_zero, 1)

        f1 = 2 * true / (called + total[0])
        best = np.zeros(self.n_latents)
        threshold = np.full(self.n_latents, np.inf)
        some = ~self.empty
        if some.any():
            best[some] = np.maximum.reduceat(f1, self.first[some])
            reached = np.where(f1 == best[latent], self.value.astype(np.float64), -np.inf)
            threshold[some] = np.maximum.reduceat(reached, self.first[some])
        return Ranking(auroc, ap / total[0], best, threshold)

    def _sums(self, mask: np.ndarray) -> np.ndarray:
        """How many rows of a mask each group holds."""
        if self.start.size == 0:
            return np.zeros(0)
        return np.asarray(np.add.reduceat(mask[self.row].astype(np.float64), self.start))

    def _before(self, counts: np.ndarray) -> np.ndarray:
        """Sum over the earlier groups of the same latent."""
        before = np.concatenate([[0.0], np.cumsum(counts)])
        return np.asarray(before[:-1] - before[self.first[self.latent]])

    def _per_latent(self, counts: np.ndarray) -> np.ndarray:
        return np.asarray(np.bincount(self.latent, counts, minlength=self.n_latents))


def f1_at(score: np.ndarray, positive: np.ndarray, negative: np.ndarray, threshold: float) -> float:
    """F1 of calling positive every row whose score (rows,) is at least the threshold."""
    called = score.astype(np.float32) >= threshold
    true = int(np.count_nonzero(called & positive))
    return 2 * true / (true + int(np.count_nonzero(called & negative)) + int(np.count_nonzero(positive)))


def resample_auroc(
    score: np.ndarray, unit: np.ndarray, positive: np.ndarray, negative: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """AUROC in resamples of whole units (documents), exact, without ranking anew for each.

    Args:
        score: (rows,).
        unit: int (rows,), the unit of each row.
        positive: bool (units,).
        negative: bool (units,), disjoint.
        weights: (resamples, units), how often each unit was drawn; each resample draws a positive and a negative one.

    Returns:
        float64 (resamples,).
    """
    used = (positive | negative)[unit]
    score, unit = score[used].astype(np.float32), unit[used]
    # By pairs of units the work does not grow with the resamples; by weights it does not grow with the units.
    by_pair = np.count_nonzero(negative) * np.count_nonzero(score[positive[unit]])
    by_weight = len(weights) * np.count_nonzero(score)
    wins = wins_by_pair if by_pair < by_weight else wins_by_weight
    rows = np.bincount(unit, minlength=len(positive))
    pairs = (weights @ (rows * positive)) * (weights @ (rows * negative)).astype(np.float64)
    return np.asarray(wins(score, unit, positive, negative, weights) / pairs)


def wins_by_pair(
    score: np.ndarray, unit: np.ndarray, positive: np.ndarray, negative: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Won pairs of rows in each resample, from the won pairs of each pair of units; arguments as `resample_auroc`."""
    places = np.flatnonzero(positive)
    number = np.full(len(positive), -1)
    number[places] = np.arange(places.size)
    mine = positive[unit]
    active = np.flatnonzero(mine & (score != 0))
    asked, owner = np.append(score[active], np.float32(0)), number[unit[active]]
    silent = np.bincount(number[unit[mine & (score == 0)]], minlength=places.size)  # all ask for the pairs of a 0
    rest = np.flatnonzero(negative[unit])
    rest = rest[np.lexsort((score[rest], unit[rest]))]
    values, others, starts = score[rest], *np.unique(unit[rest], return_index=True)
    ends = np.append(starts[1:], values.size)
    result = np.zeros((len(weights), places.size))
    step = max(1, BOOTSTRAP_BUFFER // max(1, places.size))
    for begin in range(0, others.size, step):
        block = slice(begin, begin + step)
        won = np.empty((others[block].size, places.size))
        for i, (start, end) in enumerate(zip(starts[block], ends[block], strict=True)):
            below = np.searchsorted(values[start:end], asked, "left") + np.searchsorted(
                values[start:end], asked, "right"
            )
            won[i] = np.bincount(owner, below[:-1], minlength=places.size) + silent * below[-1]
        result += weights[:, others[block]].astype(np.float64) @ won
    return np.asarray((result * weights[:, places]).sum(1) / 2)


def wins_by_weight(
    score: np.ndarray, unit: np.ndarray, positive: np.ndarray, negative: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Won pairs of rows in each resample, from one sort of the non-zeros; arguments as `resample_auroc`."""
    rows = np.bincount(unit, minlength=len(positive))
    total_p, total_n = weights @ (rows * positive), weights @ (rows * negative)
    active = np.flatnonzero(score)
    active = active[np.argsort(score[active], kind="stable")]
    value, unit = score[active], unit[active]
    start = np.flatnonzero(np.diff(value, prepend=np.nan) != 0)
    up = value[start] > 0
    is_p = positive[unit]
    result = np.empty(len(weights))
    step = max(1, BOOTSTRAP_BUFFER // max(1, active.size))
    for begin in range(0, len(weights), step):
        part = slice(begin, begin + step)
        w = weights[part].astype(np.float64)[:, unit]
        p = w * is_p
        n = w - p
        if start.size < active.size:
            p, n = np.add.reduceat(p, start, axis=1), np.add.reduceat(n, start, axis=1)
        zero_p, zero_n = total_p[part] - p.sum(1), total_n[part] - n.sum(1)
        minus_n = n[:, ~up].sum(1)
        below = np.cumsum(n, axis=1)
        below -= n / 2
        wins = np.einsum("bg,bg->b", p, below) + p[:, up].sum(1) * zero_n
        result[part] = wins + zero_p * (minus_n + zero_n / 2)
    return result


def draw_weights(strata: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap: from each stratum as many units as it holds, with replacement.

    Args:
        strata: int (units,), for example the label of each document; negative: never drawn.
        resamples: number of resamples.
        seed: of the draws.

    Returns:
        int32 (resamples, units): how often each unit was drawn.
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((resamples, len(strata)), np.int32)
    for stratum in np.unique(strata[strata >= 0]):
        units = np.flatnonzero(strata == stratum)
        weights[:, units] = rng.multinomial(units.size, np.full(units.size, 1 / units.size), size=resamples)
    return weights
