"""Decoder norms by source: the weights of a crosscoder's sparsity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saeforge.ops import BatchTopK, SparseCode


class _SourceNorms(torch.autograd.Function):
    """One gradient of the weight's size for all sources; autograd over slices would make one for each."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, widths: tuple[int, ...]) -> Tensor:
        norms = torch.stack([part.norm(dim=1) for part in weight.split(widths, dim=1)], dim=1)
        ctx.save_for_backward(weight, norms)
        ctx.widths = widths
        return norms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        weight, norms = ctx.saved_tensors
        factor = torch.where(norms > 0, grads[0] / norms, 0.0)  # at a row of zeros the gradient is 0
        out = torch.empty_like(weight)
        parts = zip(weight.split(ctx.widths, dim=1), out.split(ctx.widths, dim=1), strict=True)
        for source, (part, place) in enumerate(parts):
            torch.mul(part, factor[:, source : source + 1], out=place)
        return out, None


def norms_by_source(weight: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Norms of each latent's decoder in each source, differentiable.

    Args:
        weight: (d_sae, sum of widths). widths: of the sources.

    Returns:
        (d_sae, number of sources).
    """
    norms: Tensor = _SourceNorms.apply(weight, widths)
    return norms


class WeightedBatchTopK(BatchTopK):
    """The `k * B` entries of a batch with the largest pre-activation times weight; values stay unweighted.

    Minder et al. 2025 (arXiv 2504.02922): what a latent adds over all sources, `f_i sum_s |w_dec_i^s|`, competes, so
    that nothing is gained by a short encoder row and a long decoder row, or the reverse.

    Args:
        k: mean number of entries of a row.
    """

    def __init__(self, k: float) -> None:
        super().__init__(k)
        self._weights = torch.ones(1)
        self._scaled: tuple[Tensor, Tensor | None] | None = None

    @property
    def weights(self) -> Tensor:
        """(d_sae,) of this step."""
        return self._weights

    def weigh_by(self, weights: Tensor) -> WeightedBatchTopK:
        """The same with these weights, (d_sae,), positive; for one step."""
        self._weights, self._scaled = weights, None
        return self

    def rows(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Selection.rows`: the offers, weighted until `finish`."""
        return super().rows(pre.to(self._weights.dtype) * self._weights)

    def screened(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `Selection.screened`; the weights go into the encoder's rows, once for all chunks of a step."""
        if self._scaled is None:
            scaled = weight * self._weights[:, None]
            self._scaled = scaled, None if bias is None else bias * self._weights
        return super().screened(x, *self._scaled)

    def finish(self, code: SparseCode) -> SparseCode | None:
        """See `BatchTopK.finish`."""
        chosen = super().finish(code)
        if chosen is None:
            return None
        self._scaled = None
        return chosen.with_values(chosen.values / self._weights[chosen.indices])
