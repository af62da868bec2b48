"""`shard_`: a variant keeps the latents of its rank (`saeforge.ops.shards`)."""

from __future__ import annotations

import torch

from saeforge.errors import ConfigError
from saeforge.ops import Shard
from saeforge.variants.base import Variant


@torch.no_grad()
def shard_(variant: Variant, shard: Shard) -> None:
    """Cuts every parameter and buffer with one entry a latent to the shard's; `d_sae` stays the number of all.

    Before `initialise`, which then sets what one device would, row by row: the weights of a new variant are memory that
    nothing has touched, so the whole is never there. From now on the variant works inside `latents_over(shard)` only.

    Args:
        variant: on the CPU. Its parameters stay the same objects.
        shard: of `variant.d_sae` latents.

    Raises:
        ConfigError: see `check_shard`.
    """
    check_shard(variant, shard)
    own, names = slice(shard.first, shard.last), set()
    for path, module in variant.named_modules():
        prefix = f"{path}." if path else ""
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim and len(parameter) == variant.d_sae:
                parameter.data = parameter.data[own].clone()
                names.add(prefix + key)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.ndim and len(buffer) == variant.d_sae:
                module._buffers[key] = buffer[own].clone()
                names.add(prefix + key)
    variant.shard = shard if shard.group.size > 1 else None
    variant.latent_names = frozenset(names)
    variant._forget_lists()


def check_shard(variant: Variant, shard: Shard) -> None:
    """Whether `shard_` can cut the variant so; nothing is changed.

    Raises:
        ConfigError: a variant that is sharded already, or says that it cannot be (`exempt_checks`); another number of
            latents, or one that is also a width, so that a latent's entries cannot be told from others.
    """
    name = type(variant).__name__
    if variant.shard is not None or shard.d_sae != variant.d_sae:
        raise ConfigError(
            f"{name} has d_sae = {variant.d_sae}{', sharded already' if variant.shard else ''}; a shard of "
            f"{shard.d_sae} latents does not fit: make it with Shard.of(variant.d_sae, group), once"
        )
    if reason := variant.exempt_checks.get("latents"):
        raise ConfigError(f"{name} cannot share out its latents: {reason}; let devices share the rows instead")
    if variant.d_sae in (variant.d_in, variant.d_out):
        raise ConfigError(
            f"d_sae = {variant.d_sae} is also a width of the data ({variant.d_in} to {variant.d_out}), and latents "
            "cannot be told from dimensions to share them out; choose another variant.d_sae"
        )
