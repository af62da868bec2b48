"""From a trained SAE back to a variant's weights: the checks and units behind `Variant.unfolded`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from saeforge.errors import ConfigError
from saeforge.sae import SAE
from saeforge.variants.contract import Unfolded

if TYPE_CHECKING:
    from saeforge.variants.base import Variant

log = logging.getLogger("saeforge.variants")


def unfold(variant: Variant, sae: SAE) -> Unfolded:
    """See `Variant.unfolded`; of a variant that holds some of the latents, theirs."""
    name = type(variant).__name__
    if sae.rule == "plugin":
        raise ConfigError(f"init_from: {name} needs an SAE with a linear encoder, this one is encoded by a plugin")
    if sae.W_skip is not None:
        raise ConfigError(f"init_from: {name} has no skip connection, this SAE has one")
    for option, own, given in (
        ("d_in", variant.d_in, sae.d_in),
        ("d_out", variant.d_out, sae.d_out),
        ("d_sae", variant.d_sae, sae.d_sae),
    ):
        if own != given:
            advice = f"set variant.d_sae to {given}" if option == "d_sae" else "give an SAE of the same site"
            raise ConfigError(f"init_from: the SAE has {option} = {given}, this run {own}; {advice}")
    if variant.shard is not None:
        sae = sae.part(variant.shard)
    unit = variant.target_scale.double()
    W_dec, b_dec = sae.W_dec.to(unit) * (unit if unit.ndim else 1.0), sae.b_dec.to(unit) * unit
    norms = W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    if sae.rule == "topk" and bool(norms.max() > 1.001 * norms.min()):
        log.warning(
            "init_from: decoder rows of this top-k SAE have norms from %.3g to %.3g; they are set to 1, so other "
            "latents may be the k largest",
            norms.min().item(),
            norms.max().item(),
        )
    factor = norms if unit.ndim else norms * unit
    return Unfolded(
        sae.W_enc.to(unit) * factor[:, None] / variant.scale.double(),
        sae.b_enc.to(unit) * factor,
        W_dec / norms[:, None],
        b_dec,
        None if sae.threshold is None else sae.threshold.to(unit) * factor,
    )
