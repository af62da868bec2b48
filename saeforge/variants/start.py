"""How weights start: scales, directions, lengths and centres that several variants share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from saeforge.data.moments import Statistics
from saeforge.errors import ConfigError
from saeforge.ops import shards
from saeforge.optim.row_adam import unit_rows_

InputScale = Literal["rms", "sqrt_d", "none"]

#: Numbers that are drawn at a time where most belong to other ranks: 16 MiB.
_CHUNK_ELEMENTS = 1 << 22


def input_scale(kind: InputScale, stats: Statistics) -> float:
    """The scalar that `kind` asks for; see `Variant`.

    Raises:
        ConfigError: activations that are all zero.
    """
    if kind == "none":
        return 1.0
    if math.isnan(stats.mean_norm) and kind == "sqrt_d":
        raise ConfigError("input_scale sqrt_d is undefined over several sites side by side; set rms or none")
    if stats.mean_square_norm <= 0:
        raise ConfigError("the activations are all zero: nothing to scale; check the harvested site")
    if kind == "rms":
        return 1 / math.sqrt(stats.mean_square_norm)
    return math.sqrt(len(stats.mean)) / stats.mean_norm


def random_unit_rows(n: int, d: int, generator: torch.Generator, *, latents: bool = True) -> Tensor:
    """(n, d) fp32 rows of norm 1 with random directions, made on the CPU.

    Args:
        n: number of rows. d: their width.
        generator: the only source of randomness.
        latents: whether there is one for each latent; then a rank that holds some of them gets their rows.
    """
    rows = random_rows(n, d, generator, torch.randn) if latents else torch.randn(n, d, generator=generator)
    unit_rows_(rows)
    return rows


def random_rows(n: int, d: int, generator: torch.Generator, draw: Callable[..., Tensor]) -> Tensor:
    """(n, d) of `draw` (torch.randn, torch.rand), one row a latent; of a rank that holds some of them, their rows.

    All ranks draw the same numbers, a chunk of rows at a time, and keep their own. torch.randn makes numbers in blocks
    of 16 from so many uniform ones, and the last block again if it is not full: chunks of whole blocks, with a last one
    that has at least 16 numbers, continue its stream.
    """
    shard = shards.current()
    if shard is None:
        return draw(n, d, generator=generator)
    if n != shard.d_sae:
        raise ConfigError(f"{n} random rows are not one for each of the {shard.d_sae} latents; say latents=False")
    step = 16 * max(1, _CHUNK_ELEMENTS // (16 * d))
    rows = torch.empty(len(shard), d)
    for start in range(0, max(1, n - n % 16), step):
        stop = n if start + step >= n - n % 16 else start + step
        chunk = draw(stop - start, d, generator=generator)
        own = range(max(start, shard.first), min(stop, shard.last))
        if len(own):
            rows[own.start - shard.first : own.stop - shard.first] = chunk[own.start - start : own.stop - start]
    return rows


def least_squares_factor(wanted: Tensor, rebuilt: Tensor) -> Tensor:
    """The scalar c that makes `|wanted - c rebuilt|` least, for the length of an encoder at the start.

    1 if it is below 0.01: then the two know nothing of each other (a transcoder's random directions).
    """
    factor = (wanted * rebuilt).sum() / rebuilt.square().sum()
    return torch.where(factor > 0.01, factor, torch.ones_like(factor))


def mean_norm_of_others(rows: Tensor, latents: Tensor) -> Tensor:
    """Mean norm, a scalar, of the rows (d_sae, d) that are not in `latents` (n,); of all, if none is left.

    Where latents are shared out, rows and `latents` are those of a rank, and the mean is over all ranks' rows.
    """
    others = torch.ones(len(rows), dtype=torch.bool, device=latents.device)
    others[latents] = False
    shard = shards.current()
    if shard is not None:
        norm = rows.norm(dim=1).double()
        sums = torch.stack([(norm * others).sum(), others.sum(), norm.sum(), others.new_ones(len(rows)).sum()])
        of_others, n, of_all, d_sae = shard.group.sum(sums)
        return torch.where(n > 0, of_others / n.clamp_min(1), of_all / d_sae).to(rows.dtype)
    norms: Tensor = (rows[others] if bool(others.any()) else rows).norm(dim=1)
    return norms.mean()


@torch.no_grad()
def geometric_median(x: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point of least total distance to the rows of (n, d), by Weiszfeld's iteration in float64. Returns (d,)."""
    rows = x.double()
    guess = rows.mean(0)
    for _ in range(iterations):
        weight = 1 / (rows - guess).norm(dim=1).clamp_min(1e-12)
        moved = (weight @ rows) / weight.sum()
        step = (moved - guess).norm() / guess.norm().clamp_min(1e-12)
        guess = moved
        if step < tolerance:
            break
    return guess.to(x.dtype)


def check_pre_bias(pre_bias: bool, x: Tensor, target: Tensor) -> None:
    """A pre-encoder bias is the decoder's bias, so it makes sense only where input and target are the same.

    Raises:
        ConfigError: a transcoder with `pre_bias`.
    """
    if pre_bias and target is not x:
        raise ConfigError("pre_bias ties the decoder's bias to the encoder's input; set variant.pre_bias to false here")
