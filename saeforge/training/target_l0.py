"""`TargetL0`: scales a variant's sparsity coefficient until its latents are as sparse as asked for.

A proportional-integral controller in the logarithm of the coefficient. With e = log(L0 / target), cut to
+-`LARGEST_ERROR` and smoothed over `SMOOTH_STEPS` steps, the scheduled value is multiplied by exp(u), where u = P e +
the sum over steps of (I / total_steps) e.

L0 answers a change of the coefficient with a lag of many steps, because weights have to move. To first order, with lag
T and elasticity g = -dlog L0 / dlog coefficient, the loop does not ring where (1 + g P)^2 >= 4 T g I / total_steps:
with P = 1, I = 40 and g = 1 up to T = total_steps / 40. The cut keeps the first hundred steps, where L0 falls by itself
from half of all latents, from driving the coefficient up: cut at 1 and P = 2, the FVU of l1_relu ended at 0.230 instead
of 0.207. Weights move, and so L0 answers, in proportion to the learning rate: the sum grows in proportion to it, and to
the coefficient's own warm-up. Figures: docs/training.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.ops import Group
from saeforge.variants import Variant

PROPORTIONAL = 1.0
INTEGRAL = 40.0
SMOOTH_STEPS = 20
LARGEST_ERROR = 0.5
#: Bound of |log multiplier|, over all: a target that is out of reach must not end in infinity, nor take the
#: rest of the run to come back from.
LARGEST = math.log(1e3)


class TargetL0(nn.Module):
    """The controller of one SAE. Its state lies on the device and in checkpoints; no step waits for it.

    Args:
        variant: whose `sparsity_schedule` is steered.
        target: mean number of active latents per token.

    Raises:
        ConfigError: a variant without a sparsity coefficient, or a target that no SAE of its size has.
    """

    integral: Tensor
    smoothed: Tensor
    _active: Tensor
    _rows: Tensor

    def __init__(self, variant: Variant, target: float) -> None:
        super().__init__()
        name = variant.sparsity_schedule
        if name is None:
            has_k = f"; its L0 is variant.k = {variant.arguments['k']}" if "k" in variant.arguments else ""
            raise ConfigError(
                f"model.target_l0 = {target}: {type(variant).__name__} names no sparsity coefficient to scale{has_k}; "
                "leave target_l0 out"
            )
        if not 0 < target < variant.d_sae:
            raise ConfigError(
                f"model.target_l0 = {target} with d_sae = {variant.d_sae}: expected more than 0 and less than d_sae"
            )
        self.schedule, self.target = name, target
        self._peak, self._total_steps = math.nan, 0
        self.register_buffer("integral", torch.zeros((), dtype=torch.float64))
        self.register_buffer("smoothed", torch.zeros((), dtype=torch.float64))
        # Between two optimizer steps only, of the batches that are accumulated.
        self.register_buffer("_active", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("_rows", torch.zeros((), dtype=torch.float64), persistent=False)

    def bind(self, schedules: dict[str, Callable[[int], float]], total_steps: int) -> None:
        """Takes the run's length and the variant's schedules.

        Raises:
            ConfigError: there is no such schedule, or it is 0 throughout.
        """
        if self.schedule not in schedules:
            raise ConfigError(
                f"sparsity_schedule {self.schedule!r} is none of the variant's schedules ({', '.join(schedules)}); "
                "name the one that scales its sparsity term"
            )
        curve = schedules[self.schedule]
        self._peak = max(curve(round(share * total_steps / 100)) for share in range(101))
        self._total_steps = total_steps
        if self._peak <= 0:
            raise ConfigError(
                f"model.target_l0 scales variant.{self.schedule}, which is 0; set it to a positive first guess"
            )

    def scaled(self, value: float) -> Tensor:
        """The coefficient of the coming step, a scalar fp32 tensor, from its scheduled value."""
        multiplier = (self.integral + PROPORTIONAL * self.smoothed).clamp(-LARGEST, LARGEST).exp()
        return (value * multiplier).float()

    def observe(self, counts: Tensor, rows: int) -> None:
        """Adds a batch: in how many rows each latent was active (d_sae,), of so many, over all ranks that share it."""
        self._active += counts.sum()
        self._rows += rows

    @torch.no_grad()
    def update(self, value: float, lr_factor: float, latents: Group | None = None) -> None:
        """One step of the loop, after the optimizer's.

        Args:
            value: of the schedule at this step, before scaling.
            lr_factor: multiplier of the learning rate at this step.
            latents: the ranks that share out the latents, if some do: each has observed its own.
        """
        # Sums of counts, exact in float64: all ranks, and one device, steer alike to the bit.
        active = self._active if latents is None else latents.sum(self._active)
        l0 = active / self._rows
        error = (l0 / self.target).log().clamp(-LARGEST_ERROR, LARGEST_ERROR)  # an L0 of 0 is -inf
        self.smoothed += (error - self.smoothed) / SMOOTH_STEPS
        rate = INTEGRAL / self._total_steps * min(1.0, lr_factor) * value / self._peak
        self.integral.add_(error, alpha=rate).clamp_(-LARGEST, LARGEST)
        self._active.zero_()
        self._rows.zero_()
