"""Histograms over the latents of an SAE in training: how often they fire, how long their rows are, their thresholds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saeforge.metrics import DENSITY_EDGES, density_histogram
from saeforge.ops import Group
from saeforge.training.loggers import Histogram
from saeforge.training.member import Member

BINS = 40


@torch.no_grad()
def latent_histograms(member: Member, tokens: int) -> dict[str, Histogram]:
    """Those of `figures.HISTOGRAMS` that the SAE has.

    Where ranks share out the latents, all of them must call it, and each gets the whole.

    Args:
        member: in training; its `firing_counts` are read.
        tokens: over which they were counted.
    """
    group, counts = member.variant.latent_group, member.variant.firing_counts
    density = group.sum(density_histogram(counts, tokens).to(counts.device))
    found = {"latents/log10_density": Histogram(density.cpu().numpy(), np.array(DENSITY_EDGES))}
    sae = member.fold()  # of a rank that holds some of the latents it is their part
    found["latents/decoder_norm"] = histogram(sae.W_dec.norm(dim=1), group)
    if sae.encoder is None:
        found["latents/encoder_norm"] = histogram(sae.W_enc.norm(dim=1), group)
    if sae.threshold is not None:
        found["latents/threshold"] = histogram(sae.threshold, group)
    return found


def histogram(values: Tensor, group: Group) -> Histogram:
    """Of (n,) values of each rank of a group, in equal bins from the least to the greatest of all.

    Values that are not finite (the threshold of a latent that never fires) are in none.
    """
    values = values.detach().double()
    values = values[values.isfinite()]
    ends = values.new_full((2,), torch.inf)
    if len(values):
        ends = torch.stack([values.min(), -values.max()])
    low, high = (group.minimum(ends) * ends.new_tensor([1, -1])).tolist()
    if low > high:  # none is finite
        low = high = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # all alike: one bin in the middle has them
        margin = 0.5 * max(abs(low), 1e-6)
        low, high = low - margin, high + margin
    place = ((values - low) * (BINS / (high - low))).long().clamp(0, BINS - 1)
    counts = group.sum(torch.bincount(place, minlength=BINS))
    return Histogram(counts.cpu().numpy(), np.linspace(low, high, BINS + 1))
