"""The jump and its pseudo-gradients, on the entries of a sparse code.

`f = z 1[z > theta]` has no derivative by theta, but the mean of a loss over many rows has one: it depends on how many
pre-activations lie near the threshold. A kernel K of width eps estimates their density (Rajamanoharan et al. 2024,
arXiv 2407.14435, section 4), and stands here where the derivative of the step would:

    d 1[z > theta] / d theta = -K((z - theta) / eps) / eps,    d f / d theta = -theta K((z - theta) / eps) / eps.

For a quadratic loss that is exact in the mean as eps -> 0: half of the entries in the window are active and half are
not, and the mean of the two derivatives is the difference that the jump makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from saeforge.ops import pseudo_gradient

Kernel = Literal["rectangle", "triangle"]
#: Half-width of each kernel's support, in bandwidths.
REACH: dict[str, float] = {"rectangle": 0.5, "triangle": 1.0}


@dataclass(frozen=True)
class Jump:
    """The entries of a code that are active or near their threshold.

    Attributes:
        z: (nnz,) pre-activations, differentiable.
        theta: (nnz,) thresholds of their latents, without gradient.
        handle: (nnz,) what the pseudo-gradient by the threshold goes to, differentiable.
        active: (nnz,) 1 where z > theta, else 0.
        density: (nnz,) K((z - theta) / eps) / eps.
        through_input: whether the pseudo-gradient also goes to z, with the opposite sign.
    """

    z: Tensor
    theta: Tensor
    handle: Tensor
    active: Tensor
    density: Tensor
    through_input: bool

    @classmethod
    def of(
        cls, z: Tensor, theta: Tensor, handle: Tensor, *, kernel: Kernel, bandwidth: float, through_input: bool
    ) -> Jump:
        """From pre-activations and thresholds, all (nnz,)."""
        theta = theta.detach()
        distance = (z.detach() - theta) / bandwidth
        if kernel == "rectangle":
            density = (distance.abs() < 0.5).to(z.dtype) / bandwidth
        else:
            density = (1 - distance.abs()).clamp_min(0) / bandwidth
        return cls(z, theta, handle, (distance > 0).to(z.dtype), density, through_input)

    def steps(self) -> Tensor:
        """(nnz,) 1[z > theta]."""
        return self.active + pseudo_gradient(self.density * self._moved())

    def values(self) -> Tensor:
        """(nnz,) z 1[z > theta]."""
        return self.z * self.active + pseudo_gradient(self.theta * self.density * self._moved())

    def _moved(self) -> Tensor:
        return self.z - self.handle if self.through_input else -self.handle
