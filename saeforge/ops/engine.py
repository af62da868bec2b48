"""The sparse step: a dense encoder product, then only gathers over active latents, forward and backward.

Every variant is written with two differentiable functions: `encode` (product, selection, pre-activations of the
active latents) and `decode`. What lies between them (ReLU, a gate, a penalty) is ordinary autograd on vectors of nnz
entries. Gradients are exact: outside the support every variant's gradient is zero [speed 2.6].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saeforge.ops.code import SparseCode
from saeforge.ops.primitives import choose
from saeforge.ops.select import Selection

#: Elements of a chunk of pre-activations: 32 MB in fp32 stays in a last-level cache and bounds memory.
_CHUNK_ELEMENTS = 1 << 23


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
    cache: dict[str, tuple[Tensor, ...]] = {}
    values, indices, offsets = _Encode.apply(x, weight, bias, shift, select, dtype, cache)
    return SparseCode(values, indices, offsets, weight.shape[0], select.k, cache)


def decode(code: SparseCode, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum of the active latents' decoder rows: (B, d_out), differentiable in values, weight and bias.

    Args:
        code: values (nnz,) in the type of `weight`.
        weight: (d_sae, d_out), one latent per row.
        bias: (d_out,) or None.
    """
    code = code.trimmed()
    out: Tensor = _Decode.apply(code.values, weight, code)
    return out if bias is None else out + bias


def dense_pre(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """(B, d_sae) pre-activations in the compute type, without gradient."""
    dtype = dtype or x.dtype
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


@torch.no_grad()
def select_code(
    x: Tensor, weight: Tensor, bias: Tensor | None, select: Selection, dtype: torch.dtype | None
) -> SparseCode:
    """The forward of `encode` without a graph: product and selection in chunks of rows."""
    step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    dtype = dtype or x.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    parts = [select.rows(F.linear(chunk.to(dtype), weight, bias)) for chunk in x.split(step)]
    if not parts:
        parts = [select.rows(x.new_empty(0, weight.shape[0]))]
    offsets = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(torch.cat([p[2] for p in parts]), 0, out=offsets[1:])
    values = torch.cat([p[0] for p in parts]).to(x.dtype)
    code = SparseCode(values, torch.cat([p[1] for p in parts]), offsets, weight.shape[0], select.k)
    return select.finish(code)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shift: Tensor | None,
        select: Selection,
        dtype: torch.dtype | None,
        cache: dict[str, tuple[Tensor, ...]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        shifted = x if shift is None else x - shift
        code = select_code(shifted, weight, bias, select, dtype).trimmed()
        ctx.save_for_backward(shifted, weight)
        # Detached: the output would hold the graph and the graph the output, a cycle that keeps every step's buffers
        # alive until Python's collector happens to run. The cache is the caller's, so that one sort serves all.
        cache.update(code._cache)
        ctx.code = SparseCode(code.values.detach(), code.indices, code.offsets, code.d_sae, code.k, cache)
        ctx.mark_non_differentiable(code.indices, code.offsets)
        return code.values, code.indices, code.offsets

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        shifted, weight = ctx.saved_tensors
        code: SparseCode = ctx.code
        need_x, need_weight, need_bias, need_shift = ctx.needs_input_grad[:4]
        ops = choose(code)
        grad_x = grad_weight = grad_bias = grad_shift = None
        if need_weight:
            grad_weight = ops.scatter_outer(code, grad, shifted)
        if need_bias or need_shift:
            grad_bias = torch.zeros(code.d_sae, dtype=grad.dtype, device=grad.device)
            grad_bias.index_add_(0, code.indices, grad)
        if need_shift and grad_bias is not None:
            # d/d shift = -sum_b dx_b = -(sum_b dvalue_b) @ weight: one mat-vec instead of a gather pass [speed 1.3].
            grad_shift = -(grad_bias @ weight)
        if need_x:
            grad_x = ops.gather_sum(code, grad, weight)
        return grad_x, grad_weight, grad_bias if need_bias else None, grad_shift, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, code: SparseCode) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.code = code
        out: Tensor = choose(code).gather_sum(code, values, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        values, weight = ctx.saved_tensors
        code: SparseCode = ctx.code
        ops = choose(code)
        grad_values = ops.row_dots(code, grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = ops.scatter_outer(code, values, grad) if ctx.needs_input_grad[1] else None
        return grad_values, grad_weight, None
