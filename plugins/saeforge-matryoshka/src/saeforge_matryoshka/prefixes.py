"""Where nested dictionaries end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from saeforge.errors import ConfigError

#: SAEBench's shares of the latents; the last group is what remains.
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)


def group_ends(groups: Sequence[float] | None, d_sae: int) -> tuple[int, ...]:
    """The end of each group of latents, ascending; the last one is d_sae.

    Args:
        groups: widths of the groups (integers) or shares of d_sae (below 1); what remains is one more. None: `SHARES`.
        d_sae: number of latents.

    Raises:
        ConfigError: groups that are empty or larger than the dictionary, or widths and shares mixed.
    """
    given = SHARES if groups is None else tuple(groups)
    if not given or any(group <= 0 for group in given):
        raise ConfigError(f"groups = {list(given)}: expected positive widths, or shares of d_sae")
    shares = [group < 1 for group in given]
    if any(shares) and not all(shares):
        raise ConfigError(f"groups = {list(given)}: expected widths only, or shares (below 1) only")
    ends, total = [], 0.0
    for group in given:
        total += group
        ends.append(round(total * d_sae) if shares[0] else round(total))
    if total > (1 + 1e-6 if shares[0] else d_sae):
        raise ConfigError(f"groups = {list(given)} are more than the {d_sae} latents there are; make them smaller")
    ends = [min(end, d_sae) for end in ends]
    if ends[-1] < d_sae:
        ends.append(d_sae)
    if ends[0] < 1 or any(a >= b for a, b in itertools.pairwise(ends)):
        raise ConfigError(
            f"groups = {list(given)} leave a group without latents (d_sae = {d_sae}); use fewer or larger"
        )
    return tuple(ends)


def random_ends(number: int, d_sae: int, exponent: float, generator: torch.Generator) -> Tensor:
    """(number,) int64 ascending ends, the last one d_sae: the others of a Pareto law on 1 to d_sae - 1.

    `P(end >= n) ~ n^-exponent` (Nabeshima 2024, "Matryoshka sparse autoencoders", exponent 0.5), without repetition.
    """
    lengths = torch.arange(1, d_sae, dtype=torch.float64)
    law = lengths.pow(-exponent - 1)
    ends = torch.multinomial(law, number - 1, generator=generator) + 1
    return torch.cat([ends.sort().values, torch.tensor([d_sae])])
