"""Which implementation computes: by device, by type, and by how many latents are active.

All give the same numbers up to rounding, and the same choice of latents for the same pre-activations. `SAEFORGE_OPS`
overrides the choice (see `wish`).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from saeforge.ops import dense, gpu, native, stock
from saeforge.ops.code import SparseCode
from saeforge.ops.native import products as native_products
from saeforge.ops.wish import wish

#: Share of active latents above which dense products win: a dense multiply-add costs that much less than a gathered
#: one. CPU: measured by scripts/bench_break_even.py; CUDA: [speed 0.4], not measured yet.
BREAK_EVEN = {
    ("cpu", torch.float32): 1 / 6,
    ("cpu", torch.bfloat16): 1 / 10,
    ("cuda", torch.float32): 1 / 20,
    ("cuda", torch.bfloat16): 1 / 184,
}


def choose(code: SparseCode, dtype: torch.dtype, *tensors: Tensor) -> ModuleType:
    """The products for a code: `dense`, `native.products`, `stock` or Triton's.

    Args:
        code: whose share of active latents decides.
        dtype: compute type.
        tensors: values, rows, tables that will be multiplied.
    """
    asked = wish()
    if asked == "reference":
        return dense
    kernels = _kernels(*tensors)
    share = BREAK_EVEN.get((code.indices.device.type, dtype), 1 / 20)
    if asked == "auto" and code.nnz > share * code.n_rows * code.d_sae:
        return dense
    return kernels


def _kernels(*tensors: Tensor) -> ModuleType:
    if native.takes(*tensors):
        return native_products
    if gpu.takes(*tensors):
        return gpu.kernels()
    return stock
