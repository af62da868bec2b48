"""One score judged on held-out documents: figures by token and by document, with intervals over documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from saeforge.lm.labelled import Comparison, LabelledTexts
from saeforge.metrics.ranking import RESAMPLES, Entries, Estimate, Ordered, Ranking, draw_weights, f1_at, resample_auroc


@dataclass(frozen=True)
class Score:
    """How well one score tells a label from others on the test documents; thresholds come from the train documents.

    Attributes:
        token_auroc: the label's tokens against the others' tokens.
        document_auroc: documents by the mean over their tokens; the main figure for documents.
        document_auroc_max: documents by the maximum over their tokens, which grows with their length.
        token_average_precision: of tokens.
        token_f1: of tokens, at token_threshold.
        token_threshold: best on train; None if the score is zero on all train documents.
        document_average_precision: of documents by their mean.
        document_f1: of documents by their mean, at document_threshold.
        document_threshold: best on train.
        train_token_auroc: on the train documents, where the choice was made.
        train_document_auroc: likewise.
        active_on_label: share of the label's test tokens on which the score is not 0. A score that is silent on the
            rest reaches a token AUROC of (1 + active_on_label) / 2 at most, if it is at least 0.
        active_on_others: share of the others' test tokens on which it is not 0.
    """

    token_auroc: Estimate
    document_auroc: Estimate
    document_auroc_max: float
    token_average_precision: float
    token_f1: float
    token_threshold: float | None
    document_average_precision: float
    document_f1: float
    document_threshold: float | None
    train_token_auroc: float
    train_document_auroc: float
    active_on_label: float
    active_on_others: float


class Judge:
    """Judges scores over the tokens of labelled documents; all scores of one judge meet the same resamples."""

    def __init__(
        self, texts: LabelledTexts, document: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        """Draw the resamples.

        Args:
            texts: labels and halves of the documents.
            document: int (tokens,), the document of each token; every document has one at least.
            resamples: of the test documents, drawn within each label.
            seed: of the draws.
        """
        self.texts, self.document = texts, document
        self.tokens = np.bincount(document, minlength=len(texts.texts))
        self.weights = draw_weights(np.where(texts.train, -1, texts.label), resamples, seed)
        self._order = np.argsort(document, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(self.tokens)[:-1]])

    def judge(self, score: np.ndarray, comparison: Comparison) -> Score:
        """Judge one score.

        Args:
            score: float32 (tokens,).
            comparison: which label against which.
        """
        mean = (np.bincount(self.document, score, minlength=len(self.tokens)) / self.tokens).astype(np.float32)
        greatest = np.maximum.reduceat(score[self._order], self._starts)
        tokens = self._figures(score, self.document, comparison)
        documents = self._figures(mean, np.arange(len(self.tokens)), comparison)
        positive, negative = comparison.members(self.texts.label)
        test = ~self.texts.train
        by_max = Ordered(Entries.of_score(greatest)).rank(positive & test, negative & test)
        return Score(
            token_auroc=tokens.auroc,
            document_auroc=documents.auroc,
            document_auroc_max=float(by_max.auroc[0]),
            token_average_precision=tokens.average_precision,
            token_f1=tokens.f1,
            token_threshold=tokens.threshold,
            document_average_precision=documents.average_precision,
            document_f1=documents.f1,
            document_threshold=documents.threshold,
            train_token_auroc=tokens.train_auroc,
            train_document_auroc=documents.train_auroc,
            active_on_label=float((score[(positive & test)[self.document]] != 0).mean()),
            active_on_others=float((score[(negative & test)[self.document]] != 0).mean()),
        )

    def _figures(self, score: np.ndarray, unit: np.ndarray, comparison: Comparison) -> _Figures:
        """Figures of a score (rows,), each row of a document; no test row has a say in the threshold."""
        positive, negative = comparison.members(self.texts.label)
        train = self.texts.train

        def rank(half: np.ndarray) -> Ranking:
            rows = half[unit]
            return Ordered(Entries.of_score(score[rows])).rank(positive[unit[rows]], negative[unit[rows]])

        before, held_out = rank(train), rank(~train)
        threshold = float(before.threshold[0])
        p, n = (members & ~train for members in (positive, negative))
        resampled = resample_auroc(score, unit, p, n, self.weights)
        return _Figures(
            Estimate.of(float(held_out.auroc[0]), resampled),
            float(held_out.average_precision[0]),
            f1_at(score, p[unit], n[unit], threshold),
            threshold if math.isfinite(threshold) else None,
            float(before.auroc[0]),
        )


@dataclass(frozen=True)
class _Figures:
    auroc: Estimate
    average_precision: float
    f1: float
    threshold: float | None
    train_auroc: float


def average_scores(scores: Sequence[Score]) -> Score:
    """Summarise the scores of several random draws: mean figures; intervals from the least low to the greatest high.

    Thresholds of different draws have nothing in common and are left out.
    """
    values: dict[str, Estimate | float | None] = {}
    for field in fields(Score):
        column = [getattr(score, field.name) for score in scores]
        if isinstance(column[0], Estimate):
            values[field.name] = Estimate(
                float(np.mean([estimate.value for estimate in column])),
                min(estimate.low for estimate in column),
                max(estimate.high for estimate in column),
            )
        else:
            values[field.name] = None if field.name.endswith("threshold") else float(np.mean(column))
    return Score(**values)  # type: ignore[arg-type]
