"""`WeightAverage`: the exponential moving average of a variant's weights, which validation and the saved SAE use.

Gao et al. 2024 (arXiv 2406.04093, appendix A) average with 0.999 a step, a half-life of 693 steps, corrected for the
start: after t steps the average is sum_i b^(t-i) w_i / sum_i b^(t-i), i = 1..t, with b = 2^(-1 / half-life).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.training.skip import Skip
from saeforge.variants import Variant

Averaged = TypeVar("Averaged", Variant, Skip)


class WeightAverage(nn.Module):
    """fp32 shadows of the trainable parameters, on their device and in checkpoints.

    Args:
        variant: whose weights are averaged; or the skip path beside one.
        half_life_steps: optimizer steps after which a step's weights count half.

    Raises:
        ConfigError: a half-life that is not positive.
    """

    def __init__(self, variant: Variant | Skip, half_life_steps: float) -> None:
        super().__init__()
        check_half_life(half_life_steps)
        self._decay = 2.0 ** (-1.0 / half_life_steps)
        self._names = [name for name, _ in variant.named_parameters()]
        for number, parameter in enumerate(variant.parameters()):
            # Not a copy: the weights are not set yet, and what is NaN stays NaN in the first average.
            self.register_buffer(f"shadow_{number}", torch.zeros_like(parameter))

    def shadows(self) -> list[Tensor]:
        """In the order of the variant's parameters."""
        return [self.get_buffer(f"shadow_{number}") for number in range(len(self._names))]

    @torch.no_grad()
    def update(self, variant: Variant | Skip, step: int) -> None:
        """Takes the weights in after optimizer step `step` (from 0 on): the first of a run replaces what was there."""
        # (1 - b) / (1 - b^t) with t = step + 1; the shadow of step 0 becomes the weights themselves.
        weight = (1.0 - self._decay) / (1.0 - self._decay ** (step + 1))
        torch._foreach_lerp_(self.shadows(), list(variant.parameters()), weight)

    @torch.no_grad()
    def forget_(self, variant: Variant, parameters: list[nn.Parameter], latents: Tensor) -> None:
        """Rows (n,) that were set anew, not trained: their past says nothing, the average starts at what they are."""
        for parameter, shadow in zip(variant.parameters(), self.shadows(), strict=True):
            if any(parameter is changed for changed in parameters):
                shadow[latents] = parameter[latents]

    @torch.no_grad()
    def averaged(self, variant: Averaged) -> Averaged:
        """A copy of the variant with the averaged weights, constraints restored (a mean of unit rows is shorter)."""
        other = copy.deepcopy(variant)
        for parameter, shadow in zip(other.parameters(), self.shadows(), strict=True):
            parameter.copy_(shadow)
        other.constrain_()
        return other


def check_half_life(steps: float) -> None:
    """Refuses a half-life that is not positive.

    Raises:
        ConfigError: it is not.
    """
    if not steps > 0:
        raise ConfigError(f"model.ema_half_life_steps = {steps}: expected a positive number of steps, or null")
