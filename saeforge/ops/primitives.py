"""The three products of a sparse step, dense and sparse.

    gather_sum    out[b]  = sum_j values[b, j] * table[indices[b, j]]              decode
    row_dots      out[bj] = <rows[b], table[indices[b, j]]>                        gradient of the values
    scatter_outer out[i]  = sum_{(b, j): indices[b, j] = i} values[b, j] * rows[b]  gradient of a weight

`dense` forms (chunk, d_sae) matrices and multiplies; `bag` gathers only the active rows through embedding_bag, whose
sums run in a fixed order. Both give the same numbers up to rounding. Which one is faster depends on the density alone.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops.code import SparseCode

#: Share of active latents above which dense products win. On CPU a dense multiply-add costs about 1/20 of a gathered
#: one (2 * peak / bandwidth = 15 to 30 [speed 2.5]); on an H200 1/184 of it [speed 0.4].
_BREAK_EVEN = {"cpu": 1 / 20, "cuda": 1 / 184}
_CHUNK_ELEMENTS = 1 << 24


def choose(code: SparseCode) -> SimpleNamespace:
    """The faster implementation for this code: `dense` or `bag`; SAEFORGE_OPS=reference|sparse overrides."""
    wish = os.environ.get("SAEFORGE_OPS", "auto")
    if wish not in ("auto", "reference", "sparse"):
        raise ConfigError(f"SAEFORGE_OPS={wish}: expected auto, reference or sparse; unset it for the default")
    if wish != "auto":
        return dense if wish == "reference" else bag
    break_even = _BREAK_EVEN.get(code.indices.device.type, 1 / 20)
    return dense if code.nnz > break_even * code.n_rows * code.d_sae else bag


def _chunks(code: SparseCode) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // code.d_sae)
    return [(start, min(start + step, code.n_rows)) for start in range(0, code.n_rows, step)]


def _dense_rows(code: SparseCode, values: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, slice]:
    bounds = code.offsets[[start, stop]].tolist()
    part = slice(bounds[0], bounds[1])
    rows, columns = code.rows()[part] - start, code.indices[part]
    matrix = values.new_zeros(stop - start, code.d_sae)
    matrix[rows, columns] = values[part]
    return matrix, rows, columns, part


def _dense_gather_sum(code: SparseCode, values: Tensor, table: Tensor) -> Tensor:
    out = table.new_empty(code.n_rows, table.shape[1])
    for start, stop in _chunks(code):
        torch.mm(_dense_rows(code, values, start, stop)[0], table, out=out[start:stop])
    return out


def _dense_row_dots(code: SparseCode, rows: Tensor, table: Tensor) -> Tensor:
    out = rows.new_empty(code.nnz)
    for start, stop in _chunks(code):
        _, chunk_rows, columns, part = _dense_rows(code, out, start, stop)
        out[part] = (rows[start:stop] @ table.T)[chunk_rows, columns]
    return out


def _dense_scatter_outer(code: SparseCode, values: Tensor, rows: Tensor) -> Tensor:
    out = rows.new_zeros(code.d_sae, rows.shape[1])
    for start, stop in _chunks(code):
        out.addmm_(_dense_rows(code, values, start, stop)[0].T, rows[start:stop])
    return out


def _bag_gather_sum(code: SparseCode, values: Tensor, table: Tensor) -> Tensor:
    return F.embedding_bag(
        code.indices[: code.nnz], table, code.offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def _bag_row_dots(code: SparseCode, rows: Tensor, table: Tensor) -> Tensor:
    # The kernel behind embedding_bag's gradient for per_sample_weights: one dot product an entry, nothing of size
    # (nnz, d) in memory. It has no public name; tests hold it against `dense`.
    kernel = torch.ops.aten._embedding_bag_per_sample_weights_backward
    out: Tensor = kernel(rows.contiguous(), table, code.indices[: code.nnz], code.offsets, code.rows(), 0)
    return out


def _bag_scatter_outer(code: SparseCode, values: Tensor, rows: Tensor) -> Tensor:
    order, sorted_rows, offsets = code.by_latent()
    return F.embedding_bag(
        sorted_rows, rows, offsets, mode="sum", per_sample_weights=values[order], include_last_offset=True
    )


dense = SimpleNamespace(
    name="dense", gather_sum=_dense_gather_sum, row_dots=_dense_row_dots, scatter_outer=_dense_scatter_outer
)
bag = SimpleNamespace(name="bag", gather_sum=_bag_gather_sum, row_dots=_bag_row_dots, scatter_outer=_bag_scatter_outer)
