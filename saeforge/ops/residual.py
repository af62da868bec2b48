"""What a reconstruction leaves of its target: the error and its square, in one pass forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saeforge.ops import native


def residual(target: Tensor, rebuilt: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The error of `rebuilt + bias`, without a gradient, and its squared norm by row.

    As separate operations it would be ten passes over (B, d) matrices, which take longer than the decoding at small d.

    Args:
        target: (B, d).
        rebuilt: (B, d), what `decode` gives without its bias.
        bias: (d,).

    Returns:
        (B, d) `target - (rebuilt + bias)`; (B,) its squared norms, differentiable in all three.
    """
    if all(tensor.dtype == torch.float32 for tensor in (target, rebuilt, bias)) and native.takes(target, rebuilt, bias):
        error, squares = _Residual.apply(target, rebuilt, bias)
        return error, squares
    error = target - (rebuilt + bias)
    return error.detach(), error.square().sum(1)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: Tensor, rebuilt: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        error, squares = native.residual(target, rebuilt, bias)
        ctx.save_for_backward(error)
        ctx.mark_non_differentiable(error)
        return error, squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = ctx.saved_tensors
        grad, sums = native.residual_grad(error, grads[1])
        needs = ctx.needs_input_grad
        return -grad if needs[0] else None, grad if needs[1] else None, sums if needs[2] else None
