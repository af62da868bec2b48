"""A few training steps of any variant on a mesh of ranks, or on one device, for tests that compare the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saeforge.data.moments import Moments
from saeforge.ops import Group, Shard, latents_over
from saeforge.optim import RowAdam
from saeforge.registry import VARIANTS
from saeforge.sae import SAE
from saeforge.variants import Batch, DataStatistics, RunSettings, Variant, shard_

D, D_SAE, ROWS, STEPS = 12, 32, 24, 6
#: Latents that count as dead at first: more of them on some ranks than on others, and on the last of four none.
DEAD = (0, 1, 2, 3, 4, 6, 7, 11, 14, 17)


@dataclass
class Trained:
    """What a rank has after its steps."""

    variant: Variant
    losses: list[dict[str, float]]
    grads: list[dict[str, Tensor]]
    start: dict[str, Tensor]
    sae: SAE
    sent: list[dict[str, int]]
    dead: list[tuple[int, ...]]


def data(n: int, d: int = D, *, seed: int = 1) -> Tensor:
    """(n, d) float64 sparse combinations of 40 directions around a mean."""
    directions = torch.randn(40, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, 40, dtype=torch.float64, generator=generator)
    return (chosen - 0.85).clamp_min(0) * 4 @ directions + 0.5


def train(
    name: str,
    options: dict[str, Any],
    latents: Group | None = None,
    group: Group | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    compute: torch.dtype | None = None,
    d_out: int = D,
    weighted: bool = False,
    sources: tuple[int, ...] = (),
) -> Trained:
    """Trains a variant by name; `group` shares the rows of each batch, `latents` its latents."""
    group, shard = group or Group(), None
    variant = VARIANTS.load(name)(D, d_out, d_sae=D_SAE, **options)
    if latents is not None:
        shard = Shard.of(D_SAE, latents)
        shard_(variant, shard)
    variant.to(dtype)
    x = data(200).to(dtype)
    target = x if d_out == D else data(200, d_out, seed=2).to(dtype)
    first, second = (Moments.of(part.double().numpy()).statistics() for part in (x, target))
    parts = tuple(Moments.of(part.double().numpy()).statistics() for part in x.split(sources, 1)) if sources else ()
    variant.bind(RunSettings(STEPS, 3 * ROWS, compute or dtype, group, sources, sources))
    schedules = variant.schedules(STEPS)
    losses, grads, sent, dead_by_rank = [], [], [], []
    with latents_over(shard):
        variant.initialise(DataStatistics(first, second, parts, parts), x, target, torch.Generator().manual_seed(0))
        # Not those rows again: tanh biases put latents exactly at their threshold there, where rounding decides.
        x = data(STEPS * ROWS, seed=3).to(dtype)
        target = x if d_out == D else data(STEPS * ROWS, d_out, seed=4).to(dtype)
        dead = torch.zeros(D_SAE, dtype=torch.int64)
        dead[list(DEAD)] = 10**6
        variant.tokens_since_fired.copy_(dead if shard is None else dead[shard.first : shard.last])
        variant.list_dead()
        start = {key: value.clone() for key, value in variant.state_dict().items()}
        optimizer = RowAdam(variant.param_groups(), lr=1e-2, eps=1e-4, max_grad_norm=0.1)
        if latents is not None:
            optimizer.share_out([p for key, p in variant.named_parameters() if key in variant.latent_names], latents)
        for step in range(STEPS):
            dead_by_rank.append(variant.dead_by_rank())  # listed here, so that its exchange is not a step's
            before = dict(latents.sent) if latents is not None else {}
            whole = slice(step * ROWS, (step + 1) * ROWS)
            rows, targets = (part[whole].chunk(group.size)[group.rank] for part in (x, target))
            weight = torch.linspace(0.2, 2, ROWS, dtype=dtype).chunk(group.size)[group.rank] if weighted else None
            batch = Batch(rows, rows if target is x else targets, weight)
            out = variant.step(batch, {key: schedule(step) for key, schedule in schedules.items()})
            optimizer.zero_grad()
            torch.stack(list(out.terms.values())).sum().backward()
            for parameter in variant.parameters():
                if parameter.grad is not None:
                    parameter.grad = group.mean(parameter.grad)
            grads.append({key: p.grad.clone() for key, p in variant.named_parameters() if p.grad is not None})
            losses.append({key: group.mean(term).item() for key, term in out.terms.items()})
            losses[-1]["squared_error"] = group.sum(out.counters["squared_error"]).item()
            optimizer.step()
            variant.observe(out.code)
            after = dict(latents.sent) if latents is not None else {}
            sent.append({kind: n for kind in after if (n := after[kind] - before.get(kind, 0))})
        return Trained(variant, losses, grads, start, variant.fold(), sent, dead_by_rank)


def together(parts: list[dict[str, Tensor]], names: frozenset[str]) -> dict[str, Tensor]:
    """One dictionary of the ranks' tensors: those with an entry a latent joined; the others must be equal."""
    whole = {}
    for key, value in parts[0].items():
        others = [part[key] for part in parts]
        if key not in names:
            assert all(torch.equal(value, other) for other in others), f"{key} differs between ranks"
        whole[key] = torch.cat(others) if key in names else value
    return whole
