"""Kernels in Triton, for GPUs: the products of a sparse step, selection, and RowAdam's passes.

Imported only through `saeforge.ops.gpu`. With TRITON_INTERPRET=1 they run on CPU tensors, which is how the tests check
them where there is no GPU. No kernel sums with atomics: the same input gives the same bits, every time.
"""

from saeforge.ops.triton_kernels.adam import LONGEST_ROW, programs, row_adam, row_norms, scalars
from saeforge.ops.triton_kernels.products import gather_sum, row_dots, scatter_outer
from saeforge.ops.triton_kernels.selection import LARGEST_K, above, top_k

__all__ = [
    "LARGEST_K",
    "LONGEST_ROW",
    "above",
    "gather_sum",
    "low_rows",
    "mixed",
    "name",
    "programs",
    "row_adam",
    "row_dots",
    "row_norms",
    "scalars",
    "scatter_outer",
    "top_k",
]

name = "triton"
#: Tables may be in bfloat16; values and results are fp32.
mixed = True
#: Rows are read in the compute type: gathers are bound by memory.
low_rows = True
