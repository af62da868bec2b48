"""RowAdam's passes in Triton: norms of gradients, the scalars of a step, and one pass over rows for all the rest.

Nothing is read on the host: the step count, the clip and the bias corrections are numbers on the device. Where rows
matter (projection, renormalisation) one program holds a whole row in registers; free parameters are cut as it suits.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Longest row that one program holds.
LONGEST_ROW = 1 << 14
#: Elements of a program where rows do not matter.
_FLAT = 1024


@triton.jit
def _row_norms(grad, rows, squares, dots, d, size, CONSTRAINED: tl.constexpr, WIDTH: tl.constexpr):
    """squares[i] = |g|^2 of row i after projection; dots[i] = <g, p> of constrained rows (p has norm 1)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    at = row * d + columns
    inside = (columns < d) & (at < size)
    g = tl.load(grad + at, mask=inside, other=0.0)
    if CONSTRAINED:
        p = tl.load(rows + at, mask=inside, other=0.0)
        dot = tl.sum(g * p, axis=0)
        tl.store(dots + row, dot)
        g = g - dot * p
    tl.store(squares + row, tl.sum(g * g, axis=0))


@triton.jit
def _log(high, low):
    return tl.full([], 0.0, tl.float64) + high + low


@triton.jit
def _scalars(step, total, out, lr, high1, low1, high2, low2, most, CLIP: tl.constexpr, LR_THERE: tl.constexpr):
    """Counts a step; out = clip, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t). high + low is the logarithm of a beta."""
    count = tl.load(step) + 1
    tl.store(step, count)
    clip = tl.full([], 1.0, tl.float64)
    if CLIP:
        # As torch.nn.utils.clip_grad_norm_; a norm that is NaN must not become a clip of 1.
        found = most / (tl.sqrt(tl.load(total)) + 1e-6)
        clip = tl.where(found > 1, 1.0, found)
    if LR_THERE:
        rate = tl.load(lr).to(tl.float64)
    else:
        rate = tl.full([], 0.0, tl.float64) + lr
    t = count.to(tl.float64)
    tl.store(out, clip.to(tl.float32))
    tl.store(out + 1, (rate / (1 - tl.exp(t * _log(high1, low1)))).to(tl.float32))
    tl.store(out + 2, (1 / tl.sqrt(1 - tl.exp(t * _log(high2, low2)))).to(tl.float32))


@triton.jit
def _row_adam(
    rows,
    grad,
    mean,
    square,
    dots,
    rounded,
    scalars,
    d,
    size,
    rest1,
    beta2,
    rest2,
    eps,
    CONSTRAINED: tl.constexpr,
    ROUNDED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    at = row * d + columns
    inside = (columns < d) & (at < size)
    clip, step_size, per_root = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    p = tl.load(rows + at, mask=inside, other=0.0)
    g = tl.load(grad + at, mask=inside, other=0.0)
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(square + at, mask=inside, other=0.0)
    if CONSTRAINED:
        g = g - tl.load(dots + row) * p
    g = g * clip
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    p -= step_size * m / (tl.sqrt(v) * per_root + eps)
    if CONSTRAINED:
        norm = tl.sqrt(tl.sum(tl.where(inside, p * p, 0.0), axis=0))
        p = p / tl.maximum(norm, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    tl.store(rows + at, p, mask=inside)
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    if ROUNDED:
        # To the nearest, ties to even, as torch rounds; by hand, since Triton's interpreter only truncates.
        bits = p.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(rounded + at, tl.where(p == p, bits, 0x7FC0).to(tl.int16), mask=inside)


def _cut(parameter: Tensor, constrained: bool) -> tuple[int, int, int, int]:
    """Number of programs, elements of each, their width in registers, and warps."""
    if not constrained:
        return triton.cdiv(parameter.numel(), _FLAT), _FLAT, _FLAT, 4
    d = parameter.shape[-1]
    width = triton.next_power_of_2(d)
    return parameter.numel() // d, d, width, max(1, min(16, width // 512))


def programs(parameter: Tensor, constrained: bool) -> int:
    """How many squares `row_norms` writes for this parameter."""
    return _cut(parameter, constrained)[0]


def row_norms(grad: Tensor, rows: Tensor, constrained: bool, squares: Tensor) -> Tensor | None:
    """Writes sums of squares of the gradient, projected if `constrained`; returns the dots (n,) with the rows then.

    Args:
        grad: fp32, contiguous; (n, d) rows of at most `LONGEST_ROW` if constrained.
        rows: the parameter, of the same shape.
        constrained: whether each row has norm 1.
        squares: (programs,) fp32; their sum is the squared norm.
    """
    n, d, width, warps = _cut(rows, constrained)
    dots = torch.empty(n, device=rows.device) if constrained else None
    sizes = (d, rows.numel(), constrained, width)
    with torch.cuda.device_of(rows):
        if n:
            _row_norms[(n,)](grad, rows, squares, squares if dots is None else dots, *sizes, num_warps=warps)
    return dots


def scalars(
    step: Tensor, total: Tensor | None, *, lr: float | Tensor, betas: tuple[float, float], max_grad_norm: float | None
) -> Tensor:
    """Counts one step in `step` and returns the three numbers on the device that `row_adam` works with.

    Args:
        step: () fp32, the steps done before.
        total: () fp64, the squared global norm of the gradients; None without clipping.
        lr: learning rate; a tensor stays on its device.
        betas: Adam's.
        max_grad_norm: with `total`.
    """
    out = torch.empty(3, device=step.device)
    logs = [part for beta in betas for part in _split(math.log(beta) if beta > 0 else -math.inf)]
    clips = total is not None and max_grad_norm is not None
    most = max_grad_norm if clips else 1.0
    with torch.cuda.device_of(step):
        _scalars[(1,)](step, total if clips else out, out, lr, *logs, most, clips, isinstance(lr, Tensor), num_warps=1)
    return out


def _split(number: float) -> tuple[float, float]:
    """A double as the sum of two floats: a number handed to a kernel is rounded to fp32."""
    (high,) = struct.unpack("f", struct.pack("f", number))
    return high, number - high if math.isfinite(high) else 0.0


def row_adam(
    rows: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    dots: Tensor | None,
    numbers: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    rounded: Tensor | None = None,
) -> None:
    """Adam in place, after projection if there are dots; renormalises those rows; writes their bfloat16 if given.

    All but dots and numbers (from `scalars`) have the shape of the parameter, and are contiguous.
    """
    n, d, width, warps = _cut(rows, dots is not None)
    # Where a kernel uses no dots and no copy, any pointer will do.
    along, low = rows if dots is None else dots, rows if rounded is None else rounded.view(torch.int16)
    numbers_and_sizes = (numbers, d, rows.numel(), 1 - betas[0], betas[1], 1 - betas[1], eps)
    options = (dots is not None, rounded is not None, width)
    with torch.cuda.device_of(rows):
        if n:
            _row_adam[(n,)](rows, grad, mean, square, along, low, *numbers_and_sizes, *options, num_warps=warps)
