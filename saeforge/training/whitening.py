"""`Whitening`: the variant learns on decorrelated activations, and the saved SAE reads raw ones all the same.

With the mean m and covariance C of the training rows, C_s = (1 - s) C + s (tr C / d) I is C shrunk by a share s
towards a multiple of the identity (Ledoit and Wolf 2004), and x' = W (x - m) with W = C_s^(-1/2) (ZCA: x' stays as near
to x as it can) or L^(-1/2) U^T from C_s = U L U^T (PCA: the axes are the components, largest first). Both give the same
loss, the Mahalanobis distance (x - x_hat)^T C_s^(-1) (x - x_hat), in which no direction outweighs another because it
varies more. The map is linear, so it folds into the SAE exactly: W_enc = W_enc' W, b_enc = b_enc' - W_enc m,
W_dec = W_dec' W^(-T), b_dec = W^(-1) b_dec' + m.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from saeforge.data.batch import Batch
from saeforge.data.moments import Moments, Statistics
from saeforge.errors import ConfigError, SaeforgeError
from saeforge.sae import SAE
from saeforge.variants import DataStatistics, OwnEncoder, Variant

Kind = Literal["zca", "pca"]
DEFAULT_SHRINKAGE = 0.01


class Whitening(nn.Module):
    """The map of one SAE's input, and of its target where that is the input.

    Args:
        variant: which is given whitened rows.
        kind: "zca" or "pca".
        shrinkage: s above, in (0, 1].

    Raises:
        ConfigError: unknown kind, shrinkage out of range, or a variant that does not fold.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, variant: Variant, kind: Kind, shrinkage: float) -> None:
        super().__init__()
        if kind not in ("zca", "pca"):
            raise ConfigError(f"model.whitening = {kind!r}: expected zca, pca or null")
        if not 0 < shrinkage <= 1:
            raise ConfigError(f"model.whitening_shrinkage = {shrinkage}: expected a share in (0, 1]")
        if isinstance(variant, OwnEncoder):
            raise ConfigError(
                f"model.whitening: {type(variant).__name__} does not fold, so the map cannot; leave it out"
            )
        self.kind, self.shrinkage = kind, shrinkage
        self.target_too = True
        self.register_buffer("mean", torch.zeros(variant.d_in))
        self.register_buffer("matrix", torch.eye(variant.d_in))

    @torch.no_grad()
    def fit(self, statistics: DataStatistics, x: Tensor, target: Tensor) -> tuple[DataStatistics, Batch]:
        """Sets the map from a sample of the training rows, on the CPU in float64: the same on every rank.

        Args:
            statistics: of all training rows, raw.
            x: (n, d_in) raw rows. target: (n, d_out), the same tensor as `x` for an SAE.

        Returns:
            The statistics of the whitened sample, and the whitened sample: what the variant is initialised with.

        Raises:
            ConfigError: several sites side by side, or rows that do not vary.
        """
        if len(statistics.input_sources) > 1:
            raise ConfigError("model.whitening would mix several sites side by side; leave it out")
        rows = x.cpu().double()
        d = rows.shape[1]
        centred = rows - rows.mean(0)
        covariance = centred.T @ centred / len(rows)
        spread = covariance.diagonal().mean()
        if not spread > 0:
            raise ConfigError("model.whitening: the activations do not vary; check the harvested site")
        shrunk = (1 - self.shrinkage) * covariance
        shrunk.diagonal().add_(self.shrinkage * spread)
        values, vectors = torch.linalg.eigh(shrunk)
        values, vectors = values.flip(0), vectors.flip(1)
        # The sign of an eigenvector is LAPACK's choice: the largest entry is made positive.
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        matrix = (vectors / values.sqrt()).T
        self.mean.copy_(torch.tensor(statistics.input.mean))
        self.matrix.copy_(vectors @ matrix if self.kind == "zca" else matrix)
        self.target_too = target is x
        if self.mean.shape != (d,):
            raise SaeforgeError(f"rows are {d} wide, the statistics {len(statistics.input.mean)}")
        batch = self(Batch(x, target))
        of_input = _statistics(batch.x)
        of_target = of_input if self.target_too else statistics.target
        return DataStatistics(of_input, of_target, (of_input,), (of_target,)), batch

    def forward(self, batch: Batch) -> Batch:
        """The batch with x' = W (x - m), in fp32; `target` is the same tensor where it was."""
        x = (batch.x.to(self.matrix.dtype) - self.mean) @ self.matrix.T
        return batch._replace(x=x, target=x if batch.target is batch.x else batch.target)

    @torch.no_grad()
    def fold(self, sae: SAE) -> SAE:
        """The SAE on raw activations, from one on whitened ones; under a threshold rule decoder rows have norm 1."""
        W, mean = self.matrix.double(), self.mean.double()
        return _mapped(sae, W, mean, torch.linalg.inv(W) if self.target_too else None)

    @torch.no_grad()
    def unfold(self, sae: SAE) -> SAE:
        """The inverse of `fold`: an SAE on whitened activations, from one on raw ones."""
        W, mean = self.matrix.double(), self.mean.double()
        inverse = torch.linalg.inv(W)
        # x = W^-1 x' + m = W^-1 (x' - (-W m)): the same form with the roles exchanged.
        return _mapped(sae, inverse, -(W @ mean), W if self.target_too else None)


def _mapped(sae: SAE, W: Tensor, mean: Tensor, back: Tensor | None) -> SAE:
    """An SAE for rows x, from one for W (x - mean); its output becomes back @ out + mean, or stays without `back`."""
    W_enc = sae.W_enc.double() @ W
    b_enc = sae.b_enc.double() - W_enc @ mean
    W_dec, b_dec = sae.W_dec.double(), sae.b_dec.double()
    skip = None if sae.W_skip is None else sae.W_skip.double() @ W
    if skip is not None:
        b_dec = b_dec - skip @ mean
    threshold = None if sae.threshold is None else sae.threshold.double()
    if back is not None:
        W_dec, b_dec = W_dec @ back.T, back @ b_dec + mean
        skip = None if skip is None else back @ skip
    if threshold is not None:
        norms = W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1.0)
        W_enc, b_enc, threshold, W_dec = (
            W_enc * norms[:, None],
            b_enc * norms,
            threshold * norms,
            W_dec / norms[:, None],
        )
    dtype = sae.W_dec.dtype
    return SAE(
        W_enc.to(dtype),
        b_enc.to(dtype),
        W_dec.to(dtype),
        b_dec.to(dtype),
        rule=sae.rule,
        k=sae.k,
        threshold=None if threshold is None else threshold.to(dtype),
        W_skip=None if skip is None else skip.to(dtype),
        meta=sae.meta,
    )


def _statistics(rows: Tensor) -> Statistics:
    return Moments.of(np.ascontiguousarray(rows.cpu().float().numpy())).statistics()
