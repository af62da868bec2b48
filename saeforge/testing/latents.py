"""Latents shared out: ranks that hold some latents each have the loss, gradients and start of all latents."""

from __future__ import annotations

import torch
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.errors import ConfigError
from saeforge.ops import Group, Shard, latents_over
from saeforge.testing.case import Case, close, distance
from saeforge.testing.outcome import CheckFailed, LeftOut
from saeforge.testing.ranks import Share, in_threads
from saeforge.variants import Variant, shard_

STEP = 1e-9  # float64
START = 1e-4  # fp32: a length that is fitted to the data comes of sums in another order


def latents(case: Case) -> None:
    """Two ranks (threads) with half of the latents each, from the start and in a step: together, those of one device.

    What has no latents (biases, terms) is the same on both.
    """
    variant = case.variant()
    try:
        for rank in range(2):
            shard_(case.variant(), Shard.of(variant.d_sae, Group(2, rank)))
    except ConfigError as error:
        raise LeftOut(f"its latents cannot be shared out: {error}") from error
    names = set[str]()
    for part, whole, bound in (
        (_start, _start(case, Group(), names), START),
        (_step, _step(case, Group(), names), STEP),
    ):
        shares = in_threads(lambda group, part=part: part(case, group, names))  # type: ignore[misc]
        for name, value in whole.items():
            parts = [share[name] for share in shares]
            found = [torch.cat(parts)] if name.rpartition(" ")[2] in names else parts
            worst = max((each for each in found), key=lambda each: distance(each, value) if each.numel() else 0.0)
            if not close(worst, value, bound) and float((worst - value).abs().max()) > 1e-12:
                raise CheckFailed(
                    f"{name} over two ranks that share out the latents is not that of one device; sum over latents "
                    "with self.mean_entries or self.sum_latents, read what has none by encode or self.for_latents, "
                    "draw rows by random_rows, and let a selection of your own compare latents in `finish` alone"
                )


def _start(case: Case, group: Group, names: set[str]) -> Share:
    """All weights as `initialise` sets them."""
    variant = case.initialised(shard=Shard.of(case.variant().d_sae, group))
    names |= variant.latent_names
    return {f"the start of {name}": value.double() for name, value in variant.state_dict().items()}


def _step(case: Case, group: Group, names: set[str]) -> Share:
    """Loss, gradients and counts."""
    variant: Variant = case.variant()
    shard_(variant, Shard.of(variant.d_sae, group))
    batch = case.batch(32, seed=12)
    weight = torch.linspace(0.2, 1.8, 32, dtype=torch.float64)
    with latents_over(variant.shard):
        out = case.stepped(variant, Batch(batch.x, batch.x, weight, batch.group))
        torch.stack(list(out.terms.values())).sum().backward()
        counts = variant.observe(out.code)
    found: dict[str, Tensor] = {f"term {name}": term.detach() for name, term in out.terms.items()}
    found["the count of firing_counts"] = counts.double()
    names.add("firing_counts")
    for name, parameter in variant.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[f"the gradient of {name}"] = gradient.detach()
    return found
