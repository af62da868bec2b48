"""k-sparse probing: how well a few latents tell a label from the others, beside what the activations tell themselves.

After SAEBench (Karvonen et al. 2025, arXiv 2503.09532; Gurnee et al. 2023, arXiv 2305.01610): documents are means over
their tokens, the k latents with the greatest |difference of means| on the documents fitted on get a logistic
regression, and that is judged on other documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from saeforge.evaluation.pooled import MIN_DOCUMENTS, Pooled
from saeforge.metrics.logistic import Probe, fit_probe
from saeforge.metrics.ranking import COVERAGE, RESAMPLES, Entries, Estimate, Ordered, draw_weights, resample_auroc

K = (1, 2, 5)
PROBE_C = 1.0

#: What each number means, kept beside the numbers.
PROBING_CONVENTIONS = {
    "documents": "each is the mean over its kept tokens (special tokens and padding are none), of the activations and "
    "of every latent, silent tokens included; probes are fitted on `train` documents, all figures are of `test` ones",
    "labels": f"one label against all others; a label with fewer than {MIN_DOCUMENTS} documents in a set has no row "
    "and counts among the others only (`left_out`)",
    "probe": f"logistic regression, L2, C = {PROBE_C:g} on standardised columns, both classes weighted equally",
    "accuracy": "balanced: mean of the shares right among the label's documents and among the others'; 0.5 is chance "
    "(SAEBench draws as many others as the label has documents: this is what that draw expects)",
    "auroc": "of the probe's log-odds; ties count half",
    "latents": "the k with the greatest |mean over the label's documents - mean over the others'|, of train documents; "
    "ties go to the lowest latent",
    "residual_top": "the k dimensions of the activations chosen in the same way",
    "residual": "all dimensions of the activations",
    "difference_of_means": "one column: x . (mean of the label's documents - mean of the others')",
    "mean": "over labels",
    "low, high": "95% percentile bootstrap: test documents drawn again within each label, the same draws for all; "
    "probes and choices stay",
}


@dataclass(frozen=True)
class ProbeScore:
    """A probe on test documents."""

    accuracy: Estimate
    auroc: Estimate


@dataclass(frozen=True)
class ProbeScores:
    """The probes of a label, or their means over labels.

    Attributes:
        latents: of k latents, by k.
        residual_top: of k dimensions of the activations.
        residual: of all of them.
        difference_of_means: of one direction.
    """

    latents: dict[int, ProbeScore]
    residual_top: dict[int, ProbeScore]
    residual: ProbeScore
    difference_of_means: ProbeScore


@dataclass(frozen=True)
class LabelProbes:
    """What was found for one label.

    Attributes:
        chosen_latents: best first, as many as the greatest k.
        chosen_dimensions: likewise, of the activations.
        scores: of the probes.
    """

    chosen_latents: tuple[int, ...]
    chosen_dimensions: tuple[int, ...]
    scores: ProbeScores


@dataclass(frozen=True)
class Probing:
    """The result of `probe_latents`.

    Attributes:
        mean: over labels.
        by_label: of each label that has enough documents.
        settings: documents, tokens and bootstrap, as plain JSON values.
        unconverged: probes whose solver stopped before its tolerance, "label: probe".
    """

    mean: ProbeScores
    by_label: dict[str, LabelProbes]
    settings: dict[str, Any]
    unconverged: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "conventions": PROBING_CONVENTIONS}


def probe_latents(
    pooled: Pooled,
    *,
    ks: Sequence[int] = K,
    seed: int = 0,
    resamples: int = RESAMPLES,
    on_progress: Callable[[int, int], None] | None = None,
) -> Probing:
    """Fits and judges the probes of every label.

    Args:
        pooled: documents.
        ks: numbers of latents; those above d_sae, and of dimensions above d_in, mean all.
        seed: of the bootstrap.
        resamples: of it.
        on_progress: called with (labels done, labels in all).

    Raises:
        ConfigError: fewer than two labels have enough documents.
    """
    judge = ProbeJudge(pooled, seed=seed, resamples=resamples)
    judged = pooled.judged()
    found, unconverged, drawn = {}, [], []
    for done, number in enumerate(judged, start=1):
        name, positive = pooled.labels[number], pooled.label == number
        fitted, other = positive & pooled.train, ~positive & pooled.train
        direction = pooled.x[fitted].mean(0) - pooled.x[other].mean(0)
        latents = _greatest(pooled.latent_differences(fitted, other), max(ks))
        dimensions = _greatest(direction, max(ks))
        of_latents = pooled.columns(latents)
        columns = {
            **{("latents", k): of_latents[:, :k] for k in ks},
            **{("residual_top", k): pooled.x[:, dimensions[:k]] for k in ks},
            ("residual", 0): pooled.x,
            ("difference_of_means", 0): (pooled.x @ direction)[:, None],
        }
        scores = {}
        for key, x in columns.items():
            probe = fit_probe(x[pooled.train], positive[pooled.train], c=PROBE_C)
            if not probe.converged:
                unconverged.append(f"{name}: {key[0]}{f' {key[1]}' if key[1] else ''}")
            scores[key] = judge.judge(probe, x, positive)
        drawn.append(scores)
        found[name] = LabelProbes(tuple(latents), tuple(dimensions), _assemble({k: s.score for k, s in scores.items()}))
        if on_progress is not None:
            on_progress(done, len(judged))
    mean = {key: Drawn.mean([scores[key] for scores in drawn]).score for key in drawn[0]}
    return Probing(_assemble(mean), found, probe_settings(pooled, seed, resamples), tuple(unconverged))


def probe_settings(pooled: Pooled, seed: int, resamples: int) -> dict[str, Any]:
    """What the figures of `pooled` are of, as plain JSON values."""
    counts = pooled.counts()
    judged = {pooled.labels[number] for number in pooled.judged()}
    return {
        **pooled.about,
        "documents": {name: halves for name, halves in counts.items() if name in judged},
        "left_out": {name: halves for name, halves in counts.items() if name not in judged},
        "tokens": {
            half: int(pooled.tokens[mask].sum()) for half, mask in (("train", pooled.train), ("test", ~pooled.train))
        },
        "tokens_of_a_document": {"median": float(np.median(pooled.tokens)), "least": int(pooled.tokens.min())},
        "bootstrap": {"over": "documents", "resamples": resamples, "level": COVERAGE, "seed": seed},
    }


@dataclass(frozen=True)
class Drawn:
    """A probe's figures and what they are in each resample, (resamples,)."""

    accuracy: float
    auroc: float
    accuracies: np.ndarray
    aurocs: np.ndarray

    @property
    def score(self) -> ProbeScore:
        """With their intervals."""
        return ProbeScore(Estimate.of(self.accuracy, self.accuracies), Estimate.of(self.auroc, self.aurocs))

    @staticmethod
    def mean(several: Sequence[Drawn]) -> Drawn:
        """Mean figures, in each resample too."""
        accuracy, auroc = (float(np.mean([getattr(one, name) for one in several])) for name in ("accuracy", "auroc"))
        accuracies, aurocs = (np.mean([getattr(one, name) for one in several], 0) for name in ("accuracies", "aurocs"))
        return Drawn(accuracy, auroc, accuracies, aurocs)


