"""The products of a sparse step by the C++ kernels, for the CPU."""

from __future__ import annotations

from torch import Tensor

from saeforge.ops import native
from saeforge.ops.code import SparseCode

name = "native"
#: Tables may be in bfloat16; values, rows and results are fp32.
mixed = True
#: Rows are better read in the compute type, too.
low_rows = False


def gather_sum(code: SparseCode, values: Tensor, table: Tensor) -> Tensor:
    """(B, d): as `dense.gather_sum`."""
    return native.gather_sum(code.indices[: code.nnz], code.offsets, values, table)


def row_dots(code: SparseCode, rows: Tensor, table: Tensor) -> Tensor:
    """(nnz,): as `dense.row_dots`."""
    return native.row_dots(code.indices[: code.nnz], code.offsets, rows, table)


def scatter_outer(code: SparseCode, values: Tensor, rows: Tensor) -> Tensor:
    """(d_sae, d): as `dense.scatter_outer`."""
    return native.scatter_outer(*code.by_latent(), values, rows)
