"""`agreement`: do two SAEs of the same activations find the same features?"""

from __future__ import annotations

from pathlib import Path

import torch

from saeforge.errors import ConfigError
from saeforge.metrics import Agreement, match_rows
from saeforge.metrics.matching import Method
from saeforge.sae import SAE, load


def agreement(
    sae_a: SAE | str | Path,
    sae_b: SAE | str | Path,
    *,
    method: Method = "auto",
    absolute: bool = False,
    alive_a: torch.Tensor | None = None,
    alive_b: torch.Tensor | None = None,
    seed: int = 0,
) -> Agreement:
    """Compares the decoder rows of two SAEs, like those of two seeds.

    Args:
        sae_a: an SAE, a RUN folder or an sae/ folder.
        sae_b: another one that writes to the same site.
        method: "hungarian" (one-to-one, greatest sum of cosines), "mutual" (pairs that are each other's nearest; any
            number of latents), or "auto": the first up to 8,192 latents.
        absolute: take |cosine|: for codes with signs, or to compare with tools that do.
        alive_a: (d_sae,) bool, latents of the first to compare; None: all. Dead latents keep their first weights: they
            lower the agreement, or raise it where both SAEs began alike.
        alive_b: the same of the second.
        seed: of the random directions behind `chance`.

    Returns:
        Figures that `saeforge.metrics.conventions.AGREEMENT` defines.

    Raises:
        SaeforgeError: no SAE, other widths, masks that do not fit or leave no latent, or scipy is missing.
    """
    a, b = (sae if isinstance(sae, SAE) else load(sae) for sae in (sae_a, sae_b))
    check_comparable(a, b)
    rows = []
    for name, sae, alive in (("alive_a", a, alive_a), ("alive_b", b, alive_b)):
        if alive is not None and (alive.shape != (sae.d_sae,) or alive.dtype != torch.bool):
            raise ConfigError(
                f"{name} is {alive.dtype} of shape {tuple(alive.shape)}; expected a mask, torch.bool ({sae.d_sae},)"
            )
        rows.append(sae.W_dec if alive is None else sae.W_dec[alive.to(sae.device)])
    return match_rows(*rows, method=method, absolute=absolute, seed=seed)


def check_comparable(a: SAE, b: SAE) -> None:
    """Raises ConfigError unless both write rows of one width."""
    if a.d_out != b.d_out:
        raise ConfigError(f"decoders {a.d_out} and {b.d_out} wide cannot agree; give two SAEs of the same site")