class ProbeJudge:
    """Judges probes on test documents, all with the same resamples of them, drawn within each label."""

    def __init__(self, pooled: Pooled, *, seed: int, resamples: int = RESAMPLES) -> None:
        self.test = ~pooled.train
        self._weights = draw_weights(pooled.label[self.test], resamples, seed)

    def judge(self, probe: Probe, x: np.ndarray, positive: np.ndarray) -> Drawn:
        """Figures of a probe.

        Args:
            probe: fitted.
            x: float (documents, columns), of all documents.
            positive: bool (documents,).
        """
        score, p = probe.score(x[self.test]).astype(np.float32), positive[self.test]
        right = (score > 0) == p
        every = np.ones((1, len(p)), np.int32)
        return Drawn(
            float(self._balanced(right, p, every)[0]),
            float(Ordered(Entries.of_score(score)).rank(p, ~p).auroc[0]),
            self._balanced(right, p, self._weights),
            resample_auroc(score, np.arange(len(p)), p, ~p, self._weights),
        )

    def accuracies(self, right: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Balanced accuracy of several predictions, and in each resample.

        Args:
            right: bool (test documents, predictions). positive: bool (test documents,).

        Returns:
            float64 (predictions,) and (resamples, predictions).
        """
        every = np.ones((1, len(positive)), np.int32)
        return self._balanced(right, positive, every)[0], self._balanced(right, positive, self._weights)

    def _balanced(self, right: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(resamples, ...): mean of the shares right of both classes, with documents counted by weights."""
        shares = []
        for members in (positive, ~positive):
            w = weights[:, members].astype(np.float64)
            shares.append((w @ right[members].astype(np.float64)).T / w.sum(1))
        return np.asarray((shares[0].T + shares[1].T) / 2)


def _greatest(difference: np.ndarray, k: int) -> list[int]:
    """The k places with the greatest absolute value, ties to the lowest."""
    return [int(place) for place in np.argsort(-np.abs(difference), kind="stable")[:k]]


def _assemble(scores: dict[tuple[str, int], ProbeScore]) -> ProbeScores:
    return ProbeScores(
        latents={k: score for (name, k), score in scores.items() if name == "latents"},
        residual_top={k: score for (name, k), score in scores.items() if name == "residual_top"},
        residual=scores["residual", 0],
        difference_of_means=scores["difference_of_means", 0],
    )
