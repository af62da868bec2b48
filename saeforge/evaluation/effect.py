"""What an SAE does to its model: loss, KL and top-1 agreement when its reconstruction takes the activations' place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from saeforge.evaluation.bootstrap import LEVEL, RESAMPLES, interval, resample
from saeforge.evaluation.held_out import HeldOutTexts
from saeforge.evaluation.passes import Replace, SplicedModel, compare

#: What each number means and how it was taken, kept beside the numbers.
EFFECT_CONVENTIONS = {
    "delta_ce": "ce_sae - ce_original, nats per token; the headline",
    "ce_original, ce_sae, ce_zero, ce_mean": "mean cross-entropy of the scored predictions, nats per token: the model "
    "alone; with the SAE's reconstruction, zeros, or the train split's mean activation in the place of the site's",
    "ce_score_zero, ce_score_mean": "(ce_ablated - ce_sae) / (ce_ablated - ce_original): 1 is no loss, 0 is ablation; "
    "null where ablation does not raise the loss",
    "kl_sae, kl_zero, kl_mean": "mean KL(original || spliced) over the vocabulary, nats per token, log-softmax in fp32",
    "top1_sae, top1_zero, top1_mean": "share of predictions whose likeliest token stays the same; ties go to the "
    "lowest token id",
    "tokens": "scored predictions: the predicting token and its next one are both kept tokens of one segment; the "
    "same ones in all passes. None from or of a special token, padding or a dropped first token, none across texts",
    "splice": "kept tokens only, all others keep the model's activations; the reconstruction alone, its error is not "
    "added back; computed in the SAE's dtype and cast to the model's",
    "contexts": "as harvested: the same segments in the same contexts, positions restart in packed ones; in stored "
    "order, which is a seeded shuffle, whole contexts until the budget is reached",
    "intervals": "percentile bootstrap over documents; null with fewer than 2 documents",
    "by_label": "the same sums over the documents of one label",
}

_PASSES = ("sae", "zero", "mean")
# Columns of the per-document sums: predictions, loss of the original, then loss, KL and agreement of each pass.
_COLUMNS = ("tokens", "ce_original", *(f"{what}_{name}" for name in _PASSES for what in ("ce", "kl", "top1")))
_LOGITS_BYTES = 1 << 26
_MOST_CONTEXTS = 32


@dataclass(frozen=True)
class EffectMetrics:
    """Metrics of some documents; `EFFECT_CONVENTIONS` defines them. Intervals are by metric name."""

    tokens: int
    documents: int
    delta_ce: float
    ce_original: float
    ce_sae: float
    ce_zero: float
    ce_mean: float
    ce_score_zero: float | None
    ce_score_mean: float | None
    kl_sae: float
    kl_zero: float
    kl_mean: float
    top1_sae: float
    top1_zero: float
    top1_mean: float
    intervals: dict[str, tuple[float, float] | None]


@dataclass(frozen=True)
class Effect:
    """The result of `measure_effect`.

    Attributes:
        overall: of all documents.
        by_label: of the documents of each label, most tokens first; empty without labels.
        settings: contexts, dtype and bootstrap, and what the caller adds, as plain JSON values.
    """

    overall: EffectMetrics
    by_label: dict[str, EffectMetrics]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "conventions": EFFECT_CONVENTIONS}


def measure_effect(
    model: SplicedModel,
    sae: Replace,
    mean: torch.Tensor,
    texts: HeldOutTexts,
    *,
    contexts_at_once: int | None = None,
    seed: int = 0,
    about: dict[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Effect:
    """Run the model as it is, with the SAE, with zeros and with the mean activation at its site.

    Args:
        model: the model and the site.
        sae: activations of kept rows (rows, d_in) -> reconstruction (rows, d_out).
        mean: (d_out,) mean activation of the train split.
        texts: what to run on.
        contexts_at_once: contexts of a batch; None: as many as keep a pass's logits below 64 MiB, at most 32. The
            result does not depend on it but for rounding.
        seed: of the bootstrap.
        about: plain JSON values to record among the settings.
        on_progress: called with (contexts done, contexts in all).

    Raises:
        ConfigError: a site that cannot be replaced.
    """
    replacements: dict[str, Replace] = {
        "sae": sae,
        "zero": lambda x: x.new_zeros(len(x), len(mean)),
        "mean": lambda x: mean.to(x.device).expand(len(x), -1),
    }
    sums: dict[int, np.ndarray] = {}
    done = 0
    for batch in texts.batches(contexts_at_once or contexts_that_fit(model, texts)):
        original = model.logits(batch, None)
        columns = [np.ones((len(batch.documents), 1))]
        for name in _PASSES:
            moved = compare(original, model.logits(batch, replacements[name]), batch.targets).numpy()
            columns.append(moved if name == _PASSES[0] else moved[:, 1:])
        table = np.concatenate(columns, axis=1)
        numbers, where = np.unique(batch.documents, return_inverse=True)
        totals = np.zeros((len(numbers), len(_COLUMNS)))
        np.add.at(totals, where, table)
        for number, row in zip(numbers.tolist(), totals, strict=True):
            sums[number] = sums.get(number, 0) + row
        done += batch.batch.input_ids.shape[0]
        if on_progress is not None:
            on_progress(done, texts.n_contexts)
    settings = {
        **(about or {}),
        "contexts": texts.n_contexts,
        "contexts_in_split": texts.n_all,
        "packed": texts.contexts.packed,
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "bootstrap": {"over": "documents", "resamples": RESAMPLES, "level": LEVEL, "seed": seed},
    }
    return summarise(sums, {number: texts.documents[number]["label"] for number in sums}, settings, seed=seed)


def summarise(
    sums: dict[int, np.ndarray], labels: dict[int, str | None], settings: dict[str, Any], *, seed: int
) -> Effect:
    """Turn per-document sums into metrics overall and by label."""
    numbers = sorted(sums)  # so that the bootstrap does not depend on the order of contexts
    table = np.stack([sums[number] for number in numbers])
    by_label: dict[str, np.ndarray] = {}
    for label in sorted({label for label in labels.values() if label is not None}):
        by_label[label] = table[[labels[number] == label for number in numbers]]
    order = sorted(by_label, key=lambda label: -by_label[label][:, 0].sum())
    return Effect(_metrics(table, seed), {label: _metrics(by_label[label], seed) for label in order}, settings)


def _metrics(table: np.ndarray, seed: int) -> EffectMetrics:
    """Metrics of documents, (documents, columns) sums, with their intervals."""
    values = {name: float(value[0]) for name, value in _ratios(table.sum(0, keepdims=True)).items()}
    intervals: dict[str, tuple[float, float] | None] = dict.fromkeys(values)
    if len(table) > 1:
        intervals = {name: interval(drawn) for name, drawn in _ratios(resample(table, seed=seed)).items()}
    known: dict[str, Any] = {name: value if np.isfinite(value) else None for name, value in values.items()}
    return EffectMetrics(tokens=int(table[:, 0].sum()), documents=len(table), **known, intervals=intervals)


def _ratios(totals: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of (n, columns) totals, each (n,); NaN where it is undefined."""
    means = dict(zip(_COLUMNS[1:], (totals[:, 1:] / totals[:, :1]).T, strict=True))
    scores = {}
    for name in ("zero", "mean"):
        harm = means[f"ce_{name}"] - means["ce_original"]
        share = (means[f"ce_{name}"] - means["ce_sae"]) / np.where(harm > 0, harm, 1)
        scores[f"ce_score_{name}"] = np.where(harm > 0, share, np.nan)
    return {"delta_ce": means["ce_sae"] - means["ce_original"], **means, **scores}


def contexts_that_fit(model: SplicedModel, texts: HeldOutTexts) -> int:
    """Return how many contexts keep the logits of a pass small."""
    weights = next(model.model.parameters())
    vocabulary = int(model.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    return max(1, min(_MOST_CONTEXTS, _LOGITS_BYTES // (vocabulary * texts.longest * weights.element_size())))
