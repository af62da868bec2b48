"""`Skip`: an affine path beside a transcoder, for any variant (Paulo et al. 2025, arXiv 2501.18823, skip transcoders).

The variant learns `target - W_skip x`, and W_skip learns with it: the loss's gradient reaches it through the target,
and so through every term that reads the target but where the variant stops gradients.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saeforge.data.batch import Batch
from saeforge.data.moments import Statistics
from saeforge.errors import ConfigError
from saeforge.sae import SAE
from saeforge.variants import Variant


class Skip(nn.Module):
    """`W_skip (d_out, d_in)`, zeros at the start as in the paper, in the variant's scaled units.

    It acts on `x - mean`, so that the decoder's bias has not to follow it, and so that a bf16 product rounds
    deviations, not the mean; folding puts the difference into the bias.

    Args:
        d_in: width of the input. d_out: of the target.
    """

    mean: Tensor

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in))
        self.register_buffer("mean", torch.zeros(d_in))

    @torch.no_grad()
    def center(self, stats: Statistics) -> None:
        """Takes the mean of the training rows."""
        self.mean.copy_(torch.tensor(stats.mean, dtype=torch.float64))

    def rest(self, batch: Batch, variant: Variant) -> Batch:
        """The batch with what is left for the variant as its target, in raw units, differentiable in W_skip."""
        dtype, compute = self.W_skip.dtype, variant.run.compute_dtype
        x = (batch.x.to(dtype) - self.mean) * variant.scale
        through = F.linear(x.to(compute), self.W_skip.to(compute)).to(dtype)
        return batch._replace(target=batch.target.to(dtype) - through / variant.target_scale)

    @torch.no_grad()
    def unfold_(self, sae: SAE, variant: Variant) -> SAE:
        """Starts from the path of an SAE, if it has one, and returns the SAE without it: the inverse of `fold_into`."""
        if sae.W_skip is None:
            return sae
        rest = copy.deepcopy(sae)
        raw = sae.W_skip.to(self.W_skip)
        if raw.shape != self.W_skip.shape:
            raise ConfigError(
                f"model.init_from: its W_skip is {tuple(raw.shape)}, this transcoder's {tuple(self.W_skip.shape)}; "
                "give an SAE of these sites"
            )
        self.W_skip.copy_(raw * variant.target_scale.reshape(-1, 1) / variant.scale)
        rest.b_dec, rest.W_skip = sae.b_dec + (raw @ self.mean).to(sae.b_dec), None
        return rest

    def constrain_(self) -> None:
        """Nothing is constrained; a weight average asks."""

    @torch.no_grad()
    def fold_into(self, sae: SAE, variant: Variant) -> SAE:
        """Gives a folded SAE the path in raw units: `W_skip (x - mean)` is `W_skip x` and a part of the bias."""
        raw = self.W_skip * variant.scale / variant.target_scale.reshape(-1, 1)
        sae.b_dec = sae.b_dec - raw @ self.mean
        sae.W_skip = raw.contiguous()
        return sae
