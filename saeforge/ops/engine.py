"""The sparse step: a dense encoder product, then only gathers over active latents, forward and backward.

Every variant is written with three differentiable functions: `encode` (product, selection, pre-activations of
the active latents), `decode`, and `pick` (a parameter per latent, where it is active). What lies between (ReLU, a gate,
a penalty) is ordinary autograd on vectors of nnz entries. Gradients are exact: outside the support every gradient is
zero [speed 2.6].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saeforge.ops import marks, native, screen, shadow, shards
from saeforge.ops.code import SparseCode
from saeforge.ops.dispatch import choose
from saeforge.ops.native import pool
from saeforge.ops.product import chunks, pre_activations
from saeforge.ops.select import Selected, Selection

#: Bytes of a chunk of pre-activations: stays in a last-level cache, and bounds memory. At least so many rows, below
#: which a product gets slower, unless they take more than so many bytes.
_CHUNK_BYTES, _CHUNK_ROWS, _CHUNK_MOST_BYTES = 1 << 24, 256, 1 << 28
#: A GPU is kept busy by larger ones.
_CUDA_CHUNK_BYTES = 1 << 30


def encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    select: Selection,
    *,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> SparseCode:
    """Pre-activations of the selected latents: `(x - shift) @ weight.T + bias`, differentiable where selected.

    Args:
        x: (B, d_in).
        weight: (d_sae, d_in), one latent per row.
        bias: (d_sae,) or None.
        select: which entries to keep, e.g. `TopK(32)` or `Above(0.0)`.
        shift: (d_in,) subtracted from x first (a pre-encoder bias), or None.
        dtype: compute type of the product; torch.bfloat16 multiplies in bf16 and accumulates in fp32. Values come
            back in the type of `x`. None: the type of `x`.

    Returns:
        A code whose values carry gradients to x, weight, bias and shift.
    """
    return encode_beside(x, weight, bias, select, None, shift=shift, dtype=dtype)[0]


def encode_beside(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    select: Selection,
    latents: Tensor | None,
    *,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[SparseCode, Tensor]:
    """As `encode`, and beside the code all pre-activations of a few latents, as AuxK wants those of dead ones.

    One function for both, since each weight then has one gradient: a second of its size would cost more than what is in
    it.

    Args:
        latents: (n,) different latents, or None for none.

    Returns:
        The code; (B, n) pre-activations, differentiable like its values.
    """
    found: list[SparseCode] = []
    values, pre = _Encode.apply(x, weight, bias, shift, select, latents, dtype, found)
    return found[0].with_values(values), pre


def decode(
    code: SparseCode,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> Tensor:
    """Sum of the active latents' decoder rows: (B, d_out), differentiable in values, weight and bias.

    Args:
        code: values (nnz,) in the type of `weight`.
        weight: (d_sae, d_out), one latent per row.
        bias: (d_out,) or None.
        dtype: torch.bfloat16 reads the rows rounded to bf16 and accumulates in fp32. None: the type of `weight`.
        frozen: no gradient for weight and bias (a stop-gradient).
    """
    if frozen and marks.replaying():
        weight = marks.stop_gradient(weight)
    out = decode_beside(code, weight, None, None, dtype=dtype, frozen=frozen)[0]
    return out if bias is None else out + (marks.stop_gradient(bias) if frozen else bias)


def decode_beside(
    code: SparseCode,
    weight: Tensor,
    latents: Tensor | None,
    values: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `decode` without bias, and beside it the same of a few latents with dense values. See `encode_beside`.

    Args:
        latents: (n,) different latents, or None for none.
        values: (B, n) theirs.

    Returns:
        (B, d_out) of the code; (B, d_out) of the few latents, differentiable in `values` and `weight`.
    """
    code = code.trimmed()
    out, other = _Decode.apply(code.values, weight, code, latents, values, dtype, frozen)
    return out, other


def pick(vector: Tensor, code: SparseCode) -> Tensor:
    """`vector[latent]` for each entry of a code: (nnz,), differentiable in `vector` (d_sae,)."""
    out: Tensor = _Pick.apply(vector, code.indices[: code.nnz])
    return out


