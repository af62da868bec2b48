"""How well an SAE finds known features: the measures of SynthSAEBench, and absorption along a known hierarchy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saeforge.data.synthetic import SyntheticFiles, SyntheticSource, Truth
from saeforge.errors import ConfigError, DatasetError
from saeforge.metrics import ReconstructionMetrics
from saeforge.metrics.matching import assign
from saeforge.metrics.weights import unit_rows
from saeforge.ops import SparseCode
from saeforge.sae import SAE

#: What each number means. "Best" is the feature whose |cosine| with a latent's decoder row is largest.
CONVENTIONS = {
    "mcc": "mean |cosine| of the one-to-one assignment of latents to features that maximises it (Hungarian method)",
    "uniqueness": "distinct best features of all latents / latents",
    "precision, recall, f1, accuracy": "a latent fires (value != 0) against its best feature, mean over all latents; a "
    "ratio without denominator, so every one of a dead latent but accuracy, is 0",
    "f1_assigned": "f1 against the assigned feature instead, mean over the assigned latents",
    "l0, true_l0": "mean active latents, and features, of a row; latents as the saved SAE infers them",
    "explained_variance": "1 - sum |x - x_hat|^2 / sum |x - mean|^2",
    "shrinkage": "mean over rows of |x_hat| / |x|; 1 is none",
    "dead": "latents that fired on no row",
    "absorption": "of rows where a child fires, the share where its latent does and its parent's latent does not, "
    "mean over parent and child pairs that both have an assigned latent of |cosine| >= 0.5; None without such a pair",
    "parent_miss": "the control: of rows where a parent fires and none of its children does, the share where its "
    "latent does not, mean over the parents of these pairs",
}

#: A latent stands for its assigned feature, for absorption, from this |cosine| on.
TRACKS = 0.5


@dataclass(frozen=True)
class GroundTruth:
    """The result of `measure_ground_truth`; the definitions are in `CONVENTIONS`."""

    rows: int
    l0: float
    true_l0: float
    mcc: float
    uniqueness: float
    precision: float
    recall: float
    f1: float
    accuracy: float
    f1_assigned: float
    explained_variance: float
    shrinkage: float
    dead: int
    absorption: float | None
    parent_miss: float | None
    pairs: int


@dataclass(frozen=True)
class Matching:
    """Which feature each latent stands for.

    Attributes:
        best: (d_sae,) int64, the feature of largest |cosine|; ties go to the lowest.
        assigned: (d_sae,) int64, one-to-one; -1 for latents beyond the number of features.
        cosines: (d_sae,) |cosine| with the assigned feature; 0 where there is none.
    """

    best: Tensor
    assigned: Tensor
    cosines: Tensor

    @property
    def mcc(self) -> float:
        """Mean |cosine| of the assigned pairs ("mean correlation coefficient")."""
        return float(self.cosines[self.assigned >= 0].mean())

    @property
    def uniqueness(self) -> float:
        """Share of latents left when those with the same best feature count once."""
        return len(self.best.unique()) / len(self.best)


def match_latents(W_dec: Tensor, directions: Tensor) -> Matching:
    """Matches latents to features by the |cosine| of decoder rows (d_sae, d) with directions (features, d).

    Raises:
        ConfigError: widths that differ, or scipy is missing.
    """
    if W_dec.shape[1] != directions.shape[1]:
        raise ConfigError(f"the SAE is {W_dec.shape[1]} wide, the features {directions.shape[1]}; check the data")
    rows, true = (unit_rows(part.double().cpu()) for part in (W_dec, directions))
    cosines = (rows @ true.T).abs()
    latents, features = assign(cosines)
    assigned = torch.full((len(rows),), -1, dtype=torch.int64)
    assigned[latents] = features
    found = torch.zeros(len(rows), dtype=torch.float64)
    found[latents] = cosines[latents, features]
    return Matching(cosines.argmax(1), assigned, found)


class FiringCounts:
    """How often latents and features fire together, as integer counts; add rows with `update`.

    Args:
        truth: the features.
        matching: which latent stands for which.

    Attributes:
        rows: seen so far.
        latent: (d_sae,) rows on which each latent fires. feature: (features,) the same of features.
        both: (d_sae,) rows on which a latent and its best feature fire. both_assigned: its assigned one.
        pairs: (n, 2) int64, parent's latent and child's latent of the pairs that absorption is about.
    """

    def __init__(self, truth: Truth, matching: Matching) -> None:
        d_sae, features = len(matching.best), truth.config.features
        self.matching, self.rows = matching, 0
        self.latent, self.both, self.both_assigned = (torch.zeros(d_sae, dtype=torch.int64) for _ in range(3))
        self.feature = torch.zeros(features, dtype=torch.int64)
        tracks = (matching.assigned >= 0) & (matching.cosines >= TRACKS)
        latent_of = torch.full((features,), -1, dtype=torch.int64)
        latent_of[matching.assigned[tracks]] = tracks.nonzero()[:, 0]
        parents = torch.from_numpy(truth.parents)
        children = (parents >= 0).nonzero()[:, 0]
        children = children[(latent_of[children] >= 0) & (latent_of[parents[children]] >= 0)]
        self.children, self.parents = children, parents[children]
        self.pairs = torch.stack([latent_of[self.parents], latent_of[children]], dim=1)
        self.absorbed, self.missed, self.alone = (torch.zeros(len(children), dtype=torch.int64) for _ in range(3))
        family = torch.from_numpy(truth.children())
        self._family = family, parents[family]

    def update(self, code: SparseCode, fires: Tensor) -> None:
        """Adds rows: their code, and which features fire (rows, features) bool."""
        d_sae = len(self.latent)
        entries = int(code.offsets[-1])
        active = code.values[:entries] != 0
        row, latent = code.rows()[:entries][active].cpu(), code.indices[:entries][active].long().cpu()
        self.rows += len(fires)
        self.latent += torch.bincount(latent, minlength=d_sae)
        self.feature += fires.sum(0)
        self.both += torch.bincount(latent[fires[row, self.matching.best[latent]]], minlength=d_sae)
        assigned = self.matching.assigned[latent]
        hit = (assigned >= 0) & fires[row, assigned.clamp_min(0)]
        self.both_assigned += torch.bincount(latent[hit], minlength=d_sae)
        if len(self.pairs) == 0:
            return
        on = torch.zeros(len(fires), d_sae, dtype=torch.bool)
        on[row, latent] = True
        with_child = torch.zeros_like(fires)
        family, above = self._family
        entry_row, entry = fires[:, family].nonzero(as_tuple=True)
        with_child[entry_row, above[entry]] = True
        parent_off = ~on[:, self.pairs[:, 0]]
        self.absorbed += (fires[:, self.children] & on[:, self.pairs[:, 1]] & parent_off).sum(0)
        alone = fires[:, self.parents] & ~with_child[:, self.parents]
        self.alone += alone.sum(0)
        self.missed += (alone & parent_off).sum(0)

    def scores(self, both: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Precision, recall, F1 and accuracy of each latent as a detector.

        Args:
            both: (d_sae,) rows on which the latent and its feature fire.
            features: (d_sae,) the feature of each.
        """
        hits, fired, true = both.double(), self.latent.double(), self.feature[features].double()
        precision, recall = _ratio(hits, fired), _ratio(hits, true)
        return {
            "precision": precision,
            "recall": recall,
            "f1": _ratio(2 * precision * recall, precision + recall),
            "accuracy": (self.rows - fired - true + 2 * hits) / self.rows,
        }

    def absorption(self) -> tuple[float | None, float | None]:
        """Absorption and its control, see `CONVENTIONS`."""
        once = torch.from_numpy(np.unique(self.parents.numpy(), return_index=True)[1])
        return (
            _mean_share(self.absorbed, self.feature[self.children]),
            _mean_share(self.missed[once], self.alone[once]),
        )


