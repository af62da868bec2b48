"""Choosing and judging latents, without a model: train chooses, test judges; the parts of the baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from saeforge.features.concepts.baselines import PROBE_C, LabelMeans, random_latents
from saeforge.features.concepts.columns import LatentColumns
from saeforge.features.concepts.measure import Latents, Protocol, TokenSample
from saeforge.features.concepts.score import Judge
from saeforge.lm.labelled import Comparison, LabelledTexts, make_comparisons
from saeforge.metrics.logistic import fit_probe
from saeforge.ops import SparseCode


def make_texts(n_labels: int, per_label: int) -> LabelledTexts:
    """Labels only: half of the documents of each are train."""
    label = np.repeat(np.arange(n_labels, dtype=np.int32), per_label)
    return LabelledTexts(
        texts=tuple(f"text {i}" for i in range(label.size)),
        names=tuple(f"{i}" for i in range(label.size)),
        labels=tuple(f"l{i}" for i in range(n_labels)),
        label=label,
        train=np.arange(label.size) % 2 == 0,
        source="documents",
        split_by="documents",
        duplicates=0,
    )


def make_protocol(texts: LabelledTexts, **changes: Any) -> Protocol:
    settings = {"choose_by": "token", "resamples": 50, "seed": 0, **changes}
    return Protocol(texts, make_comparisons(texts.labels), **settings)


def make_latents(texts: LabelledTexts, document: np.ndarray, n: int, seed: int = 0) -> torch.Tensor:
    """Sparse latents (tokens, n) that prefer some documents, whatever their label: what a shuffle must not reward."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(len(texts.texts), n, generator=generator)
    return (level[document] + torch.randn(len(document), n, generator=generator) - 1.5).relu()


def test_with_shuffled_labels_the_winners_are_chance_held_out() -> None:
    texts = make_texts(16, 40)
    document = np.repeat(np.arange(640), 10)
    columns = LatentColumns(800)
    columns.add(SparseCode.from_dense(make_latents(texts, document, 800)))
    train, test = [], []
    for seed in range(3):
        shuffled = texts.shuffle(seed)
        protocol = make_protocol(shuffled)
        tops = Latents.of(columns, document, protocol).top(Judge(shuffled, document, resamples=20), protocol, 1)
        train += [top[0].score.train_token_auroc for top in tops]
        test += [top[0].score.token_auroc.value for top in tops]
    assert np.mean(train) > 0.57  # the winner's curse: 800 latents, the best of them by luck
    assert abs(np.mean(test) - 0.5) < 0.02


def test_a_latent_that_is_perfect_on_train_only_does_not_look_good() -> None:
    texts = make_texts(2, 40)
    document = np.repeat(np.arange(80), 10)
    overfitted = (texts.train & (texts.label == 0))[document]
    honest = (texts.label == 0)[document] & (np.random.default_rng(0).random(800) < 0.6)
    columns = LatentColumns(2)
    columns.add(SparseCode.from_dense(torch.tensor(np.stack([overfitted, honest], axis=1), dtype=torch.float32)))
    protocol = make_protocol(texts)
    found = Latents.of(columns, document, protocol)
    first, second = found.top(Judge(texts, document, resamples=100), protocol, 2)[0]
    assert (first.latent, second.latent) == (0, 1)
    assert first.score.train_token_auroc == first.score.train_document_auroc == 1.0
    assert first.score.token_auroc.value == first.score.document_auroc.value == 0.5
    assert (first.score.token_auroc.low, first.score.token_auroc.high) == (0.5, 0.5)
    assert first.score.token_f1 == first.score.document_f1 == 0.0
    assert first.density == pytest.approx(0.5)
    assert second.score.token_auroc.value > 0.7


def test_the_threshold_comes_from_train() -> None:
    texts = make_texts(2, 20)
    document = np.arange(40)
    positive = texts.label == 0
    # On train 3 tells them apart; on test positives are at 2 and negatives at 1, where 2 would.
    score = np.where(texts.train, np.where(positive, 3, 1), np.where(positive, 2, 1)).astype(np.float32)
    judged = Judge(texts, document, resamples=20).judge(score, Comparison(0, (1,)))
    assert judged.token_threshold == 3
    assert judged.token_auroc.value == judged.token_average_precision == 1
    assert judged.token_f1 == 0


