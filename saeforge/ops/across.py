"""The largest entries of a batch whose rows lie on several ranks: counts travel, values do not."""

from __future__ import annotations

import torch
from torch import Tensor

from saeforge.ops.group import Group

_DIGIT = 11  # bits of a pass: a histogram of 2,048 counts, three of them for fp32


@torch.no_grad()
def largest(values: Tensor, indices: Tensor, d_sae: int, total: int, group: Group) -> Tensor:
    """Which of this rank's entries are among the `total` largest of all ranks: a radix selection by histograms.

    Ties go to the lowest latent, then to the first rank, then to the first entry there. A rank sends 16 KB a pass and
    one count for each latent, whatever the batch. Nothing waits for the host.

    Args:
        values: (n,) of this rank's entries. indices: (n,) their latents.
        d_sae: number of latents.
        total: at most the entries of all ranks together.
        group: the ranks.

    Returns:
        (n,) bool.
    """
    keys, bits = _ordered(values)
    open_, taken = torch.ones_like(indices, dtype=torch.bool), torch.zeros_like(indices, dtype=torch.bool)
    left = torch.full((), total, device=keys.device)
    for shift in reversed(range(0, bits, _DIGIT)):
        digit = (keys >> shift) & ((1 << _DIGIT) - 1)
        counts = group.sum(_histogram(digit, open_, 1 << _DIGIT))
        above = counts.flip(0).cumsum(0).flip(0) - counts  # open entries with a larger digit
        boundary = (above >= left).sum().clamp(max=(1 << _DIGIT) - 1)
        taken |= open_ & (digit > boundary)
        open_ = open_ & (digit == boundary)
        left = left - above[boundary]
    # What is still open has one value, that of the last place.
    counts = group.sum(_histogram(indices, open_, d_sae))
    upto = counts.cumsum(0)
    boundary = (upto <= left).sum()
    taken |= open_ & (indices < boundary)
    last = open_ & (indices == boundary)
    before = torch.where(boundary > 0, upto[(boundary - 1).clamp_min(0)], 0)
    own = group.gather(last.sum()).cumsum(0)[group.rank] - last.sum()
    place = own + last.cumsum(0) - 1
    return taken | (last & (place < left - before))


def _histogram(digits: Tensor, counted: Tensor, n: int) -> Tensor:
    counts = torch.zeros(n, dtype=torch.int64, device=digits.device)
    return counts.index_add_(0, digits, counted.to(torch.int64))


def _ordered(values: Tensor) -> tuple[Tensor, int]:
    """Keys whose bits, read as an unsigned number, have the order of the values; how many bits. NaN is the largest."""
    values = torch.where(values.isnan(), torch.nan, values + 0.0)  # one NaN, one zero
    if values.dtype == torch.float64:
        raw = values.view(torch.int64)
        return torch.where(raw < 0, ~raw, raw ^ torch.iinfo(torch.int64).min), 64
    raw = values.float().view(torch.int32).to(torch.int64)
    return torch.where(raw < 0, ~raw, raw + (1 << 31)), 32
