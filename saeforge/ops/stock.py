"""Selection and products from PyTorch's own operations: on every device and in every type.

The products gather only the active rows, through embedding_bag, whose sums run in a fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saeforge.ops.code import SparseCode

name = "stock"
#: embedding_bag wants values and table in one type.
mixed = False
low_rows = False


def gather_sum(code: SparseCode, values: Tensor, table: Tensor) -> Tensor:
    """(B, d): as `dense.gather_sum`."""
    return F.embedding_bag(
        code.indices[: code.nnz], table, code.offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def row_dots(code: SparseCode, rows: Tensor, table: Tensor) -> Tensor:
    """(nnz,): as `dense.row_dots`."""
    # The kernel behind embedding_bag's gradient for per_sample_weights: one dot product an entry, nothing of size
    # (nnz, d) in memory. It has no public name; tests hold it against `dense`.
    kernel = torch.ops.aten._embedding_bag_per_sample_weights_backward
    out: Tensor = kernel(rows.contiguous(), table, code.indices[: code.nnz], code.offsets, code.rows(), 0)
    return out


def scatter_outer(code: SparseCode, values: Tensor, rows: Tensor) -> Tensor:
    """(d_sae, d): as `dense.scatter_outer`."""
    order, sorted_rows, offsets = code.by_latent()
    return F.embedding_bag(
        sorted_rows, rows, offsets, mode="sum", per_sample_weights=values[order], include_last_offset=True
    )


def above(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values (nnz,), indices (nnz,), counts (B,) of the entries above the threshold, (1,) or one a latent; NaN is."""
    mask = ~(pre <= threshold)
    rows, indices = mask.nonzero(as_tuple=True)
    return pre[rows, indices], indices, mask.sum(1)


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """values (B, k), indices (B, k) ascending: the k < n largest of each row of (B, n), ties to the lowest index."""
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
