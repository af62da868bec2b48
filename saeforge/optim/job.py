"""What an optimizer's kernels work on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Job(NamedTuple):
    """One parameter of a step, as rows."""

    parameter: Tensor
    grad: Tensor
    group: dict[str, Any]
    shared_out: bool = False  # whether other ranks hold the other rows of it

    @property
    def constrained(self) -> bool:
        """Whether its rows have norm 1."""
        return bool(self.group["constraint"] == "unit_norm")

    @property
    def plain(self) -> bool:
        """Whether parameter and gradient are contiguous fp32."""
        return all(t.dtype == torch.float32 and t.is_contiguous() for t in (self.parameter, self.grad))

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (n, d); a vector is one row."""
        return tensor.detach().reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.detach().reshape(1, -1)
