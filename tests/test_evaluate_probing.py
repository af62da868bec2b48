"""k-sparse probing and targeted probe perturbation where the answer is known, and against a plain computation."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from saeforge.errors import ConfigError
from saeforge.evaluation.perturbation import perturb_probes
from saeforge.evaluation.pooled import Pool, Pooled
from saeforge.evaluation.probing import K, probe_latents
from saeforge.metrics.logistic import check_probe
from saeforge.ops import SparseCode
from saeforge.sae import SAE

LABELS = ("a", "b", "c")


def pool(
    x: Any,
    latents: Any,
    label: Sequence[int],
    train: Sequence[bool],
    *,
    labels: tuple[str, ...] = LABELS,
    copies: int = 1,
) -> Pooled:
    """Documents of one token each, every one of them so many times."""
    rows = [torch.as_tensor(part, dtype=torch.float32).repeat(copies, 1) for part in (x, latents)]
    found = Pool(rows[0].shape[1], None, rows[1].shape[1])
    found.add(np.arange(len(rows[0])), rows[0], rows[0], SparseCode.from_dense(rows[1]))
    return found.pooled(labels, np.tile(label, copies), np.tile(train, copies), {})


def both_sets(*rows: Any) -> tuple[list[Any], list[bool]]:
    """Each row in the set that is fitted on and in the one that is judged on."""
    return [*rows, *rows], [True] * len(rows) + [False] * len(rows)


def identity_sae(d: int) -> SAE:
    return SAE(torch.eye(d), torch.zeros(d), torch.eye(d), torch.zeros(d), rule="threshold", threshold=torch.zeros(d))


def random_pooled(seed: int = 0, *, documents: int = 90, d: int = 6, d_sae: int = 12) -> Pooled:
    rng = np.random.default_rng(seed)
    label = np.arange(documents) % 3
    x = rng.normal(size=(documents, d)) + 0.8 * rng.normal(size=(3, d))[label]
    latents = np.maximum(x @ rng.normal(size=(d, d_sae)), 0)
    return pool(x, latents, label.tolist(), (rng.random(documents) < 0.5).tolist())


def test_documents_are_means_over_all_their_tokens_silent_ones_too() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    latents = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [4.0, -4.0, 0.0]])
    found = Pool(2, None, 3)
    found.add(np.array([7, 7, 3]), x, x, SparseCode.from_dense(latents))
    pooled = found.pooled(("a",), np.zeros(8, np.int32), np.zeros(8, bool), {})
    assert pooled.tokens.tolist() == [1, 2]  # documents 3 and 7
    assert pooled.x.tolist() == [[5.0, 5.0], [2.0, 1.0]]
    assert pooled.columns([0, 1, 2]).tolist() == [[4.0, -4.0, 0.0], [0.0, 1.0, 0.0]]
    difference = pooled.latent_differences(np.array([True, False]), np.array([False, True]))
    assert difference.tolist() == [4.0, -5.0, 0.0]


def test_the_means_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator)
    latents = torch.randn(300, 9, generator=generator).relu()
    document = np.random.default_rng(0).integers(20, size=300)
    results = []
    for size, pending in ((300, 1 << 22), (7, 1 << 22), (7, 10)):
        monkeypatch.setattr("saeforge.evaluation.pooled._PENDING", pending)
        found = Pool(4, 4, 9)
        for start in range(0, 300, size):
            rows = slice(start, start + size)
            found.add(document[rows], x[rows], 2 * x[rows], SparseCode.from_dense(latents[rows]))
        results.append(found.pooled(("a",), np.zeros(20, np.int32), np.zeros(20, bool), {}))
    for other in results[1:]:
        for name in ("x", "target", "value"):
            np.testing.assert_allclose(getattr(other, name), getattr(results[0], name), rtol=1e-12, atol=1e-12)
        for name in ("row", "offsets", "tokens"):
            assert getattr(other, name).tolist() == getattr(results[0], name).tolist()
    expected = [latents[document == i].mean(0).tolist() for i in range(20)]
    np.testing.assert_allclose(results[0].columns(range(9)), expected, rtol=1e-5)


def test_a_latent_that_is_the_label_is_chosen_and_is_never_wrong() -> None:
    label, train = both_sets(0, 1, 2)
    latents = [[0, 0, 0, float(i == 0)] for i in label]
    found = probe_latents(pool([[0.0]] * 6, latents, label, train, copies=8), resamples=50).by_label["a"]
    assert found.chosen_latents[0] == 3
    for k in K:
        score = found.scores.latents[k]
        assert str(score.accuracy) == str(score.auroc) == "1.000 [1.000, 1.000]"


def test_what_knows_nothing_is_at_chance() -> None:
    label, train = both_sets(0, 1, 2)
    found = probe_latents(pool([[1.0, 2.0]] * 6, [[3.0]] * 6, label, train, copies=8), resamples=50).mean
    for score in (found.latents[1], found.residual_top[1], found.residual, found.difference_of_means):
        assert (score.accuracy.value, score.auroc.value) == (0.5, 0.5)


def test_a_label_that_takes_two_latents_is_half_known_by_one() -> None:
    """Label a is where both are active: one of them is right on all of a and on two thirds of the others."""
    kinds = [(1, 1), (1, 0), (0, 1), (0, 0)]
    latents, train = both_sets(*kinds)
    label, _ = both_sets(0, 1, 1, 1)
    found = probe_latents(
        pool([[0.0]] * 8, latents, label, train, labels=("a", "b"), copies=10), ks=(1, 2), resamples=50
    )
    scores = found.by_label["a"].scores.latents
    assert found.by_label["a"].chosen_latents == (0, 1)  # a tie goes to the lower one
    assert scores[1].accuracy.value == pytest.approx((1 + 2 / 3) / 2)
    assert scores[1].auroc.value == pytest.approx((2 / 3 + 1) / 2)
    assert scores[2].accuracy.value == scores[2].auroc.value == 1


def test_latents_are_chosen_on_the_documents_fitted_on_alone() -> None:
    label, train = both_sets(0, 1, 2)
    known = np.array([float(i == 0) for i in label])
    noise = np.where(train, [0.0, 0.5, 0.5, 0.0, 0.0, 0.0], known)  # of the label in the test documents only
    found = probe_latents(pool([[0.0]] * 6, np.stack([noise, known], 1), label, train, copies=8), resamples=50)
    assert found.by_label["a"].chosen_latents[0] == 1


def test_figures_are_those_of_scikit_learn() -> None:
    pooled = random_pooled()
    found = probe_latents(pooled, ks=(2,), resamples=200)
    for number, name in enumerate(LABELS):
        positive, train = pooled.label == number, pooled.train
        dense = pooled.columns(range(pooled.d_sae))
        difference = dense[positive & train].mean(0) - dense[~positive & train].mean(0)
        chosen = np.argsort(-np.abs(difference))[:2]
        assert found.by_label[name].chosen_latents == tuple(chosen)
        direction = pooled.x[positive & train].mean(0) - pooled.x[~positive & train].mean(0)
        scores = found.by_label[name].scores
        for x, score in (
            (dense[:, chosen], scores.latents[2]),
            (pooled.x, scores.residual),
            ((pooled.x @ direction)[:, None], scores.difference_of_means),
        ):
            x = (x - x[train].mean(0)) / x[train].std(0)
            model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000).fit(x[train], positive[train])
            accuracy = balanced_accuracy_score(positive[~train], model.predict(x[~train]))
            assert score.accuracy.value == pytest.approx(accuracy)
            auroc = roc_auc_score(positive[~train], model.decision_function(x[~train]))
            assert score.auroc.value == pytest.approx(auroc)
            assert score.accuracy.low <= score.accuracy.value <= score.accuracy.high
            assert score.accuracy.low < score.accuracy.high
    values = [probes.scores.residual.auroc.value for probes in found.by_label.values()]
    assert found.mean.residual.auroc.value == pytest.approx(np.mean(values))


def test_equal_seeds_draw_equal_intervals_and_others_do_not() -> None:
    pooled = random_pooled()
    first, again, other = (probe_latents(pooled, ks=(1,), seed=seed, resamples=50).mean for seed in (0, 0, 1))
    assert first == again
    assert first.residual.accuracy.value == other.residual.accuracy.value
    assert first.residual.accuracy.low != other.residual.accuracy.low


def test_a_label_with_few_documents_stands_among_the_others_only() -> None:
    label, train = both_sets(0, 1)
    pooled = pool([[float(i)] for i in label], [[float(i)] for i in label], label, train, copies=8)
    more = pool([[5.0]], [[5.0]], [2], [True])
    both = Pool(1, None, 1)
    for first, part in ((0, pooled), (len(pooled.label), more)):
        x = torch.from_numpy(part.x)
        both.add(np.arange(len(x)) + first, x, x, SparseCode.from_dense(torch.from_numpy(part.columns([0]))))
    label_of, train_of = (
        np.concatenate([getattr(part, name) for part in (pooled, more)]) for name in ("label", "train")
    )
    found = probe_latents(both.pooled(LABELS, label_of, train_of, {}), resamples=20)
    assert list(found.by_label) == ["a", "b"]
    assert found.settings["left_out"] == {"c": {"train": 1, "test": 0}}


def test_too_few_labels_are_an_error_that_says_what_to_give() -> None:
    label, train = both_sets(0, 1)
    with pytest.raises(ConfigError, match=r"0 of 2 labels have 8 documents to fit on .* give labelled texts"):
        probe_latents(pool([[0.0]] * 4, [[0.0]] * 4, label, train, labels=("a", "b")))


def test_a_missing_scikit_learn_is_one_line_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'saeforge\[probe\]'"):
        check_probe()


def test_a_latent_of_each_label_alone_breaks_that_labels_probe_alone() -> None:
    """One direction and one latent a label: without it, the probe is at chance and the others are what they were."""
    label, train = both_sets(0, 1, 2)
    x = np.eye(4)[label]  # the fourth latent has no part in it
    found = perturb_probes(identity_sae(4), pool(x, x, label, train, copies=10), ns=(1, 2, 500), resamples=50)
    assert list(found.mean) == [1, 2]
    for number, name in enumerate(LABELS):
        assert found.by_label[name].accuracy == 1
        assert found.by_label[name].latents == (number,)
    for at in found.mean.values():
        assert (at.score.value, at.intended.value, at.unintended.value, at.ablated) == (0.5, 0.5, 0, 1)


def test_a_latent_that_all_probes_hang_on_is_no_targeted_one() -> None:
    """One latent for two labels: ablating it breaks both probes alike. Of label b no latent is an effect."""
    label, train = both_sets(0, 1)
    x = [[1.0 - i] for i in label]
    found = perturb_probes(
        identity_sae(1), pool(x, x, label, train, labels=("a", "b"), copies=10), ns=(1,), resamples=50
    )
    a, b = (found.by_label[name].at[1] for name in "ab")
    assert (a.intended.value, a.unintended.value, a.score.value, a.ablated) == (0.5, 0.5, 0, 1)
    assert (b.intended.value, b.unintended.value, b.score.value, b.ablated) == (0, 0, 0, 0)


def test_ablation_of_means_is_ablation_in_every_token() -> None:
    """Against SAEBench's own way: encode, zero, decode, add the error, pool, ask the probes."""
    rng = np.random.default_rng(3)
    d, d_sae, tokens = 5, 12, 6
    label, train = np.arange(60) % 3, rng.random(60) < 0.5
    x = torch.from_numpy(rng.normal(size=(60, tokens, d)) + rng.normal(size=(3, 1, d))[label]).float()
    rows = torch.from_numpy(rng.normal(size=(d_sae, d))).float()
    sae = SAE(rows, torch.zeros(d_sae), rows / 3, torch.ones(d), rule="topk", k=4)
    flat = x.reshape(-1, d)
    found = Pool(d, None, d_sae)
    found.add(np.repeat(np.arange(60), tokens), flat, flat, sae.encode(flat))
    result = perturb_probes(sae, found.pooled(LABELS, label, train, {}), ns=(3,), resamples=20)

    code = sae.encode(flat).to_dense()
    error = flat - sae.decode(code)
    mean, latents = x.mean(1).double().numpy(), code.reshape(60, tokens, d_sae).mean(1).double().numpy()
    spread, center = mean[train].std(0), mean[train].mean(0)
    probes = [
        LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000).fit(
            (mean[train] - center) / spread, label[train] == i
        )
        for i in range(3)
    ]

    def accuracies(means: np.ndarray) -> list[float]:
        x_test = ((means - center) / spread)[~train]
        return [balanced_accuracy_score(label[~train] == i, p.predict(x_test)) for i, p in enumerate(probes)]

    clean = accuracies(mean)
    for i, name in enumerate(LABELS):
        own, other = train & (label == i), train & (label != i)
        toward = sae.W_dec.double().numpy() @ (probes[i].coef_[0] / spread)
        effect = np.maximum(latents[own].mean(0) - latents[other].mean(0), 0) * toward
        top = np.argsort(-effect)[:3]
        assert effect[top[0]] > 0
        top = top[effect[top] > 0]
        ablated = code.clone()
        ablated[:, torch.from_numpy(top)] = 0
        after = accuracies((sae.decode(ablated) + error).reshape(60, tokens, d).mean(1).double().numpy())
        drops = [before - now for before, now in zip(clean, after, strict=True)]
        at = result.by_label[name].at[3]
        assert result.by_label[name].latents == tuple(top)
        assert at.intended.value == pytest.approx(drops[i])
        assert at.unintended.value == pytest.approx((sum(drops) - drops[i]) / 2)
        assert at.score.low <= at.score.value <= at.score.high
