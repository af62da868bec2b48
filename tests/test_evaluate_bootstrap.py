"""Intervals over documents, and the comparison of predictions that they are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saeforge.evaluation.bootstrap import interval, resample
from saeforge.evaluation.effect import _COLUMNS, summarise
from saeforge.evaluation.passes import compare


def documents(n: int, seed: int) -> np.ndarray:
    """(n, 2): a metric's sum and the tokens of documents of very different length; the true ratio is 2."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 200, size=n)
    level = generator.normal(2.0, 1.0, size=n)  # tokens of a document share their level
    return np.stack([tokens * level, tokens], axis=1)


def ratio(totals: np.ndarray) -> np.ndarray:
    return np.asarray(totals[:, 0] / totals[:, 1])


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(300):
        bounds = interval(ratio(resample(documents(60, seed), seed=seed, resamples=400)))
        assert bounds is not None
        inside += bounds[0] <= 2.0 <= bounds[1]
    assert 0.90 <= inside / 300 <= 0.98


def test_resamples_are_the_same_for_the_same_seed_and_in_any_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = documents(37, 0)
    first = resample(sums, seed=3, resamples=50)
    assert np.array_equal(first, resample(sums, seed=3, resamples=50))
    assert not np.array_equal(first, resample(sums, seed=4, resamples=50))
    monkeypatch.setattr("saeforge.evaluation.bootstrap._DRAWS_AT_ONCE", 100)
    assert np.allclose(first, resample(sums, seed=3, resamples=50), rtol=1e-12)


def test_each_resample_draws_as_many_documents_as_there_are() -> None:
    assert (resample(np.ones((11, 1)), seed=0) == 11).all()
    counts = resample(np.eye(5), seed=0)
    assert (counts.sum(1) == 5).all()
    assert counts.mean(0) == pytest.approx(np.ones(5), abs=0.1)


def test_an_undefined_value_has_no_interval() -> None:
    assert interval(np.array([1.0, np.nan, 2.0])) is None
    assert interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))


def test_a_single_document_has_no_interval_and_harmless_ablation_no_score() -> None:
    row = np.arange(1.0, 1.0 + len(_COLUMNS))
    row[_COLUMNS.index("ce_zero")] = row[_COLUMNS.index("ce_original")]
    effect = summarise({7: row}, {7: None}, {}, seed=0)
    assert set(effect.overall.intervals.values()) == {None}
    assert effect.overall.ce_score_zero is None
    assert effect.overall.ce_score_mean is not None
    assert effect.by_label == {}


def test_metrics_are_ratios_of_sums() -> None:
    # Two documents of 10 and 30 predictions; losses 2, sae 2.5, zero 10, mean 4.5 per token overall.
    def document(tokens: int, **losses: float) -> np.ndarray:
        row = np.zeros(len(_COLUMNS))
        row[0] = tokens
        for name, value in losses.items():
            row[_COLUMNS.index(name)] = tokens * value
        return row

    sums = {
        4: document(10, ce_original=5, ce_sae=4, ce_zero=7, ce_mean=3, kl_sae=1, top1_sae=1.0),
        2: document(30, ce_original=1, ce_sae=2, ce_zero=11, ce_mean=5, kl_sae=3, top1_sae=0.5),
    }
    effect = summarise(sums, {4: "a", 2: "b"}, {}, seed=0)
    m = effect.overall
    assert (m.tokens, m.documents) == (40, 2)
    assert (m.ce_original, m.ce_sae, m.ce_zero, m.ce_mean) == (2, 2.5, 10, 4.5)
    assert (m.delta_ce, m.kl_sae, m.top1_sae) == (0.5, 2.5, 0.625)
    assert m.ce_score_zero == 7.5 / 8
    assert m.ce_score_mean == 2 / 2.5
    assert m.intervals["delta_ce"] == (-1, 1)
    assert list(effect.by_label) == ["b", "a"]
    assert effect.by_label["a"].delta_ce == -1
    assert effect.by_label["a"].ce_score_zero == 1.5
    assert effect.by_label["a"].ce_score_mean is None


def test_predictions_are_compared_as_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (5 * torch.randn(50, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    q[::3] = p[::3] + 0.01
    targets = torch.randint(30, (50,), generator=generator)
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    expected = torch.stack(
        [
            torch.nn.functional.cross_entropy(p, targets, reduction="none"),
            torch.nn.functional.cross_entropy(q, targets, reduction="none"),
            torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1),
            (p.argmax(1) == q.argmax(1)).double(),
        ],
        dim=1,
    )
    torch.testing.assert_close(compare(p, q, targets), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("saeforge.evaluation.passes._CHUNK_ELEMENTS", 90)
    torch.testing.assert_close(compare(p, q, targets), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    p = torch.tensor([[1e4, -1e4, 0.0], [3e38, -3e38, 0.0], [2.0, 1.0, -torch.inf]], dtype=dtype)
    q = torch.tensor([[1e4, 1e4 - 64, -1e4], [3e38, 0.0, 0.0], [1.0, 2.0, -torch.inf]], dtype=dtype)
    result = compare(p, q, torch.tensor([0, 0, 1]))
    assert torch.isfinite(result).all()
    # (e^2 (1) + e^1 (-1)) / (e^2 + e^1)
    assert result[2, 2].item() == pytest.approx((np.e - 1) / (np.e + 1), rel=1e-6)
    assert result[:2, 2].abs().max() < 1e-6
    assert result[:, 3].tolist() == [1, 1, 0]


def test_equal_logits_differ_in_nothing_to_the_bit() -> None:
    logits = torch.randn(20, 500).bfloat16()
    result = compare(logits, logits.clone(), torch.arange(20))
    assert torch.equal(result[:, 0], result[:, 1])
    assert (result[:, 2] == 0).all()
    assert (result[:, 3] == 1).all()
