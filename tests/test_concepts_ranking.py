"""Figures from non-zeros alone equal those of dense data; resamples equal rows that are really repeated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from saeforge.features.concepts.columns import pool_mean
from saeforge.metrics.ranking import (
    Entries,
    Ordered,
    draw_weights,
    f1_at,
    resample_auroc,
    wins_by_pair,
    wins_by_weight,
)


def make_dense(seed: int, *, rows: int, latents: int, zeros: float, signed: bool) -> np.ndarray:
    """Scores with few different values, so that ties are everywhere; the first latent is silent."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(-3 if signed else 0, 6, size=(rows, latents)) * np.float32(0.37)
    dense[rng.random(dense.shape) < zeros] = 0
    dense[:, 0] = 0
    return dense.astype(np.float32)


def entries_of(dense: np.ndarray, seed: int = 0) -> Entries:
    """The non-zeros of a dense array (rows, latents), in no order."""
    row, latent = np.nonzero(dense)
    order = np.random.default_rng(seed).permutation(row.size)
    return Entries(latent[order], row[order], dense[row, latent][order], dense.shape[1])


def halves(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Positive, negative and unused rows; at least one of each of the first two."""
    kind = np.random.default_rng(seed + 1).integers(0, 3, size=rows)
    kind[:2] = 0, 1
    return kind == 0, kind == 1


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 60),
    latents=st.integers(1, 5),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    signed=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_figures_equal_those_of_dense_data(seed: int, rows: int, latents: int, zeros: float, signed: bool) -> None:
    dense = make_dense(seed, rows=rows, latents=latents, zeros=zeros, signed=signed)
    positive, negative = halves(seed, rows)
    found = Ordered(entries_of(dense, seed)).rank(positive, negative)
    used = positive | negative
    for i in range(latents):
        values, truth = dense[used, i], positive[used]
        assert found.auroc[i] == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
        assert found.average_precision[i] == pytest.approx(average_precision_score(truth, values), abs=1e-12)
        # Any non-zero value of a row may be the threshold, also that of an unused row between two others.
        candidates = [t for t in np.unique(dense[:, i]) if t != 0]
        by_threshold = {t: f1_score(truth, values >= t, zero_division=0) for t in candidates}
        assert found.f1[i] == pytest.approx(max(by_threshold.values(), default=0.0), abs=1e-12)
        if by_threshold:
            threshold = found.threshold[i]
            assert by_threshold[np.float32(threshold)] == pytest.approx(found.f1[i], abs=1e-12)
            assert f1_at(dense[:, i], positive, negative, threshold) == pytest.approx(found.f1[i], abs=1e-12)
        else:
            assert found.threshold[i] == np.inf


def test_a_hand_checked_case() -> None:
    # Positive rows 2, 0, 0; negative rows 1, 0: of six pairs two are won by the 2, two tie at 0, two are lost to the 1.
    score = np.array([2, 0, 0, 1, 0], dtype=np.float32)
    positive = np.array([True, True, True, False, False])
    found = Ordered(Entries.of_score(score)).rank(positive, ~positive)
    assert found.auroc[0] == (2 + 0.5 * 2) / 6
    assert found.average_precision[0] == pytest.approx(1 / 3 * 1 + 2 / 3 * 3 / 5)
    assert (found.f1[0], found.threshold[0]) == (0.5, 2.0)


def test_stored_zeros_mean_what_absent_entries_mean() -> None:
    dense = make_dense(3, rows=40, latents=3, zeros=0.6, signed=True)
    positive, negative = halves(3, 40)
    row, latent = np.indices(dense.shape).reshape(2, -1)
    stored = Ordered(Entries(latent, row, dense.ravel(), 3)).rank(positive, negative)
    absent = Ordered(entries_of(dense)).rank(positive, negative)
    for name in ("auroc", "average_precision", "f1", "threshold"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(absent, name))


@given(seed=st.integers(0, 1000), signed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_swapping_sides_or_signs_mirrors_auroc(seed: int, signed: bool) -> None:
    dense = make_dense(seed, rows=50, latents=4, zeros=0.7, signed=signed)
    positive, negative = halves(seed, 50)
    plain = Ordered(entries_of(dense)).rank(positive, negative).auroc
    np.testing.assert_allclose(Ordered(entries_of(dense)).rank(negative, positive).auroc, 1 - plain, atol=1e-12)
    np.testing.assert_allclose(Ordered(entries_of(-dense)).rank(positive, negative).auroc, 1 - plain, atol=1e-12)
    np.testing.assert_allclose(Ordered(entries_of(dense * 8)).rank(positive, negative).auroc, plain, atol=1e-12)


def test_documents_are_pooled_by_their_mean() -> None:
    dense = make_dense(5, rows=90, latents=6, zeros=0.8, signed=True)
    document = np.random.default_rng(0).integers(0, 12, size=90)
    document[:12] = np.arange(12)
    tokens = np.bincount(document)
    pooled = pool_mean(entries_of(dense), document, tokens)
    found = np.zeros((12, 6))
    found[pooled.row, pooled.latent] = pooled.value
    expected = np.stack([dense[document == i].mean(0) for i in range(12)])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@given(seed=st.integers(0, 10_000), zeros=st.sampled_from([0.0, 0.8, 1.0]), signed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_resample_equals_documents_that_are_really_repeated(seed: int, zeros: float, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    document = np.sort(rng.integers(0, 9, size=70))
    document[:9] = np.arange(9)
    label = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])  # documents of label 2 are used by neither side
    positive, negative = label == 0, label == 1
    score = make_dense(seed, rows=70, latents=2, zeros=zeros, signed=signed)[:, 1]
    weights = draw_weights(label, 20, seed)
    used = (positive | negative)[document]
    rows = (score[used], document[used], positive, negative, weights)
    np.testing.assert_array_equal(wins_by_pair(*rows), wins_by_weight(*rows))
    found = resample_auroc(score, document, positive, negative, weights)
    for i, weight in enumerate(weights):
        repeated = np.repeat(np.arange(70), np.where(used, weight[document], 0))
        assert found[i] == pytest.approx(roc_auc_score(positive[document[repeated]], score[repeated]), abs=1e-12)


def test_draws_keep_the_size_of_each_stratum() -> None:
    strata = np.array([0] * 5 + [1] * 9 + [-1] * 4)
    weights = draw_weights(strata, 500, 0)
    assert (weights[:, strata == 0].sum(1) == 5).all()
    assert (weights[:, strata == 1].sum(1) == 9).all()
    assert not weights[:, strata == -1].any()
    np.testing.assert_allclose(weights[:, strata >= 0].mean(0), 1, atol=0.2)
    np.testing.assert_array_equal(weights, draw_weights(strata, 500, 0))


def test_the_interval_covers_the_truth_where_tokens_of_a_document_are_alike() -> None:
    # Each token is a document's own level plus noise: an interval over tokens would be far too narrow.
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], 30)
    document = np.repeat(np.arange(60), 8)
    weights = draw_weights(label, 300, 0)
    many = rng.normal(size=400_000) * np.sqrt(2)
    truth = float((many + 1 > rng.normal(size=400_000) * np.sqrt(2)).mean())
    covered = []
    for _ in range(150):
        level = rng.normal(size=60) + (label == 0)
        score = (level[document] + rng.normal(size=480)).astype(np.float32)
        low, high = np.quantile(resample_auroc(score, document, label == 0, label == 1, weights), [0.025, 0.975])
        covered.append(low <= truth <= high)
    assert 0.88 <= np.mean(covered) <= 0.99