def test_max_and_mean_pooling_differ_as_they_should() -> None:
    texts = make_texts(2, 20)
    tokens = np.where(texts.label == 0, 2, 10)
    document = np.repeat(np.arange(40), tokens)
    # Positive documents: 1 everywhere. Negative ones: one token with 5, the rest silent: mean 0.5, maximum 5.
    first = np.diff(document, prepend=-1) == 1
    score = np.where(texts.label[document] == 0, 1.0, np.where(first, 5.0, 0.0)).astype(np.float32)
    judged = Judge(texts, document, resamples=20).judge(score, Comparison(0, (1,)))
    assert judged.document_auroc.value == 1
    assert judged.document_auroc_max == 0


def test_all_latents_are_ranked_as_dense_data_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeforge.features.concepts.columns.BLOCK_ENTRIES", 100)
    texts = make_texts(3, 16)
    rng = np.random.default_rng(0)
    document = rng.permutation(np.repeat(np.arange(48), rng.integers(3, 9, size=48))).astype(np.int32)
    dense = make_latents(texts, document, 30)
    dense[:, 4] = 0
    columns = LatentColumns(30)
    for start in range(0, len(document), 37):
        columns.add(SparseCode.from_dense(dense[start : start + 37]))
    assert sum(1 for _ in columns.blocks(100)) > 3
    protocol = make_protocol(texts)
    found = Latents.of(columns, document, protocol)
    on_train = texts.train[document]
    np.testing.assert_allclose(found.density, (dense != 0).numpy()[on_train].mean(0))
    means = np.stack([dense.numpy()[document == i].mean(0) for i in range(48)])
    for i, comparison in enumerate(protocol.comparisons):
        positive = texts.label == comparison.label
        for latent in range(30):
            token = roc_auc_score(positive[document][on_train], dense.numpy()[on_train, latent])
            pooled = roc_auc_score(positive[texts.train], means[texts.train, latent])
            assert found.ranking.token_auroc[i, latent] == pytest.approx(token, abs=1e-9)
            assert found.ranking.document_auroc[i, latent] == pytest.approx(pooled, abs=1e-9)
    np.testing.assert_array_equal(columns.score(7), dense[:, 7].numpy())


def test_random_latents_fire_exactly_as_often_as_they_should() -> None:
    x = torch.randn(500, 16) * 3 + 5
    density = np.array([0, 0.002, 0.1, 0.5, 0.9, 1.0])
    random_sae = random_latents(x, density, seed=1)
    np.testing.assert_allclose(random_sae.encode(x).active_counts().numpy(), density * 500, atol=1)
    assert random_sae.encode(x).active_counts()[0] == 0
    torch.testing.assert_close(random_sae.W_enc.norm(dim=1), torch.ones(6))
    assert torch.equal(random_sae.W_enc, random_latents(x, density, seed=1).W_enc)
    assert not torch.equal(random_sae.W_enc, random_latents(x, density, seed=2).W_enc)


def test_means_of_labels_are_exact_in_any_batches() -> None:
    x, label = torch.randn(100, 8) + 100, np.random.default_rng(0).integers(0, 3, size=100)
    means = LabelMeans(3, 8)
    for start in range(0, 100, 33):
        means.add(x[start : start + 33], label[start : start + 33])
    values = x.double().numpy()
    expected = values[label == 1].mean(0) - values[label != 1].mean(0)
    np.testing.assert_allclose(means.direction(Comparison(1, (0, 2))), expected, atol=1e-9)


def test_the_sample_is_of_train_tokens_with_their_labels() -> None:
    x = torch.arange(200, dtype=torch.float32)[:, None].repeat(1, 3)
    sample = TokenSample(200, 3, seed=0, most=50)
    for start in range(0, 200, 30):
        sample.add(x[start : start + 30], np.arange(start, min(start + 30, 200)))
    assert len(sample) == 50
    np.testing.assert_array_equal(sample.x[:, 0].numpy(), sample.label)
    assert len(set(sample.label.tolist())) == 50
    assert len(TokenSample(30, 3, seed=0, most=50)) == 30


def test_the_probe_ranks_raw_activations_as_scikit_learn_ranks_standardised_ones() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 6)) * [1, 10, 0.1, 1, 1, 0] + 7).astype(np.float32)
    positive = x[:, 1] + rng.normal(size=400) * 5 > 10
    found = fit_probe(x, positive, c=PROBE_C)
    assert found.converged
    spread = np.where(x.std(0) == 0, 1, x.std(0))
    scaled = (x - x.mean(0)) / spread
    expected = LogisticRegression(C=0.01, class_weight="balanced", max_iter=300).fit(scaled, positive)
    np.testing.assert_allclose(
        x @ found.direction - (x @ found.direction).mean(),
        expected.decision_function(scaled) - expected.decision_function(scaled).mean(),
        atol=1e-4,
    )
