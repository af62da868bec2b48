"""L1-ReLU: the standard SAE of Anthropic's April 2024 update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saeforge.data.batch import Batch
from saeforge.errors import ConfigError
from saeforge.ops import Above, decode, encode, pick, row_norms
from saeforge.sae import SAE
from saeforge.schedules import ramp
from saeforge.variants.base import Variant
from saeforge.variants.contract import DataStatistics, Recipe, ScheduleValues, StepOutput
from saeforge.variants.start import InputScale, check_pre_bias, mean_norm_of_others, random_unit_rows


@final
class L1ReLU(Variant):
    """ReLU latents under an L1 penalty weighted by decoder norms (Conerly et al., "Update on how we train SAEs", 2024).

    `f = ReLU(W_enc x + b_enc)`, `x_hat = f W_dec + b_dec`, loss `mean_rows(|x - x_hat|^2 + l1 sum_i f_i |w_dec_i|)`.
    No norm constraint: the weighted penalty leaves nothing to gain from small rows. The paper resamples no latents;
    `model.resample_steps` does. AuxK is not offered: a dead latent's ReLU is 0, and so is its gradient.

    Args:
        d_in: width of the input.
        d_out: width of the target.
        d_sae: number of latents.
        l1: coefficient of the sparsity penalty; 5 is the paper's, for inputs scaled to a mean norm of sqrt(d_in).
        l1_warmup_share: share of the run over which the coefficient rises linearly from 0.
        decoder_init_norm: norm of the decoder rows at the start.
        pre_bias: subtract the decoder's bias before the encoder, as SAELens does; the paper does not.
        input_scale: "sqrt_d" (the paper's), "rms" or "none".
    """

    sparsity_schedule = "l1"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        d_sae: int = 4096,
        l1: float = 5.0,
        l1_warmup_share: float = 0.05,
        decoder_init_norm: float = 0.1,
        pre_bias: bool = False,
        input_scale: InputScale = "sqrt_d",
    ) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae, input_scale=input_scale)
        if l1 < 0 or not 0 <= l1_warmup_share <= 1 or decoder_init_norm <= 0:
            raise ConfigError(
                f"l1 = {l1}, l1_warmup_share = {l1_warmup_share}, decoder_init_norm = {decoder_init_norm}: "
                "expected l1 >= 0, a share between 0 and 1, and a positive norm"
            )
        self.l1, self.l1_warmup_share, self.decoder_init_norm = l1, l1_warmup_share, decoder_init_norm
        self.pre_bias = pre_bias
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Random decoder directions of norm `decoder_init_norm`, the encoder equal to the decoder, biases 0."""
        check_pre_bias(self.pre_bias, x, target)
        self.set_scale(stats)
        self.W_dec.copy_(random_unit_rows(self.d_sae, self.d_out, generator) * self.decoder_init_norm)
        if self.d_in == self.d_out:
            self.W_enc.copy_(self.W_dec)
        else:
            self.W_enc.copy_(random_unit_rows(self.d_sae, self.d_in, generator) * self.decoder_init_norm)
        self.b_enc.zero_()
        self.b_dec.zero_()

    @property
    def shift(self) -> Tensor | None:
        """(d_in,) what the encoder subtracts from the input, or None."""
        return self.b_dec if self.pre_bias else None

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        """`l1`: linear from 0 to the coefficient over the first share of the run."""
        warmup = round(self.l1_warmup_share * total_steps)
        return {"l1": lambda step: self.l1 * ramp(step, warmup)}

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """Terms `mse` (summed over dimensions) and `l1`."""
        x, target = self.scaled(batch)
        dtype = self.run.compute_dtype
        code = encode(x, self.W_enc, self.b_enc, Above(0.0), shift=self.shift, dtype=dtype)
        rebuilt = decode(code, self.W_dec, self.b_dec, dtype=dtype)
        squared_error = (target - rebuilt).square().sum(1)
        penalty = code.values * pick(row_norms(self.W_dec), code)
        terms = {
            "mse": self.mean_rows(squared_error, batch.weight),
            "l1": schedule["l1"] * self.mean_entries(penalty, code, batch.weight),
        }
        return self.output(terms, code, squared_error)

    def param_groups(self) -> list[dict[str, Any]]:
        """One group without constraints."""
        return [{"params": [self.W_enc, self.b_enc, self.W_dec, self.b_dec], "constraint": None}]

    def recipe(self, total_steps: int) -> Recipe:
        """Adam(0.9, 0.999), lr 5e-5, decayed linearly to 0 over the last 20%, gradient norm at most 1."""
        return Recipe(lr=5e-5, decay_steps=total_steps // 5)

    @torch.no_grad()
    def reset_latents_(self, latents: Tensor, x: Tensor, target: Tensor) -> list[nn.Parameter]:
        """Decoder rows point at the rows, at the others' mean norm; the encoder does too, at 0.2 of theirs."""
        self.W_dec[latents] = F.normalize(target, dim=1) * mean_norm_of_others(self.W_dec, latents)
        shifted = x - self.b_dec if self.pre_bias else x
        self.W_enc[latents] = F.normalize(shifted, dim=1) * (0.2 * mean_norm_of_others(self.W_enc, latents))
        self.b_enc[latents] = 0.0
        return [self.W_dec, self.W_enc, self.b_enc]

    @torch.no_grad()
    def unfold_(self, sae: SAE) -> None:
        """Exact for a threshold SAE whose thresholds are 0; others are refused.

        Raises:
            ConfigError: other rules.
        """
        weights = self.unfolded(sae)
        if weights.threshold is None or bool((weights.threshold != 0).any()):
            rule = "top-k" if weights.threshold is None else "thresholds above 0"
            raise ConfigError(
                f"init_from: L1ReLU starts from SAEs with thresholds of 0, this one has {rule}; "
                f"train variant {'topk' if weights.threshold is None else 'gated'} instead"
            )
        self.W_enc.copy_(weights.W_enc)
        self.b_enc.copy_(weights.b_enc + weights.W_enc @ weights.b_dec if self.pre_bias else weights.b_enc)
        self.W_dec.copy_(weights.W_dec)
        self.b_dec.copy_(weights.b_dec)

    @torch.no_grad()
    def fold(self) -> SAE:
        """Threshold 0; decoder rows of norm 1 in raw units."""
        zero = torch.zeros_like(self.b_enc)
        return self.folded(self.W_enc, self.b_enc, self.W_dec, self.b_dec, shift=self.shift, threshold=zero)
