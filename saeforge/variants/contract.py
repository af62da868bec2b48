"""What passes between a run and its variant, and what a variant may offer besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from saeforge.data.moments import Statistics
from saeforge.ops import Group, SparseCode
from saeforge.sae import SAE
from saeforge.schedules import Shape

#: Values of a step by name. Under `target_l0` the one that `Variant.sparsity_schedule` names is a scalar tensor on the
#: device: multiply by it, and never ask for its value.
ScheduleValues = Mapping[str, float]


class DataStatistics(NamedTuple):
    """Statistics of the training rows in raw units: of the input, and of the target (the same for an SAE).

    `input_sources` and `target_sources` are those of each site, where several stand side by side.
    """

    input: Statistics
    target: Statistics
    input_sources: tuple[Statistics, ...] = ()
    target_sources: tuple[Statistics, ...] = ()


@dataclass(frozen=True)
class RunSettings:
    """What a run tells its variant before the first step.

    Attributes:
        total_steps: optimizer steps of the whole run.
        dead_after_tokens: a latent silent for this many tokens (over all ranks) counts as dead.
        compute_dtype: type of the encoder product; torch.bfloat16 under `bf16-mixed`.
        group: the ranks that share a batch.
        sources: widths of the parts of an input that several sites make up side by side (a crosscoder's), or empty.
        target_sources: the same of the target.
    """

    total_steps: int = 1
    dead_after_tokens: int = 10_000_000
    compute_dtype: torch.dtype = torch.float32
    group: Group = field(default_factory=Group)
    sources: tuple[int, ...] = ()
    target_sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """The optimizer settings of a variant's paper; each can be overridden in the run's configuration."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    warmup_steps: int = 0
    decay_steps: int = 0
    resample_steps: tuple[int, ...] = ()
    warmup_shape: Shape = "linear"
    decay_shape: Shape = "linear"


@dataclass(frozen=True)
class StepOutput:
    """The result of one step.

    Attributes:
        terms: named scalars with their coefficients applied; the loss is their sum.
        code: the latents, in the variant's scaled units.
        counters: named detached scalars that add up over steps and ranks; `squared_error` (sum over rows and
            dimensions, raw units) is always there.
    """

    terms: dict[str, Tensor]
    code: SparseCode
    counters: dict[str, Tensor]


@runtime_checkable
class Resampled(Protocol):
    """What a variant may offer besides: giving dead latents a new start (Bricken et al. 2023, "neuron resampling")."""

    def reset_latents_(self, latents: Tensor, x: Tensor, target: Tensor) -> list[nn.Parameter]:
        """Restarts `latents` (n,) from badly reconstructed rows.

        Args:
            latents: indices.
            x: (n, d_in) rows in scaled units, one for each latent. target: (n, d_out) theirs.

        Returns:
            The parameters whose rows were set; the optimizer forgets those rows.
        """


class Unfolded(NamedTuple):
    """An SAE's weights in a variant's scaled units, decoder rows of norm 1: see `Variant.unfolded`.

    Shapes are the SAE's: W_enc (d_sae, d_in), b_enc (d_sae,), W_dec (d_sae, d_out), b_dec (d_out,), threshold (d_sae,)
    or None under rule topk.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None


@runtime_checkable
class StartsFrom(Protocol):
    """What a variant may offer besides: to start from a trained SAE (`model.init_from`), the inverse of its fold."""

    def unfold_(self, sae: SAE) -> None:
        """Sets the weights such that `fold` returns `sae`; called after `initialise`, with scales as set there.

        `Variant.unfolded` checks the SAE and brings its weights into scaled units.

        Raises:
            ConfigError: an SAE that this variant cannot express.
        """


@runtime_checkable
class OwnEncoder(Protocol):
    """What a variant offers whose latents are no thresholds or top-k of one product: signed, iterative, by neighbours.

    Its `fold` returns `self.kept(...)`, and the SAE that it leaves needs the variant's package to be loaded.
    """

    def encode(self, x: Tensor) -> SparseCode:
        """The latents of raw activations (n, d_in): values are lengths along the rows given to `kept`."""
