"""The products of a sparse step in Triton: decode, gradients of the values, gradients of a weight.

Each kernel cuts the columns of its table into slices, and works through all rows of one slice before the next (the
first axis of a grid runs fastest): a slice of a decoder of 65,536 latents fits in a GPU's second cache, where the
whole of it does not, so most gathers are served from there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saeforge.ops.code import SparseCode

#: Columns of a slice, and entries whose rows are fetched at a time.
COLUMNS, AT_ONCE = 256, 8
#: Columns of a slice of `row_dots`, whose sum over columns costs more the more slices there are; and entries likewise.
DOT_COLUMNS, DOT_AT_ONCE = 512, 4
#: Entries of a block: a latent that is active in thousands of rows is summed by blocks, in many programs.
BLOCK_ENTRIES = 512


@triton.jit
def _add_rows(total, start, stop, indices, values, table, d, columns, inside, AT_ONCE: tl.constexpr):
    """total + sum of values[p] * table[indices[p], columns] over entries start..stop-1, one by one in their order."""
    for first in range(start, stop, AT_ONCE):
        for step in tl.static_range(AT_ONCE):  # unrolled: the loads of all of them are under way together
            there = first + step < stop
            index = tl.load(indices + first + step, mask=there, other=0)
            value = tl.load(values + first + step, mask=there, other=0.0)
            row = tl.load(table + index * d + columns, mask=inside & there, other=0.0)
            total += value * row.to(tl.float32)
    return total


@triton.jit
def _gather_sum(indices, offsets, values, table, out, d, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    start, stop = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    total = _add_rows(total, start, stop, indices, values, table, d, columns, inside, AT_ONCE)
    tl.store(out + row * d + columns, total, mask=inside)


@triton.jit
def _whole_blocks(
    latents, order, rows, values, table, parts, d, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    """The sums of those blocks of BLOCK sorted entries that belong to one latent; other blocks are left alone."""
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCK
    stop = start + BLOCK
    first = tl.load(latents + tl.load(order + start))
    if first == tl.load(latents + tl.load(order + stop - 1)):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < d
        total = tl.zeros([COLUMNS], tl.float32)
        total = _add_rows(total, start, stop, rows, values, table, d, columns, inside, AT_ONCE)
        tl.store(parts + block * d + columns, total, mask=inside)


@triton.jit
def _scatter_outer(
    rows, offsets, values, table, parts, out, d, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    start, stop = tl.load(offsets + latent), tl.load(offsets + latent + 1)
    low, high = (start + BLOCK - 1) // BLOCK, stop // BLOCK  # the whole blocks inside
    head, tail = stop, stop
    if low < high:
        head, tail = low * BLOCK, high * BLOCK
    total = tl.zeros([COLUMNS], tl.float32)
    total = _add_rows(total, start, head, rows, values, table, d, columns, inside, AT_ONCE)
    for block in range(low, high):
        total += tl.load(parts + block * d + columns, mask=inside, other=0.0)
    total = _add_rows(total, tail, stop, rows, values, table, d, columns, inside, AT_ONCE)
    tl.store(out + latent * d + columns, total, mask=inside)


@triton.jit(do_not_specialize=["nnz"])
def _row_dots(indices, offsets, rows, table, out, nnz, d, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):
    """out[slice, p]: the part of entry p's dot product in this slice of columns."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    start, stop = tl.load(offsets + row), tl.load(offsets + row + 1)
    mine = tl.load(rows + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    for first in range(start, stop, AT_ONCE):
        entries = first + tl.arange(0, AT_ONCE)
        there = entries < stop
        index = tl.load(indices + entries, mask=there, other=0)
        mask = there[:, None] & inside[None, :]
        others = tl.load(table + index[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + part * nnz + entries, tl.sum(others * mine[None, :], axis=1), mask=there)


def _fit(columns: int, d: int) -> int:
    return min(columns, int(triton.next_power_of_2(d)))


def _warps(columns: int, dtype: torch.dtype) -> int:
    """So many that a thread loads 16 bytes at a time."""
    return max(1, min(8, columns * dtype.itemsize // 512))


def _float(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name}: expected float32, got {tensor.dtype}")
    return tensor.detach().contiguous()


def _table(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name}: expected float32 or bfloat16, got {tensor.dtype}")
    return tensor.detach().contiguous()


def gather_sum(code: SparseCode, values: Tensor, table: Tensor) -> Tensor:
    """(B, d): as `dense.gather_sum`, each row's entries one by one in their order."""
    values, table = _float(values, "values"), _table(table, "table")
    d, columns = table.shape[1], _fit(COLUMNS, table.shape[1])
    out = torch.empty(code.n_rows, d, device=values.device)
    grid, sizes = (code.n_rows, triton.cdiv(d, columns)), (d, columns, AT_ONCE)
    with torch.cuda.device_of(values):
        if out.numel():
            _gather_sum[grid](
                code.indices, code.offsets, values, table, out, *sizes, num_warps=_warps(columns, table.dtype)
            )
    return out


def row_dots(code: SparseCode, rows: Tensor, table: Tensor) -> Tensor:
    """(nnz,): as `dense.row_dots`, by slices of columns which are added at the end."""
    rows, table = _table(rows, "rows"), _table(table, "table")
    d, nnz = table.shape[1], code.nnz
    columns = _fit(DOT_COLUMNS, d)
    grid, sizes = (code.n_rows, triton.cdiv(d, columns)), (nnz, d, columns, DOT_AT_ONCE)
    parts = torch.empty(grid[1], nnz, device=rows.device)
    with torch.cuda.device_of(rows):
        if parts.numel():
            # One warp, so that a sum over columns stays inside it.
            _row_dots[grid](code.indices, code.offsets, rows, table, parts, *sizes, num_warps=1)
    return parts[0] if len(parts) == 1 else parts.sum(0)


def scatter_outer(code: SparseCode, values: Tensor, rows: Tensor) -> Tensor:
    """(d_sae, d): as `dense.scatter_outer`, every row written, those of silent latents with zeros."""
    values, rows = _float(values, "values"), _table(rows, "rows")
    order, sorted_rows, offsets = code.by_latent()
    d, blocks = rows.shape[1], code.nnz // BLOCK_ENTRIES
    columns = _fit(COLUMNS, d)
    slices, warps, sizes = triton.cdiv(d, columns), _warps(columns, rows.dtype), (d, columns, AT_ONCE, BLOCK_ENTRIES)
    out = torch.empty(code.d_sae, d, device=values.device)
    parts = torch.empty(blocks, d, device=values.device)
    ordered = values[order]
    with torch.cuda.device_of(values):
        if parts.numel():
            _whole_blocks[(blocks, slices)](
                code.indices, order, sorted_rows, ordered, rows, parts, *sizes, num_warps=warps
            )
        if out.numel():
            _scatter_outer[(code.d_sae, slices)](
                sorted_rows, offsets, ordered, rows, parts, out, *sizes, num_warps=warps
            )
    return out
