"""bfloat16 copies of weights that stay valid between steps.

A weight in fp32 is read by every product of a bf16 step; casting it each time costs as much memory traffic as several
of these products. Its copy is kept beside it, and the optimizer writes the new one while the row is in its registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from saeforge.ops import native


@dataclass
class Shadow:
    """A weight in bfloat16.

    Attributes:
        rounded: (n, d) bfloat16.
        residual: (n,) norm of what the rounding took from each row; only on the CPU, for `screen`.
        norm: (n,) norm of each row; likewise.
        made_of: version and place of the weight it was made of.
    """

    rounded: Tensor
    residual: Tensor | None
    norm: Tensor | None
    made_of: tuple[int, int] = (-1, -1)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the CPU kernels write."""
        assert self.residual is not None
        assert self.norm is not None
        return self.rounded, self.residual, self.norm


_shadows = WeakTensorKeyDictionary()


def _state(weight: Tensor) -> tuple[int, int]:
    return (weight._version, weight.data_ptr())


def of(weight: Tensor) -> Shadow:
    """The shadow of a weight (n, d) fp32, made anew if the weight has changed since."""
    found: Shadow | None = None if weight.is_inference() else _shadows.get(weight)
    if found is None or found.rounded.shape != weight.shape or found.rounded.device != weight.device:
        rounded = torch.empty_like(weight, dtype=torch.bfloat16, requires_grad=False)
        here = native.takes(weight)
        found = Shadow(rounded, torch.empty(len(weight)) if here else None, torch.empty(len(weight)) if here else None)
        if not weight.is_inference():
            _shadows[weight] = found
    if weight.is_inference() or found.made_of != _state(weight):
        with torch.no_grad():
            if found.residual is not None and found.norm is not None:
                native.round_rows(weight, found.rounded, found.residual, found.norm)
            else:
                found.rounded.copy_(weight)
        if not weight.is_inference():
            found.made_of = _state(weight)
    return found


def to_update(weight: Tensor) -> Shadow | None:
    """The shadow that an optimizer should write along with the weight; then it calls `updated`."""
    return None if weight.is_inference() else _shadows.get(weight)


def updated(weight: Tensor, shadow: Shadow) -> None:
    """The shadow holds the weight as it is now."""
    shadow.made_of = _state(weight)
