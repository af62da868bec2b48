"""`Batch`: what a training step sees."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Rows of raw activations.

    Attributes:
        x: (B, d_in) input.
        target: (B, d_out) what to reconstruct; the same tensor as `x` for an SAE.
        weight: (B,) weight of each row in the loss, or None for equal weights.
        group: (B,) id of the run of consecutive rows of one document that a row belongs to, or None.
    """

    x: Tensor
    target: Tensor
    weight: Tensor | None = None
    group: Tensor | None = None
