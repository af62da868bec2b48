"""Targeted probe perturbation (TPP): does ablating a label's latents break that label's probe, and no other?

After Marks et al. 2024 (SHIFT, arXiv 2403.19647) and SAEBench (Karvonen et al. 2025, arXiv 2503.09532, "TPP"). For
label i with a linear probe p_i of accuracy A_i on the activations, latents are ranked by

    effect_f = max(0, mean of f over i's documents - mean over the others') * (w_i . d_f)

on the documents that the probe was fitted on. With A_j^(i) the accuracy of probe j once the n first are set to 0
in every token, the error term kept,

    score(n) = mean over i of [ (A_i - A_i^(i)) - mean over j != i of (A_j - A_j^(i)) ].

It is 1/2 where n latents of each label bring that label's probe to chance and leave all others as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from saeforge.evaluation.pooled import Pooled
from saeforge.evaluation.probing import PROBE_C, PROBING_CONVENTIONS, ProbeJudge, probe_settings
from saeforge.metrics.logistic import Probe, fit_probe
from saeforge.metrics.ranking import RESAMPLES, Estimate
from saeforge.sae import SAE

N = (2, 5, 10, 20, 50, 100, 500)

#: What each number means, kept beside the numbers.
TPP_CONVENTIONS = {
    **{name: PROBING_CONVENTIONS[name] for name in ("documents", "labels", "accuracy", "low, high")},
    "probe": f"{PROBING_CONVENTIONS['probe']}; on all dimensions of what the SAE reconstructs",
    "effect": "max(0, mean of the latent over the label's train documents - mean over the others') x (weights of the "
    "label's probe . decoder row)",
    "ablation": "the n latents with the greatest effect are 0 in all tokens, the error term is kept; latents without "
    "positive effect are never ablated, so that `ablated` may be below n (SAEBench goes on with latents of no effect)",
    "intended": "drop of the accuracy of the label's own probe",
    "unintended": "mean drop of the accuracies of the other labels' probes",
    "score": "intended - unintended (SAEBench: tpp_threshold_N_total_metric); at most 0.5 for probes that were right",
    "mean": "over labels",
}


@dataclass(frozen=True)
class Perturbed:
    """What ablating n latents does.

    Attributes:
        score: intended - unintended.
        intended: drop of the accuracy of the label's own probe.
        unintended: mean drop of the others'.
        ablated: latents ablated; their mean over labels.
    """

    score: Estimate
    intended: Estimate
    unintended: Estimate
    ablated: float


@dataclass(frozen=True)
class LabelPerturbation:
    """Of one label.

    Attributes:
        accuracy: of its probe before.
        latents: those with the greatest effect, greatest first, at most 50.
        at: by n.
    """

    accuracy: float
    latents: tuple[int, ...]
    at: dict[int, Perturbed]


@dataclass(frozen=True)
class Perturbation:
    """The result of `perturb_probes`.

    Attributes:
        mean: over labels, by n.
        by_label: of each label.
        settings: documents, tokens and bootstrap, as plain JSON values.
    """

    mean: dict[int, Perturbed]
    by_label: dict[str, LabelPerturbation]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "conventions": TPP_CONVENTIONS}


_LATENTS_SHOWN = 50


def perturb_probes(
    sae: SAE,
    pooled: Pooled,
    *,
    ns: Sequence[int] = N,
    seed: int = 0,
    resamples: int = RESAMPLES,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perturbation:
    """Fits each label's probe and ablates the latents of each label.

    Args:
        sae: whose latents.
        pooled: documents, with targets.
        ns: numbers of latents; those above d_sae are left out.
        seed: of the bootstrap.
        resamples: of it.
        on_progress: called with (labels done, labels in all).

    Raises:
        ConfigError: fewer than two labels have enough documents.
    """
    assert pooled.target is not None
    judged, judge = pooled.judged(), ProbeJudge(pooled, seed=seed, resamples=resamples)
    ns = [n for n in ns if n <= sae.d_sae]
    members = [pooled.label == number for number in judged]
    train, test = pooled.train, judge.test
    probes = [fit_probe(pooled.target[train], positive[train], c=PROBE_C) for positive in members]
    toward = _toward(sae, probes)  # (d_sae, labels): what a unit of each latent adds to each probe's score
    before = np.stack([probe.score(pooled.target[test]) for probe in probes], axis=1)
    clean = [judge.accuracies((before[:, [j]] > 0) == p[test, None], p[test]) for j, p in enumerate(members)]
    found, drawn = {}, []
    for i, number in enumerate(judged):
        positive = members[i]
        difference = pooled.latent_differences(positive & train, ~positive & train)
        effect = np.maximum(difference, 0) * toward[:, i]
        order = np.argsort(-effect, kind="stable")[: max(ns, default=0)]
        order = order[effect[order] > 0]
        columns = pooled.columns(order.tolist())[test]
        taken = [columns[:, :n] @ toward[order[:n]] for n in ns]  # each (test documents, labels)
        drops = []
        for j, p in enumerate(members):
            right = np.stack([(before[:, j] - taken_n[:, j] > 0) == p[test] for taken_n in taken], axis=1)
            after = judge.accuracies(right, p[test])
            drops.append((clean[j][0] - after[0], clean[j][1] - after[1]))
        value, resampled = (np.stack([drop[part] for drop in drops]) for part in (0, 1))  # (labels, [resamples,] ns)
        others = [j for j in range(len(judged)) if j != i]
        ablated = np.minimum(ns, len(order))
        moved = _Moved(value[i], value[others].mean(0), resampled[i], resampled[others].mean(0), ablated)
        drawn.append(moved)
        shown = tuple(order[:_LATENTS_SHOWN].tolist())
        found[pooled.labels[number]] = LabelPerturbation(float(clean[i][0][0]), shown, moved.perturbed(ns))
        if on_progress is not None:
            on_progress(i + 1, len(judged))
    mean = _Moved(*(np.mean([getattr(one, name) for one in drawn], 0) for name in _Moved.__dataclass_fields__))
    return Perturbation(mean.perturbed(ns), found, probe_settings(pooled, seed, resamples))


@dataclass(frozen=True)
class _Moved:
    """Drops of accuracy at each n, (ns,), and in each resample, (resamples, ns)."""

    intended: np.ndarray
    unintended: np.ndarray
    intended_drawn: np.ndarray
    unintended_drawn: np.ndarray
    ablated: np.ndarray

    def perturbed(self, ns: Sequence[int]) -> dict[int, Perturbed]:
        score, drawn = self.intended - self.unintended, self.intended_drawn - self.unintended_drawn
        return {
            n: Perturbed(
                Estimate.of(float(score[at]), drawn[:, at]),
                Estimate.of(float(self.intended[at]), self.intended_drawn[:, at]),
                Estimate.of(float(self.unintended[at]), self.unintended_drawn[:, at]),
                float(self.ablated[at]),
            )
            for at, n in enumerate(ns)
        }


def _toward(sae: SAE, probes: Sequence[Probe]) -> np.ndarray:
    """float64 (d_sae, probes): decoder rows times the probes' weights."""
    weights = torch.from_numpy(np.stack([probe.direction for probe in probes], axis=1))
    return (sae.W_dec.float() @ weights.float().to(sae.device)).double().cpu().numpy()
