"""What each paper does: the values of the options that are left null."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saeforge.variants import InputScale, Recipe

Loss = Literal["step", "quadratic", "tanh"]


@dataclass(frozen=True)
class Paper:
    """One recipe.

    Attributes:
        sparsity: coefficient of the sparsity term.
        warmup_steps: of that coefficient, at most; a tenth of a run that is shorter than ten times that. None: all of
            the run.
        bandwidth: width of the kernel, in scaled units.
        threshold: of every latent at the start, in scaled units.
        input_gradient: whether pseudo-gradients also reach the pre-activations.
        input_scale: see `Variant`.
        unit_norm: whether decoder rows have norm 1.
        pre_bias: whether the decoder's bias is subtracted from the input.
    """

    sparsity: float
    warmup_steps: int | None
    bandwidth: float
    threshold: float
    input_gradient: bool
    input_scale: InputScale
    unit_norm: bool
    pre_bias: bool

    def warmup(self, total_steps: int) -> int:
        """Steps over which the coefficient rises from 0."""
        return total_steps if self.warmup_steps is None else min(self.warmup_steps, total_steps // 10)

    def recipe(self, total_steps: int) -> Recipe:
        """Optimizer settings, with the usual clipping, of which DeepMind's papers do not speak.

        Adam remembers squares over 1,000 steps: without a bound those of the first ones, when every latent is active,
        keep a short run slow. 1,000 steps on the demo model end at an FVU of 0.16 with it, of 0.27 without.
        """
        if self.unit_norm:
            warmup = min(1000, total_steps // 10)
            return Recipe(lr=7e-5, betas=(0.0, 0.999), warmup_steps=warmup, warmup_shape="cosine")
        return Recipe(lr=2e-4, decay_steps=total_steps // 5)


PAPERS: dict[str, Paper] = {
    # Rajamanoharan et al. 2024 (arXiv 2407.14435), Gemma Scope (arXiv 2408.05147). The coefficient is ours.
    "step": Paper(1e-3, 10_000, 1e-3, 1e-3, False, "rms", True, True),
    # Gemma Scope 2 (McDougall et al. 2025): the coefficient is ours, chosen so that at twice the target one more latent
    # costs what the step loss makes it cost.
    "quadratic": Paper(2.5e-4, 50_000, 1e-3, 1e-3, False, "rms", True, True),
    # Anthropic, Circuits Updates, January 2025.
    "tanh": Paper(10.0, None, 2.0, 0.1, True, "sqrt_d", False, False),
}
