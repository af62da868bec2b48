"""What a trained crosscoder says of its sources: in which of them a latent lives, and whether it means the same there.

All functions take the folded SAE as `saeforge.load` or `saeforge.train` return it. Norms are in units of each source's
root mean square norm (`unit="rms"`), so that sources of other size compare; the raw decoder rows are `sae.W_dec`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.variants import SAE


def source_widths(sae: SAE) -> tuple[int, ...]:
    """Widths of the sources that an SAE writes, in order.

    Raises:
        ConfigError: an SAE of one site.
    """
    return tuple(int(part["d"]) for part in _parts(sae))


@torch.no_grad()
def source_norms(sae: SAE, *, unit: Literal["rms", "raw"] = "rms") -> Tensor:
    """Norm of each latent's decoder in each source: (d_sae, sources).

    Raises:
        ConfigError: an SAE of one site, or an unknown unit.
    """
    if unit not in ("rms", "raw"):
        raise ConfigError(f"unit {unit!r}: expected 'rms' or 'raw'")
    parts = _parts(sae)
    norms = torch.stack([rows.norm(dim=1) for rows in sae.W_dec.split(source_widths(sae), dim=1)], dim=1)
    if unit == "raw":
        return norms
    return norms / norms.new_tensor([part["rms_norm"] for part in parts])


def relative_norms(sae: SAE) -> Tensor:
    """Each source's share of a latent's decoder norm: (d_sae, sources), rows sum to 1; NaN where it has none.

    Of two models, `[:, 1]` is Lindsey et al.'s relative decoder norm: near 0 only in the first, near 1 only in the
    second, 0.5 shared.
    """
    norms = source_norms(sae)
    return norms / norms.sum(1, keepdim=True)


def norm_difference(sae: SAE, first: int = 0, second: int = 1) -> Tensor:
    """Minder et al.'s Delta_norm: (d_sae,) `1/2 + (|w_second| - |w_first|) / (2 max(|w_first|, |w_second|))`.

    They call latents from 0.9 on the second model's own, up to 0.1 the first's, from 0.4 to 0.6 shared.
    """
    a, b = _columns(sae, first, second)
    norms = source_norms(sae)
    one, two = norms[:, a], norms[:, b]
    return 0.5 + (two - one) / (2 * torch.maximum(one, two))


@torch.no_grad()
def decoder_cosines(sae: SAE, first: int = 0, second: int = 1) -> Tensor:
    """Cosine between a latent's decoders in two sources of equal width: (d_sae,); 0 where one of them is zero.

    Raises:
        ConfigError: sources of other width, whose directions do not compare.
    """
    a, b = _columns(sae, first, second)
    widths = source_widths(sae)
    if widths[a] != widths[b]:
        raise ConfigError(
            f"source {a} is {widths[a]} wide and source {b} {widths[b]}: no cosine between their decoders"
        )
    parts = sae.W_dec.split(widths, dim=1)
    return torch.nn.functional.cosine_similarity(parts[a], parts[b], dim=1)


def _parts(sae: SAE) -> list[dict[str, Any]]:
    parts = sae.meta.get("targets") or sae.meta.get("sources")
    if not parts:
        raise ConfigError("this SAE reads one site; expected a crosscoder, trained on several (data.input as a list)")
    return list(parts)


def _columns(sae: SAE, first: int, second: int) -> tuple[int, int]:
    n = len(source_widths(sae))
    for number in (first, second):
        if not 0 <= number < n:
            raise ConfigError(f"source {number}: this crosscoder has {n}, 0 to {n - 1}")
    return first, second