def row_norms(weight: Tensor) -> Tensor:
    """Norms (d_sae,) of the rows of a weight, differentiable; at a row of zeros the gradient is 0."""
    out: Tensor = _RowNorms.apply(weight)
    return out


@torch.no_grad()
def select_code(
    x: Tensor, weight: Tensor, bias: Tensor | None, select: Selection, dtype: torch.dtype | None
) -> SparseCode:
    """The forward of `encode` without a graph: product and selection in chunks of rows."""
    dtype, shard = dtype or x.dtype, shards.current()
    k = None if select.k is None else min(select.k, len(weight))
    first = 0 if shard is None else shard.first
    code = None
    while code is None:
        parts = _parts(x, weight, bias, select, dtype)
        counts, values = torch.cat([part[2] for part in parts]), torch.cat([part[0] for part in parts])
        offsets = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        indices = torch.cat([part[1] for part in parts])
        code = select.finish(SparseCode(values.to(x.dtype), indices, offsets, len(weight), k, first=first))
    return code


def _parts(x: Tensor, weight: Tensor, bias: Tensor | None, select: Selection, dtype: torch.dtype) -> list[Selected]:
    """What is selected in each chunk of rows."""
    if dtype == x.dtype and screen.applies(x, weight):
        parts = chunks(x, _chunk_rows(x, weight, torch.bfloat16))
        found = [part for chunk in parts if (part := select.screened(chunk, weight, bias)) is not None]
        if len(found) == len(parts):
            return found
    low, low_bias = _lowered(weight, dtype), None if bias is None else bias.to(dtype)
    parts = chunks(x, _chunk_rows(x, weight, dtype))
    return [select.rows(pre_activations(chunk.to(dtype), low, low_bias)) for chunk in parts]


