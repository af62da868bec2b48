"""The three products of a sparse step over dense matrices: the reference, and the faster way for dense codes.

    gather_sum    out[b]  = sum_j values[b, j] * table[indices[b, j]]              decode
    row_dots      out[bj] = <rows[b], table[indices[b, j]]>                        gradient of the values
    scatter_outer out[i]  = sum_{(b, j): indices[b, j] = i} values[b, j] * rows[b]  gradient of a weight

They multiply (chunk, d_sae) matrices in the type of the table, and give results in the type of the values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saeforge.ops import native
from saeforge.ops.code import SparseCode

name = "dense"
#: Tables may be in a lower precision than the values.
mixed = True
#: Rows are better read in the compute type, too.
low_rows = True

_CHUNK_ELEMENTS = 1 << 24


class _Chunk:
    """Some rows of a code: its entries `part`, and where they go in a dense matrix."""

    def __init__(self, code: SparseCode, start: int, stop: int, first: int, last: int) -> None:
        self.start, self.stop, self.part, self.d_sae = start, stop, slice(first, last), code.d_sae
        self.columns = code.indices[self.part]
        self._code = code

    def _offsets(self) -> Tensor:
        return self._code.offsets[self.start : self.stop + 1] - self.part.start

    def _rows(self) -> Tensor:
        return self._code.rows()[self.part] - self.start

    def matrix(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(rows, d_sae) with the entries' values."""
        if values.dtype == torch.float32 and native.takes(values, torch.empty(0, dtype=dtype)):
            matrix = torch.empty(self.stop - self.start, self.d_sae, dtype=dtype)
            native.spread(self.columns, self._offsets(), values[self.part], matrix)
            return matrix
        matrix = torch.zeros(self.stop - self.start, self.d_sae, dtype=dtype, device=values.device)
        matrix[self._rows(), self.columns] = values[self.part].to(dtype)
        return matrix

    def collect(self, matrix: Tensor) -> Tensor:
        """The entries' values out of a (rows, d_sae) matrix."""
        if native.takes(matrix):
            return native.collect(self.columns, self._offsets(), matrix)
        return matrix[self._rows(), self.columns]


def _chunks(code: SparseCode) -> Iterator[_Chunk]:
    step = max(1, _CHUNK_ELEMENTS // code.d_sae)
    bounds = [*range(0, code.n_rows, step), code.n_rows]
    entries = [at * code.k for at in bounds] if code.k is not None else code.offsets[bounds].tolist()
    for start, stop, first, last in zip(bounds, bounds[1:], entries, entries[1:], strict=False):
        yield _Chunk(code, start, stop, first, last)


def gather_sum(code: SparseCode, values: Tensor, table: Tensor) -> Tensor:
    """(B, d): see the head of this file. values (nnz,), table (d_sae, d)."""
    out = torch.empty(code.n_rows, table.shape[1], dtype=values.dtype, device=values.device)
    for chunk in _chunks(code):
        out[chunk.start : chunk.stop] = chunk.matrix(values, table.dtype) @ table
    return out


def row_dots(code: SparseCode, rows: Tensor, table: Tensor) -> Tensor:
    """(nnz,): see the head of this file. rows (B, d), table (d_sae, d)."""
    out = torch.empty(code.nnz, dtype=rows.dtype, device=rows.device)
    for chunk in _chunks(code):
        out[chunk.part] = chunk.collect(rows[chunk.start : chunk.stop].to(table.dtype) @ table.T).to(out.dtype)
    return out


def scatter_outer(code: SparseCode, values: Tensor, rows: Tensor) -> Tensor:
    """(d_sae, d): see the head of this file. values (nnz,), rows (B, d)."""
    out = torch.zeros(code.d_sae, rows.shape[1], dtype=values.dtype, device=values.device)
    for chunk in _chunks(code):
        matrix, part = chunk.matrix(values, rows.dtype), rows[chunk.start : chunk.stop]
        if rows.dtype == out.dtype:
            out.addmm_(matrix.T, part)
        else:
            out += matrix.T @ part
    return out
