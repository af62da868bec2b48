"""What bench_steering.py measures of continuations and of a steered model; nothing here knows of saeforge's edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from torch import Tensor, nn

PIECE = 100  # characters, about what a continuation of 40 tokens has
RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean over units that are independent (prompts, passages), resampled with replacement."""
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(data[drawn].mean(1), [0.025, 0.975])
    return Interval(float(data.mean()), float(low), float(high))


def pieces(texts: Sequence[str]) -> list[str]:
    """Texts cut into pieces about as long as a continuation."""
    return [text[at : at + PIECE] for text in texts for at in range(0, max(1, len(text) - PIECE // 2), PIECE)]


def train_classifier(texts: dict[str, list[str]]) -> Pipeline:
    """Names the label of a short text from its character 1- to 4-grams."""
    pairs = [(piece, label) for label, own in texts.items() for piece in pieces(own)]
    features = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True, min_df=2)
    model = make_pipeline(features, LogisticRegression(C=30, max_iter=500, class_weight="balanced"))
    return model.fit([piece for piece, _ in pairs], [label for _, label in pairs])


def accuracy(classifier: Pipeline, texts: dict[str, list[str]]) -> float:
    """Share of held-out pieces that are named right."""
    pairs = [(piece, label) for label, own in texts.items() for piece in pieces(own)]
    named = classifier.predict([piece for piece, _ in pairs])
    return float(np.mean(named == np.array([label for _, label in pairs])))


def distinct_2(groups: Sequence[Sequence[Sequence[int]]]) -> float:
    """Distinct pairs of neighbouring tokens over all pairs (Li et al. 2016), pooled within a group, mean over groups.

    A group is one prompt's continuations: pooled, it sees repetition inside one and sameness between seeds, and its
    size does not change with the number of prompts.
    """
    shares = []
    for group in groups:
        pairs = [pair for ids in group for pair in pairwise(ids)]
        shares.append(len(set(pairs)) / max(1, len(pairs)))
    return float(np.mean(shares))


@torch.no_grad()
def log_probabilities(model: nn.Module, sequences: Sequence[Sequence[int]], batch: int = 64) -> list[Tensor]:
    """Next-token log-probabilities of each sequence, (length - 1, vocabulary) in float32, padded on the right."""
    found: list[Tensor] = []
    for start in range(0, len(sequences), batch):
        part = sequences[start : start + batch]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(part):
            ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        for row, own in enumerate(part):
            found.append(F.log_softmax(logits[row, : len(own) - 1], dim=-1))
    return found


def negative_log_likelihood(model: nn.Module, sequences: Sequence[Sequence[int]], skip: Sequence[int]) -> list[float]:
    """Mean nats per token of each sequence after its first `skip` tokens, which are only read."""
    values = []
    for log_p, ids, first in zip(log_probabilities(model, sequences), sequences, skip, strict=True):
        own = log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        values.append(float(-own[first - 1 :].mean()))
    return values


def mean_kl(plain: Sequence[Tensor], steered: Sequence[Tensor]) -> float:
    """KL(plain || steered) in nats, mean over all tokens, of two results of `log_probabilities`."""
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(plain, steered, strict=True))
    return total / sum(len(p) for p in plain)


def match(
    measure: Callable[[float], float], target: float, start: float, *, tolerance: float = 0.03
) -> tuple[float, float]:
    """The strength at which a rising measure comes nearest to its target, by bisection of its logarithm.

    Returns:
        Strength and what the measure says there; further than the tolerance if nothing from 2^-10 to 2^10 times `start`
        comes nearer.
    """
    low, high = start / 2**10, start * 2**10
    middle = start
    best = (middle, measure(middle))
    for _ in range(30):
        value = measure(middle) if middle != best[0] else best[1]
        if abs(value - target) < abs(best[1] - target):
            best = (middle, value)
        if abs(value - target) <= tolerance * target:
            break
        low, high = (middle, high) if value < target else (low, middle)
        # Doubling and halving first, while the far end is only a limit.
        middle = min(max(float(np.sqrt(low * high)), middle / 2), middle * 2)
    return best