def measure_ground_truth(
    sae: SAE,
    source: SyntheticSource | SyntheticFiles,
    *,
    max_rows: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> GroundTruth:
    """Judges an SAE on held-out synthetic rows, as it infers them after it was saved.

    Args:
        sae: on any device.
        source: the data; its held-out rows are read.
        max_rows: at most so many (whole blocks, at least one); None: all.
        on_progress: called with (blocks done, blocks in all).

    Raises:
        DatasetError: no held-out rows. ConfigError: an SAE of another width, or scipy is missing.
    """
    blocks, size = source.n_blocks("validation"), source.block_rows("validation")
    if blocks == 0:
        raise DatasetError("the synthetic data has no held-out rows to judge on; give it validation_rows")
    if max_rows is not None:
        blocks = min(blocks, max(1, max_rows // size))
    truth = source.truth
    matching = match_latents(sae.W_dec, truth.directions)
    counts = FiringCounts(truth, matching)
    pivot = torch.tensor(source.statistics[0].mean)
    metrics = ReconstructionMetrics(sae.d_out, sae.d_sae, pivot=pivot, device=sae.device)
    for block in range(blocks):
        x = source.read_block("validation", block)[0].float().to(sae.device)
        code = sae.encode(x)
        metrics.update(x, sae.decode(code), code)
        counts.update(code, source.activity("validation", block).fires(truth.config.features))
        if on_progress is not None:
            on_progress(block + 1, blocks)
    plain = metrics.compute()
    best = {name: float(score.mean()) for name, score in counts.scores(counts.both, matching.best).items()}
    assigned = counts.scores(counts.both_assigned, matching.assigned.clamp_min(0))["f1"][matching.assigned >= 0]
    absorption, parent_miss = counts.absorption()
    return GroundTruth(
        rows=plain.tokens,
        l0=plain.l0_mean,
        true_l0=float(counts.feature.sum()) / plain.tokens,
        mcc=matching.mcc,
        uniqueness=matching.uniqueness,
        **best,
        f1_assigned=float(assigned.mean()),
        explained_variance=1 - plain.fvu,
        shrinkage=plain.l2_ratio,
        dead=plain.dead,
        absorption=absorption,
        parent_miss=parent_miss,
        pairs=len(counts.pairs),
    )


def _mean_share(part: Tensor, whole: Tensor) -> float | None:
    """Mean of part / whole where there is a whole."""
    there = whole > 0
    return float((part[there].double() / whole[there]).mean()) if bool(there.any()) else None


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0 where there is nothing to divide by."""
    return torch.where(whole > 0, part / whole.clamp_min(1e-30), 0.0)
