"""Which latents are active: selections over pre-activations.

Ties at the k-th value go to the lowest latent index, in every implementation: with bf16 pre-activations half of all
rows tie at the boundary, and an order left to the library would differ between devices and layouts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops.code import SparseCode


class Selection(ABC):
    """Chooses the entries of a code from pre-activations, a chunk of rows at a time."""

    #: Entries of every row, when that number is constant.
    k: int | None = None

    @abstractmethod
    def rows(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Selects inside a chunk.

        Args:
            pre: (b, d_sae) pre-activations.

        Returns:
            values (nnz,), indices (nnz,) ascending inside a row, counts (b,) of entries per row.
        """

    def finish(self, code: SparseCode) -> SparseCode:
        """A last choice over the whole batch (batch top-k); the default keeps every candidate."""
        return code


class TopK(Selection):
    """The k largest pre-activations of each row; ties go to the lowest index."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ConfigError(f"k = {k}: top-k needs k of at least 1; set k to the number of active latents per token")
        self.k: int = k

    def rows(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Selection.rows`; every row has exactly k entries."""
        values, indices = top_k(pre, self.k)
        counts = torch.full((pre.shape[0],), self.k, dtype=torch.int64, device=pre.device)
        return values.flatten(), indices.flatten(), counts


class Above(Selection):
    """Every pre-activation strictly greater than a threshold (a number, or one per latent)."""

    def __init__(self, threshold: float | Tensor = 0.0) -> None:
        self.threshold = threshold

    def rows(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Selection.rows`; rows are ragged."""
        threshold = self.threshold.to(pre.dtype) if isinstance(self.threshold, Tensor) else self.threshold
        mask = pre > threshold
        rows, indices = mask.nonzero(as_tuple=True)
        return pre[rows, indices], indices, mask.sum(1)


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties at the boundary to the lowest index, sorted by index.

    Args:
        pre: (B, n).
        k: at most n.

    Returns:
        values (B, k), indices (B, k) int64 ascending.

    Raises:
        ConfigError: if k > n.
    """
    n_rows, n = pre.shape
    if k > n:
        raise ConfigError(f"k = {k} is larger than the {n} latents to choose from; lower k or raise d_sae")
    if k == n:
        indices = torch.arange(n, device=pre.device).expand(n_rows, n)
        return pre, indices
    # One value more than needed: a row is ambiguous only if its k-th and (k+1)-th value are equal.
    values, indices = torch.topk(pre, k + 1, dim=1, sorted=True)
    boundary = values[:, k - 1]
    tied = (boundary == values[:, k]).nonzero(as_tuple=True)[0]
    values, indices = values[:, :k], indices[:, :k]
    if tied.numel():
        indices = indices.clone()
        indices[tied] = _lowest_ties(pre[tied], indices[tied], values[tied], boundary[tied])
    indices = indices.sort(dim=1).values
    return pre.gather(1, indices), indices


def _lowest_ties(pre: Tensor, indices: Tensor, values: Tensor, boundary: Tensor) -> Tensor:
    """Replaces the entries at the boundary value by the lowest indices that have it."""
    n_rows, k = indices.shape
    clear = values > boundary[:, None]  # sorted: a prefix of each row
    need = k - clear.sum(1)
    rows, columns = (pre == boundary[:, None]).nonzero(as_tuple=True)
    per_row = torch.bincount(rows, minlength=n_rows)
    rank = torch.arange(rows.numel(), device=pre.device) - (per_row.cumsum(0) - per_row)[rows]
    keep = rank < need[rows]
    fixed = indices.clone()
    fixed[~clear] = columns[keep]  # both are ordered by row, and each row has exactly `need` of either
    return fixed
