"""What a latent has to beat: random latents that fire as often, a difference of means, a logistic probe."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saeforge.lm.labelled import Comparison
from saeforge.sae import SAE

PROBE_C = 0.01


class LabelMeans:
    """Exact mean activation of each label's tokens, in float64, batch by batch."""

    def __init__(self, n_labels: int, d_in: int) -> None:
        self.sums, self.counts = np.zeros((n_labels, d_in)), np.zeros(n_labels)

    def add(self, x: Tensor, label: np.ndarray) -> None:
        """Add rows (rows, d_in) with the label of each; a negative label is left out."""
        rows = x.double().cpu().numpy()
        for i in np.unique(label[label >= 0]):
            self.sums[i] += rows[label == i].sum(0)
            self.counts[i] += np.count_nonzero(label == i)

    def mean(self, labels: tuple[int, ...]) -> np.ndarray:
        """Mean (d_in,) over all tokens of these labels."""
        chosen = list(labels)
        return np.asarray(self.sums[chosen].sum(0) / self.counts[chosen].sum())

    def direction(self, comparison: Comparison) -> np.ndarray:
        """Mean of the label's tokens minus mean of the others' tokens (d_in,)."""
        return np.asarray(self.mean((comparison.label,)) - self.mean(comparison.against))


def random_latents(x: Tensor, density: np.ndarray, seed: int) -> SAE:
    """Random latents that fire as often as those of an SAE do, each as often as its counterpart.

    Latent i is max(0, u_i . (x - mean) - t_i) with u_i uniform on the unit sphere. t_i is the order statistic of the
    projections that exactly round(density_i * rows) of the rows exceed (fewer if projections tie). So the mean L0 and
    the whole distribution of densities are the SAE's, which matters: no latent can tell tokens on which it is silent.

    Args:
        x: (rows, d_in), a sample of train activations; mean and thresholds come from it.
        density: (d_sae,), share of train tokens on which each of the SAE's latents is active.
        seed: of the directions.

    Returns:
        An `SAE` of d_sae latents, for its encoder only: its decoder is the directions.
    """
    n, d_in = x.shape
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(len(density), d_in, generator=generator))
    x = x.float().cpu()
    mean = x.mean(0)
    counts = torch.from_numpy(np.rint(density * n).astype(np.int64)).clamp(0, n)
    threshold = torch.empty(len(density))
    step = max(1, (1 << 24) // n)
    for start in range(0, len(density), step):
        projections = (directions[start : start + step] @ (x - mean).T).numpy()
        for i, row in enumerate(projections, start=start):
            # The greatest projection that does not fire; where all fire, anything below the least.
            place = n - 1 - int(counts[i])
            threshold[i] = float(np.partition(row, place)[place]) if place >= 0 else float(row.min()) - 1
    bias = -(directions @ mean) - threshold
    zeros = torch.zeros(len(density))
    return SAE(directions, bias, directions, torch.zeros(d_in), rule="threshold", threshold=zeros)
