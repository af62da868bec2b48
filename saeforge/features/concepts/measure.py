"""The work behind the concept table: passes over the texts, the choice on train documents, the judging of the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from saeforge.features.concepts.baselines import PROBE_C, LabelMeans, random_latents
from saeforge.features.concepts.columns import LatentColumns, TrainRanking, rank_latents
from saeforge.features.concepts.score import Judge, Score
from saeforge.lm.labelled import Comparison, LabelledTexts
from saeforge.lm.labelled_rows import Progress, Reader
from saeforge.metrics.logistic import Probe, fit_probe
from saeforge.sae import SAE

SAMPLE_TOKENS = 65_536


@dataclass(frozen=True)
class Protocol:
    """What all scores of a table share.

    Attributes:
        texts: labelled documents in two halves.
        comparisons: rows of the table.
        choose_by: the AUROC on train documents by which latents are chosen.
        resamples: of the bootstrap.
        seed: of sample, random latents and resamples.
        on_progress: called with (what, contexts done, contexts in all).
    """

    texts: LabelledTexts
    comparisons: list[Comparison]
    choose_by: Literal["token", "document"]
    resamples: int
    seed: int
    on_progress: Progress | None = None


@dataclass(frozen=True)
class TopLatent:
    """A latent among the best of a label on the train documents.

    Attributes:
        latent: its number.
        density: share of the train tokens on which it is active.
        score: its figures.
    """

    latent: int
    density: float
    score: Score


class TokenSample:
    """Activations of train tokens drawn beforehand, at most `most` of them: all, where there are no more."""

    def __init__(self, n_train: int, d_in: int, *, seed: int, most: int = SAMPLE_TOKENS) -> None:
        rng = np.random.default_rng(seed)
        self._wanted = np.sort(rng.choice(n_train, size=min(most, n_train), replace=False))
        self.x = torch.empty(len(self._wanted), d_in)
        self.label = np.empty(len(self._wanted), np.int32)
        self._seen = self._filled = 0

    def __len__(self) -> int:
        return len(self._wanted)

    def add(self, x: Tensor, label: np.ndarray) -> None:
        """Offer the next train tokens (rows, d_in) with their labels (rows,)."""
        stop = int(np.searchsorted(self._wanted, self._seen + len(label)))
        rows = self._wanted[self._filled : stop] - self._seen
        self.x[self._filled : stop] = x[torch.from_numpy(rows).to(x.device)].cpu()
        self.label[self._filled : stop] = label[rows]
        self._seen, self._filled = self._seen + len(label), stop


@dataclass(frozen=True)
class Latents:
    """An SAE's latents over all tokens, ranked on the train documents.

    Attributes:
        columns: their non-zeros.
        ranking: of every latent for every comparison.
        density: float64 (d_sae,), share of the train tokens on which each is active.
    """

    columns: LatentColumns
    ranking: TrainRanking
    density: np.ndarray

    @classmethod
    def of(cls, columns: LatentColumns, document: np.ndarray, protocol: Protocol) -> Latents:
        """Rank what was gathered."""
        train = protocol.texts.train[document]
        ranking = rank_latents(columns, document, protocol.texts, protocol.comparisons)
        return cls(columns, ranking, columns.counts(train) / np.count_nonzero(train))

    def top(self, judge: Judge, protocol: Protocol, n: int) -> list[tuple[TopLatent, ...]]:
        """The n best latents of each comparison on the train documents, judged on the test documents.

        Ties go to the lowest latent.
        """
        auroc = self.ranking.token_auroc if protocol.choose_by == "token" else self.ranking.document_auroc
        rows = []
        for comparison, values in zip(protocol.comparisons, auroc, strict=True):
            best = np.argsort(-values, kind="stable")[:n].tolist()
            scores = [judge.judge(self.columns.score(latent), comparison) for latent in best]
            rows.append(
                tuple(TopLatent(i, float(self.density[i]), score) for i, score in zip(best, scores, strict=True))
            )
        return rows


@torch.no_grad()
def read_latents(
    sae: SAE, reader: Reader, protocol: Protocol, what: str, *, means: LabelMeans, sample: TokenSample
) -> Latents:
    """Read all tokens once: the latents' non-zeros, exact means of each label, a sample of train tokens.

    Args:
        sae: on the reader's device.
        reader: of the texts.
        protocol: of the table.
        what: told to `on_progress`.
        means: gets the train tokens.
        sample: likewise.
    """
    columns = LatentColumns(sae.d_sae)
    texts = protocol.texts
    for x, document in reader.batches(what, protocol.on_progress):
        columns.add(sae.encode(x))
        rows = np.flatnonzero(texts.train[document])
        chosen = x[torch.from_numpy(rows).to(x.device)]
        means.add(chosen, texts.label[document[rows]])
        sample.add(chosen, texts.label[document[rows]])
    return Latents.of(columns, reader.document, protocol)


@dataclass(frozen=True)
class Baselines:
    """What stands beside the latents, for each comparison.

    Attributes:
        random: best random latents, one score per draw.
        difference_of_means: the direction between the means.
        probe: logistic probe; empty if left out.
        unconverged: labels whose probe's solver stopped before its tolerance.
    """

    random: list[list[Score]]
    difference_of_means: list[Score]
    probe: list[Score] = field(default_factory=list)
    unconverged: list[str] = field(default_factory=list)


@torch.no_grad()
def judge_baselines(
    reader: Reader,
    judge: Judge,
    protocol: Protocol,
    density: np.ndarray,
    *,
    means: LabelMeans,
    sample: TokenSample,
    random_draws: int,
    probe: bool,
) -> Baselines:
    """Fit the baselines on train tokens, then read all tokens once more for their scores.

    Args:
        reader: of the texts, read once already.
        judge: of the same tokens.
        protocol: of the table.
        density: of the SAE's latents, which the random ones copy.
        means: of each label's train tokens.
        sample: of train tokens, for random thresholds and probes.
        random_draws: how many sets of random latents.
        probe: fit the logistic probe.
    """
    comparisons, texts = protocol.comparisons, protocol.texts
    probes = [_probe(sample, comparison) for comparison in comparisons] if probe else []
    directions = [means.direction(comparison) for comparison in comparisons] + [found.direction for found in probes]
    linear = torch.from_numpy(np.stack(directions, axis=1)).float().to(reader.device)  # (d_in, scores)
    # A constant changes no figure but F1's threshold; without the mean, the products would lose digits.
    center = sample.x.mean(0).to(reader.device)
    draws = [random_latents(sample.x, density, protocol.seed + 1 + draw) for draw in range(random_draws)]
    draws = [random.to(reader.device) for random in draws]
    columns = [LatentColumns(len(density)) for _ in draws]
    parts = []
    for x, _ in reader.batches("baselines", protocol.on_progress):
        parts.append(((x - center) @ linear).cpu().numpy())
        for random, column in zip(draws, columns, strict=True):
            column.add(random.encode(x))
    scores = np.concatenate(parts).T
    judged = [
        judge.judge(np.ascontiguousarray(score), comparisons[i % len(comparisons)]) for i, score in enumerate(scores)
    ]
    best = [Latents.of(column, reader.document, protocol).top(judge, protocol, 1) for column in columns]
    return Baselines(
        random=[[draw[i][0].score for draw in best] for i in range(len(comparisons))],
        difference_of_means=judged[: len(comparisons)],
        probe=judged[len(comparisons) :],
        unconverged=[
            texts.labels[comparison.label]
            for comparison, found in zip(comparisons, probes, strict=bool(probes))
            if not found.converged
        ],
    )


def _probe(sample: TokenSample, comparison: Comparison) -> Probe:
    positive, negative = comparison.members(sample.label)
    used = positive | negative
    return fit_probe(sample.x.numpy()[used], positive[used], c=PROBE_C)