def _chunk_rows(x: Tensor, weight: Tensor, dtype: torch.dtype) -> int:
    bytes_a_row = weight.shape[0] * dtype.itemsize
    if x.device.type != "cpu":
        return max(1, _CUDA_CHUNK_BYTES // bytes_a_row)
    return max(1, _CHUNK_BYTES // bytes_a_row, min(_CHUNK_ROWS, _CHUNK_MOST_BYTES // bytes_a_row))


def _lowered(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the compute type; its bfloat16 copy is kept until the weight changes."""
    if dtype == torch.bfloat16 and weight.dtype == torch.float32:
        return shadow.of(weight).rounded
    return weight.to(dtype)


def _scatter_outer(code: SparseCode, values: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    ops = choose(code, dtype, values, rows)
    out: Tensor = ops.scatter_outer(code, values, rows.to(dtype) if ops.low_rows else rows)
    return out


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shift: Tensor | None,
        select: Selection,
        latents: Tensor | None,
        dtype: torch.dtype | None,
        found: list[SparseCode],
    ) -> tuple[Tensor, Tensor]:
        shifted = x if shift is None else x - shift
        code = select_code(shifted, weight, bias, select, dtype).trimmed()
        ctx.save_for_backward(shifted, weight)
        # Detached: the output would hold the graph and the graph the output, a cycle that keeps every step's buffers
        # alive until Python's collector happens to run. The caller's code shares the cache: one sort serves all.
        ctx.code = code.with_values(code.values.detach())
        found.append(ctx.code)
        ctx.latents, ctx.dtype, ctx.shard = latents, dtype or x.dtype, shards.current()
        if latents is None:
            return code.values, x.new_empty(len(x), 0)
        rows = weight[latents].to(ctx.dtype)
        few = None if bias is None else bias[latents].to(ctx.dtype)
        return code.values, F.linear(shifted.to(ctx.dtype), rows, few).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_pre = grads[0].contiguous(), grads[1]
        shifted, weight = ctx.saved_tensors
        code: SparseCode = ctx.code
        need_x, need_weight, need_bias, need_shift = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_bias = grad_shift = None
        if need_weight:
            grad_weight = _scatter_outer(code, grad, shifted, ctx.dtype)
            if ctx.latents is not None:
                grad_weight.index_add_(0, ctx.latents, _product(grad_pre.T, shifted, ctx.dtype))
        if need_bias or need_shift:
            grad_bias = _sum_by_latent(grad, code.indices, code.d_sae)
            if ctx.latents is not None:
                grad_bias.index_add_(0, ctx.latents, grad_pre.sum(0))
        if need_shift and grad_bias is not None:
            # d/d shift = -sum_b dx_b = -(sum_b dvalue_b) @ weight: one mat-vec instead of a gather pass [speed 1.3].
            fp32 = grad_bias.dtype == weight.dtype == torch.float32 and native.takes(grad_bias, weight)
            grad_shift = -(native.row_sum(grad_bias, weight) if fp32 else grad_bias @ weight)
        if need_x:
            grad_x = choose(code, weight.dtype, grad, weight).gather_sum(code, grad, weight)
            if ctx.latents is not None:
                grad_x = grad_x + _product(grad_pre, weight[ctx.latents], ctx.dtype)
        if ctx.shard is not None:  # the other ranks' latents read the same rows
            grad_shift = None if grad_shift is None else ctx.shard.group.sum(grad_shift)
            grad_x = None if grad_x is None else ctx.shard.group.sum(grad_x)
        return grad_x, grad_weight, grad_bias if need_bias else None, grad_shift, None, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        code: SparseCode,
        latents: Tensor | None,
        others: Tensor | None,
        dtype: torch.dtype | None,
        frozen: bool,
    ) -> tuple[Tensor, Tensor]:
        table = _lowered(weight, dtype or weight.dtype)
        ops = choose(code, table.dtype, values, table)
        table = table if ops.mixed else weight
        # The weight itself for autograd's check that it has not changed since.
        ctx.save_for_backward(values, table, weight, others)
        ctx.code, ctx.latents, ctx.dtype, ctx.frozen = code, latents, dtype or weight.dtype, frozen
        out: Tensor = ops.gather_sum(code, values, table)
        other = out.new_empty(0) if latents is None or others is None else _product(others, weight[latents], ctx.dtype)
        shard = shards.current()
        if shard is not None:  # of backward nothing: the gradient of the sum is the same on all ranks
            wire = torch.bfloat16 if ctx.dtype == torch.bfloat16 else None
            out = shards.summed(out, shard.group, wire)
            other = shards.summed(other, shard.group, wire) if other.ndim > 1 else other
        return out, other

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_other = grads[0].contiguous(), grads[1]
        values, table, weight, others = ctx.saved_tensors
        code: SparseCode = ctx.code
        grad_values = grad_weight = grad_others = None
        if ctx.needs_input_grad[0]:
            grad_values = choose(code, table.dtype, grad, table).row_dots(code, grad, table)
        if ctx.needs_input_grad[1] and not ctx.frozen:
            grad_weight = _scatter_outer(code, values, grad, ctx.dtype)
            if others is not None:
                grad_weight.index_add_(0, ctx.latents, _product(others.T, grad_other, ctx.dtype))
        if others is not None and ctx.needs_input_grad[4]:
            grad_others = _product(grad_other, weight[ctx.latents].T, ctx.dtype)
        return grad_values, grad_weight, None, None, grad_others, None, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in the compute type, in the type of `a`."""
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.n = len(vector)
        return vector[indices]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return _sum_by_latent(grads[0].contiguous(), indices, ctx.n), None


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        norms: Tensor = weight.norm(dim=1)
        ctx.save_for_backward(weight, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        weight, norms = ctx.saved_tensors
        factor = torch.where(norms > 0, grads[0] / norms, 0.0)[:, None]
        out: Tensor = pool.empty(*weight.shape) if native.takes(weight) else torch.empty_like(weight)
        return torch.mul(weight, factor, out=out)


def _sum_by_latent(entries: Tensor, indices: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=entries.dtype, device=entries.device).index_add_(0, indices, entries)
