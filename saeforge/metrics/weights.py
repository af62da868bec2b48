"""The geometry of an SAE's weights: which latents nearly repeat another, whether they read what they write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeforge.metrics.spread import Spread

#: Latents whose nearest other row is looked for, at most: a random sample is as good for shares and percentiles, and
#: d_sae^2 products of width 4096 at 65,536 latents would take minutes on a CPU.
SAMPLE = 8192
#: From this cosine on two rows are called twins.
TWIN = 0.9

# Elements of a piece of cosines: 64 MiB in fp32, instead of the d_sae^2 of all.
_PIECE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class WeightFigures:
    """The result of `weight_figures`; `conventions.WEIGHTS` defines each. None without an encoder that is a matrix."""

    latents: int
    sampled: int
    decoder_norm: Spread
    decoder_nearest: Spread | None
    decoder_twins: float | None
    encoder_norm: Spread | None
    encoder_bias: Spread | None
    encoder_nearest: Spread | None
    encoder_decoder: Spread | None


def weight_figures(
    W_dec: Tensor, W_enc: Tensor | None = None, b_enc: Tensor | None = None, *, sample: int = SAMPLE, seed: int = 0
) -> WeightFigures:
    """Norms and cosines of an SAE's rows.

    Args:
        W_dec: (d_sae, d_out).
        W_enc: (d_sae, d_in), or None.
        b_enc: (d_sae,), or None.
        sample: latents at most whose nearest other is looked for, among all; the norms are of all.
        seed: of the sample.
    """
    d_sae = len(W_dec)
    chosen = torch.arange(d_sae)
    if sample < d_sae:
        chosen = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[:sample].sort().values
    decoder = None if d_sae < 2 else nearest(W_dec, W_dec, chosen, others=True)
    encoder = None if d_sae < 2 or W_enc is None else nearest(W_enc, W_enc, chosen, others=True)
    cosines = None
    if W_enc is not None and W_enc.shape == W_dec.shape:
        step = piece_rows(W_dec.shape[1])
        pieces = zip(W_enc.split(step), W_dec.split(step), strict=True)
        cosines = torch.cat([(unit_rows(a.double()) * unit_rows(b.double())).sum(1) for a, b in pieces])
    return WeightFigures(
        latents=d_sae,
        sampled=len(chosen),
        decoder_norm=Spread.of(_norms(W_dec)),
        decoder_nearest=None if decoder is None else Spread.of(decoder),
        decoder_twins=None if decoder is None else float((decoder >= TWIN).double().mean()),
        encoder_norm=None if W_enc is None else Spread.of(_norms(W_enc)),
        encoder_bias=None if b_enc is None else Spread.of(b_enc),
        encoder_nearest=None if encoder is None else Spread.of(encoder),
        encoder_decoder=None if cosines is None else Spread.of(cosines),
    )


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of norm 1, in their dtype; a row of zeros stays one."""
    tiny = torch.finfo(rows.dtype).tiny
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(tiny)  # or squares of tiny entries underflow
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(tiny)
    return unit


def nearest(a: Tensor, b: Tensor, chosen: Tensor, *, others: bool = False) -> Tensor:
    """Greatest cosine of each chosen row of `a` with any row of `b`, a piece of (chosen, rows of b) at a time.

    Args:
        a: (n, d). b: (m, d). chosen: int64, rows of `a`.
        others: `b` is `a`, and a row is not compared with itself.

    Returns:
        (chosen,) fp32 on the device of `a`.
    """
    chosen = chosen.to(a.device)
    rows, against, norms = unit_rows(a.detach()[chosen].float()), b.detach().float(), _norms(b)
    # Cosines are divided, so that a large matrix has no second copy with unit rows.
    inverse = torch.where(norms > 0, 1 / norms, 0.0).float()
    found = []
    for part, own in zip(*(t.split(piece_rows(len(b))) for t in (rows, chosen)), strict=True):
        cosines = (part @ against.T).mul_(inverse)
        if others:
            cosines.scatter_(1, own[:, None], -2.0)
        found.append(cosines.amax(1))
    return torch.cat(found).clamp(-1, 1)


def _norms(rows: Tensor) -> Tensor:
    """(n,) float64, a piece of rows at a time."""
    return torch.cat([part.double().norm(dim=1) for part in rows.detach().split(piece_rows(rows.shape[1]))])


def piece_rows(width: int) -> int:
    """Rows of a piece of cosines that is so wide."""
    return max(1, _PIECE_ELEMENTS // width)
