"""Which row of one matrix stands for which of another: the best one-to-one assignment, or mutual nearest rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.metrics.spread import Spread
from saeforge.metrics.weights import SAMPLE, nearest, piece_rows, unit_rows

#: The Hungarian method needs all cosines at once, in float64, and a time that grows with their number times the rows.
HUNGARIAN_LIMIT = 8192
#: From this cosine on a pair counts as shared (Paulo and Belrose 2025).
SHARED = 0.7

Method = Literal["auto", "hungarian", "mutual"]


@dataclass(frozen=True)
class Agreement:
    """How alike two decoders are; `conventions.AGREEMENT` defines each."""

    latents_a: int
    latents_b: int
    method: str
    pairs: int
    shared: float
    cosine: Spread | None
    nearest_a: Spread
    nearest_b: Spread
    chance: float


def match_rows(a: Tensor, b: Tensor, *, method: Method = "auto", absolute: bool = False, seed: int = 0) -> Agreement:
    """Pairs the rows of two decoders and says how alike they are.

    Args:
        a: (n, d).
        b: (m, d).
        method: "hungarian": the one-to-one assignment of greatest total cosine; "mutual": pairs that are each other's
            nearest row; "auto": the first up to 8,192 rows, else the second.
        absolute: take |cosine|, as the "MCC" of some tools does. A latent of one sign adds its row, so the opposite row
            is another feature: the default keeps the sign.
        seed: of the random directions.

    Raises:
        ConfigError: widths that differ, no rows, an unknown method, or scipy is missing.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ConfigError(f"decoders of shape {tuple(a.shape)} and {tuple(b.shape)}: expected rows of one width")
    if not len(a) or not len(b):
        raise ConfigError(f"{len(a)} and {len(b)} latents to compare: expected at least one of each")
    if method not in ("auto", "hungarian", "mutual"):
        raise ConfigError(f"method {method!r}: expected 'auto', 'hungarian' or 'mutual'")
    if method == "auto":
        method = "hungarian" if max(len(a), len(b)) <= HUNGARIAN_LIMIT else "mutual"
    a, b = unit_rows(a.detach().float()), unit_rows(b.detach().float()).to(a.device)
    if method == "hungarian":
        cosines = a @ b.T
        if absolute:
            cosines.abs_()
        of_a, of_b = cosines.amax(1), cosines.amax(0)
        rows, columns = assign(cosines)
        matched = cosines[rows, columns]
    else:
        of_a, of_b, matched = _mutual(a, b, absolute)
    return Agreement(
        latents_a=len(a),
        latents_b=len(b),
        method=method,
        pairs=len(matched),
        shared=int((matched >= SHARED).sum()) / min(len(a), len(b)),
        cosine=Spread.of(matched.clamp(max=1)) if len(matched) else None,
        nearest_a=Spread.of(of_a.clamp(max=1)),
        nearest_b=Spread.of(of_b.clamp(max=1)),
        chance=_chance(a, len(b), absolute, seed),
    )


def assign(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns (int64) of the one-to-one assignment with the greatest sum (Hungarian method).

    Raises:
        ConfigError: scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ConfigError(
            "a one-to-one assignment needs scipy; pip install 'saeforge[synthetic]' (between decoders, method 'mutual' "
            "does without)"
        ) from error
    rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def _mutual(a: Tensor, b: Tensor, absolute: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Greatest cosine of each row of a, of each row of b, and of the pairs that are each other's nearest.

    A piece of rows of `a` at a time; ties go to the lowest row.
    """
    best = torch.full((len(b),), -2.0, device=a.device)
    of_b = torch.zeros(len(b), dtype=torch.int64, device=a.device)
    values, of_a = [], []
    start = 0
    for part in a.split(piece_rows(len(b))):
        cosines = part @ b.T
        if absolute:
            cosines.abs_()
        by_row, by_column = cosines.max(1), cosines.max(0)
        values.append(by_row.values)
        of_a.append(by_row.indices)
        better = by_column.values > best
        best = torch.where(better, by_column.values, best)
        of_b = torch.where(better, by_column.indices + start, of_b)
        start += len(part)
    value, other = torch.cat(values), torch.cat(of_a)
    mutual = of_b[other] == torch.arange(len(a), device=a.device)
    return value, best, value[mutual]


def _chance(a: Tensor, directions: int, absolute: bool, seed: int) -> float:
    """Mean over rows of `a` (a sample, of many) of the greatest cosine with so many random directions."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(a), generator=generator)[:SAMPLE]
    random = torch.randn(directions, a.shape[1], generator=generator).to(a.device)
    found = nearest(a, random, chosen)
    if absolute:
        found = torch.maximum(found, nearest(-a, random, chosen))
    return float(found.double().mean())
