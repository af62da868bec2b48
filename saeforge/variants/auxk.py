"""AuxK: dead latents learn to reconstruct what the live ones leave (Gao et al. 2024, arXiv 2406.04093, section 2.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops import stop_gradient
from saeforge.ops.select import top_k
from saeforge.variants.base import Variant


@dataclass(frozen=True)
class AuxK:
    """The auxiliary loss of a variant; its products are dense over the dead latents (`encode_beside`, `decode_beside`).

    Dense is cheaper than gathers below about 94k dead latents [speed 0.5].

    Attributes:
        coefficient: of the term; 0 turns it off.
        k: dead latents that are used per token.
    """

    coefficient: float
    k: int

    @classmethod
    def of(cls, coefficient: float, k: int | None, d_in: int) -> AuxK:
        """From a variant's options; `k` None is the power of two nearest to d_in / 2.

        Raises:
            ConfigError: a negative coefficient, or k < 1.
        """
        if coefficient < 0 or (k is not None and k < 1):
            raise ConfigError(f"aux = {coefficient}, k_aux = {k}: expected aux >= 0 and a positive k_aux or null")
        return cls(coefficient, k or 2 ** max(0, round(math.log2(d_in / 2))))

    def latents(self, variant: Variant) -> Tensor | None:
        """(n,) the dead latents, of this rank, or None where there is nothing to do on any."""
        if self.coefficient == 0 or not sum(variant.dead_by_rank()):
            return None
        return variant.dead_latents()

    def values(self, variant: Variant, pre: Tensor) -> Tensor:
        """(B, n): of each row of pre-activations (B, n) the k largest where they are, if positive; 0 elsewhere.

        Args:
            variant: whose ranks may share out the latents; the k largest are those of all of them.
            pre: of the dead latents of this rank.
        """
        listed = variant.dead_by_rank()
        if self.k >= sum(listed):
            return pre.relu()
        if variant.shard is None:
            _, chosen = top_k(pre.detach(), self.k)
            return torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen).relu())
        # A rank offers its own k largest. They are what a product in the compute type gave, so they may travel in it.
        own = min(self.k, pre.shape[1])
        values, offered = top_k(pre.detach(), own)
        room = min(self.k, max(listed)) - own
        table = F.pad(values.to(variant.run.compute_dtype), (0, room), value=-torch.inf)
        among = variant.shard.own_of_largest(table, self.k, lambda rows, k: top_k(rows, k)[1])[:, :own]
        return torch.zeros_like(pre).scatter(1, offered, torch.where(among, pre.gather(1, offered).relu(), 0.0))

    def term(self, variant: Variant, error: Tensor, rebuilt: Tensor, weight: Tensor | None) -> Tensor:
        """Squared error of the dead latents' reconstruction of `error` over its variance, times the coefficient.

        Both are sums over the rows of the global batch, with their weights if they have some.

        Args:
            variant: whose group shares the batch.
            error: (B, d_out) what the live latents leave; no gradient reaches it.
            rebuilt: (B, d_out) the dead latents' reconstruction.
            weight: (B,) or None.
        """
        # In float64: sum w |e|^2 - |sum w e|^2 / sum w cancels.
        error = stop_gradient(error)
        group, wide = variant.run.group, error.double()
        w = wide.new_ones(len(wide)) if weight is None else weight.double()
        centre = group.sum(w @ wide).square().sum() / group.sum(w.sum())
        squares = group.sum(w @ wide.square().sum(1))
        variance = squares - centre
        rebuilt_error = (error - rebuilt).square().sum(1)
        total = rebuilt_error.sum() if weight is None else rebuilt_error @ weight.to(error.dtype)
        # One row, equal rows, or a perfect reconstruction: 0 / 0. What cancellation leaves of it is not a variance.
        defined = variance > 1e-12 * squares
        ratio = total * group.size / torch.where(defined, variance, 1.0).to(error.dtype)
        return self.coefficient * torch.where(defined, ratio, 0.0)
