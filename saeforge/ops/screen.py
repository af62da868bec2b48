"""Exact fp32 selection at the price of a bf16 product.

The dense encoder product in fp32 is the larger part of a CPU step; in bfloat16 it takes a quarter of the time where the
processor multiplies bfloat16. So the cheap product only *screens*: it says which latents may be chosen, by bounds that
hold for every input, and these few are computed in fp32. Chosen latents and values are those of an fp32 product.

With x = x' + dx, w = w' + dw (a prime marks bfloat16), x.w - x'.w' = x'.dw + dx.w, so by Cauchy-Schwarz

    |x.w - x'.w'| <= |x'| |dw| + |dx| |w|,

plus what fp32 accumulation of d products can lose, at most d 2^-24 |x| |w| on either side, plus the bias' rounding,
plus the rounding of the result to bfloat16, which is relative to it (native/screen.cpp).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saeforge.ops import native, shadow
from saeforge.ops.product import fast_bf16, pre_activations

#: Elements of a weight from which on it pays; a rule of the weight alone, so that a row's result does not depend on
#: the rows beside it.
SMALLEST = 1 << 20
#: Rows much longer than the others would make the bounds of all the others loose.
_LONGEST = 4.0
#: Share of candidates above which computing them one by one costs more than an fp32 product.
_MANY = 1 / 10


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether fp32 selections over `x @ weight.T` are screened."""
    fp32 = x.dtype == weight.dtype == torch.float32
    if not fp32 or weight.numel() < SMALLEST or not native.takes(x, weight) or not fast_bf16():
        return False
    norm = shadow.of(weight).norm
    assert norm is not None
    return bool(norm.max() <= _LONGEST * norm.square().mean().sqrt())


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The screening product (b, n) in bfloat16, and by how much it may be wrong in each row (b,) before rounding."""
    made = shadow.of(weight)
    assert made.norm is not None
    assert made.residual is not None
    rounded = x.bfloat16()
    low = None if bias is None else bias.bfloat16()
    pre = pre_activations(rounded, made.rounded, low)
    lengths = rounded.float().norm(dim=1)
    lost = (x - rounded.float()).norm(dim=1)
    accumulation = 2 * (weight.shape[1] + 8) * 2.0**-24
    margin = lengths * (made.residual.max() + accumulation * made.norm.max()) + lost * made.norm.max()
    if bias is not None and low is not None:
        # Its own rounding, and that of the sum if the product was rounded before the bias was added.
        margin = margin + (bias - low.float()).abs().max() + bias.abs().max() / 256
    return pre, margin * 1.001


def top_k(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """values (b, k), indices (b, k) ascending of the k largest of each row of `x @ weight.T + bias`."""
    pre, margin = product(x, weight, bias)
    if not bool(margin.isfinite().all()):
        return native.top_k(F.linear(x, weight, bias), k)
    return native.screened_top_k(pre, margin, x, weight, bias, k)


def above(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values (nnz,), indices (nnz,), counts (b,) of the entries of `x @ weight.T + bias` above the threshold."""
    pre, margin = product(x, weight, bias)
    candidates = native.screened_count(pre, margin, threshold)
    if not bool(margin.isfinite().all()) or int(candidates.sum()) > _MANY * pre.numel():
        return native.above(F.linear(x, weight, bias), threshold)
    return native.screened_above(pre, margin, threshold, x, weight, bias, candidates)
