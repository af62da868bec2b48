"""Schedules: pure functions from an optimizer step to a value. No state, so resuming needs nothing but the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Shape = Literal["linear", "cosine"]


def ramp(step: int, steps: int) -> float:
    """Linear from 0 at step 0 to 1 at `steps`, then 1; 1 throughout if steps is 0."""
    return 1.0 if steps <= 0 else min(1.0, step / steps)


def anneal(step: int, steps: int, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at `steps`, then `end`."""
    return start + (end - start) * ramp(step, steps)


def rewarm(step: int, starts: Sequence[int], *, steps: int = 1000, low: float = 0.1) -> float:
    """Multiplier of the learning rate after each of `starts`: from `low` to 1 along half a cosine over `steps`."""
    factor = 1.0
    for start in starts:
        if 0 <= step - start < steps:
            factor *= low + (1 - low) * (1 - math.cos(math.pi * (step - start) / steps)) / 2
    return factor


def warmup_then_decay(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    warmup_shape: Shape = "linear",
    decay_shape: Shape = "linear",
) -> float:
    """Multiplier of the learning rate: a warm-up, constant, a decay to 0 over the last `decay_steps`.

    The first step of a warm-up already learns ((step + 1) / warmup), and the last of a decay still does
    (1 / decay_steps): no step is wasted on a rate of exactly 0. A cosine warm-up rises from a tenth (Gemma Scope,
    arXiv 2408.05147), a cosine decay falls along (1 - cos(pi r)) / 2 of the share r that the linear one leaves.
    """
    factor = 1.0
    if warmup_steps > 0:
        done = min(1.0, (step + 1) / warmup_steps)
        factor = done if warmup_shape == "linear" else 0.1 + 0.9 * (1 - math.cos(math.pi * done)) / 2
    if decay_steps > 0:
        left = min(1.0, max(0.0, (total_steps - step) / decay_steps))
        factor = min(factor, left if decay_shape == "linear" else (1 - math.cos(math.pi * left)) / 2)
    return factor
