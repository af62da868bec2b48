"""The dense product of a step: pre-activations of all latents, for the rows of a chunk."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

#: Rows of a chunk are a multiple of this where there are more: the product's own blocks are, and what is left over is
#: multiplied at a third of the speed.
_ROWS = 128


@functools.cache
def fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def pre_activations(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b, n) `x @ weight.T + bias` in the type of all three.

    `F.linear` copies the bias into every row of the result, and then adds the product to that. oneDNN by itself adds it
    to a result that is still in registers, which saves a tenth of the time at d 384; the bits are the same.
    """
    if bias is not None and x.dtype == torch.bfloat16 and x.device.type == "cpu" and fast_bf16() and _onednn():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def _onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def chunks(x: Tensor, most: int) -> tuple[Tensor, ...]:
    """The rows of `x` in parts of nearly one size, at most so many each."""
    most -= most % _ROWS if most > _ROWS else 0
    equal = -(-len(x) // max(1, -(-len(x) // most)))
    parts: tuple[Tensor, ...] = x.split(min(most, -(-equal // _ROWS) * _ROWS) if len(x) else 1)
    return parts
