"""Gated SAE, after Rajamanoharan et al. 2024."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saeforge.data.batch import Batch
from saeforge.errors import ConfigError
from saeforge.ops import Above, decode, encode, pick
from saeforge.sae import SAE
from saeforge.schedules import ramp
from saeforge.variants.base import Variant
from saeforge.variants.contract import DataStatistics, Recipe, ScheduleValues, StepOutput
from saeforge.variants.start import InputScale, check_pre_bias, mean_norm_of_others, random_unit_rows


@final
class Gated(Variant):
    """One path decides who is active, another how strongly (Rajamanoharan et al., arXiv 2404.16014).

    `pi = W_gate (x - b_dec)`, `f = 1[pi + b_gate > 0] * ReLU(exp(r_mag) pi + b_mag)`, `x_hat = f W_dec + b_dec`. Loss:
    `|x - x_hat|^2 + l1 |ReLU(pi + b_gate)|_1 + |x - ReLU(pi + b_gate) sg(W_dec) - sg(b_dec)|^2`. The gate learns from
    the last two terms alone; the penalty therefore does not shrink the magnitudes. Decoder rows have norm 1.

    Args:
        d_in: width of the input.
        d_out: width of the target.
        d_sae: number of latents.
        l1: coefficient of the gate's penalty, for inputs with a mean squared norm of 1.
        l1_warmup_share: share of the run over which the coefficient rises linearly from 0.
        pre_bias: subtract the decoder's bias before the encoder; false for a transcoder.
        input_scale: "rms", "sqrt_d" or "none".
    """

    sparsity_schedule = "l1"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        d_sae: int = 4096,
        l1: float = 0.04,
        l1_warmup_share: float = 0.0,
        pre_bias: bool = True,
        input_scale: InputScale = "rms",
    ) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae, input_scale=input_scale)
        if l1 < 0 or not 0 <= l1_warmup_share <= 1:
            raise ConfigError(
                f"l1 = {l1}, l1_warmup_share = {l1_warmup_share}: expected l1 >= 0 and a share between 0 and 1"
            )
        self.l1, self.l1_warmup_share, self.pre_bias = l1, l1_warmup_share, pre_bias
        self.W_gate = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Random unit decoder rows, the gate equal to the decoder, everything else 0."""
        check_pre_bias(self.pre_bias, x, target)
        self.set_scale(stats)
        self.W_dec.copy_(random_unit_rows(self.d_sae, self.d_out, generator))
        same = self.d_in == self.d_out
        self.W_gate.copy_(self.W_dec if same else random_unit_rows(self.d_sae, self.d_in, generator))
        for parameter in (self.b_gate, self.r_mag, self.b_mag, self.b_dec):
            parameter.zero_()

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        """`l1`: linear from 0 to the coefficient over the first share of the run."""
        warmup = round(self.l1_warmup_share * total_steps)
        return {"l1": lambda step: self.l1 * ramp(step, warmup)}

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """Terms `mse` (summed over dimensions), `l1`, `aux`."""
        x, target = self.scaled(batch)
        shift = self.b_dec if self.pre_bias else None
        # The product carries b_gate, so the support {pi + b_gate > 0} is one threshold; everything else lives on it.
        dtype = self.run.compute_dtype
        gate = encode(x, self.W_gate, self.b_gate, Above(0.0), shift=shift, dtype=dtype)
        # The indicator passes no gradient, so the magnitude path may read pi as it is. Its gradient does not reach
        # b_gate: pi = (pi + b_gate) - b_gate.
        pi = gate.values - pick(self.b_gate, gate)
        magnitude = (pick(self.r_mag.exp(), gate) * pi + pick(self.b_mag, gate)).relu()
        code = gate.with_values(magnitude)
        squared_error = (target - decode(code, self.W_dec, self.b_dec, dtype=dtype)).square().sum(1)
        through_gate = decode(gate, self.W_dec, self.b_dec, dtype=dtype, frozen=True)
        terms = {
            "mse": self.mean_rows(squared_error, batch.weight),
            "l1": schedule["l1"] * self.mean_entries(gate.values, gate, batch.weight),
            "aux": self.mean_rows((target - through_gate).square().sum(1), batch.weight),
        }
        return self.output(terms, code, squared_error)

    def param_groups(self) -> list[dict[str, Any]]:
        """Decoder rows of norm 1; the rest free."""
        return [
            {"params": [self.W_dec], "constraint": "unit_norm"},
            {"params": [self.W_gate, self.b_gate, self.r_mag, self.b_mag, self.b_dec], "constraint": None},
        ]

    def recipe(self, total_steps: int) -> Recipe:
        """Adam(0, 0.999), lr 3e-4 after a warm-up of 1,000 steps (a tenth of the run, if that is shorter).

        Dead latents are resampled after 25k, 50k, 75k and 100k steps, as Bricken et al. 2023 do.
        """
        return Recipe(
            lr=3e-4,
            betas=(0.0, 0.999),
            warmup_steps=min(1000, total_steps // 10),
            resample_steps=(25_000, 50_000, 75_000, 100_000),
        )

    @torch.no_grad()
    def reset_latents_(self, latents: Tensor, x: Tensor, target: Tensor) -> list[nn.Parameter]:
        """Decoder rows point at the rows; the gate does too, at 0.2 of the mean norm of the other latents' gates."""
        norm = 0.2 * mean_norm_of_others(self.W_gate, latents)
        self.W_dec[latents] = F.normalize(target, dim=1)
        self.W_gate[latents] = F.normalize(x, dim=1) * norm
        for parameter in (self.b_gate, self.r_mag, self.b_mag):
            parameter[latents] = 0.0
        return [self.W_dec, self.W_gate, self.b_gate, self.r_mag, self.b_mag]

    @torch.no_grad()
    def unfold_(self, sae: SAE) -> None:
        """Exact for any threshold SAE: r_mag = 0, b_mag = b_enc + W_enc b_dec, b_gate = b_mag - threshold.

        Raises:
            ConfigError: a top-k SAE, which has no thresholds.
        """
        weights = self.unfolded(sae)
        if weights.threshold is None:
            raise ConfigError(
                "init_from: Gated starts from SAEs with thresholds, this one has top-k; train variant topk"
            )
        b_mag = weights.b_enc + weights.W_enc @ weights.b_dec if self.pre_bias else weights.b_enc
        self.W_gate.copy_(weights.W_enc)
        self.r_mag.zero_()
        self.b_mag.copy_(b_mag)
        self.b_gate.copy_(b_mag - weights.threshold)
        self.W_dec.copy_(weights.W_dec)
        self.b_dec.copy_(weights.b_dec)

    @torch.no_grad()
    def fold(self) -> SAE:
        """The gate as a threshold on the magnitude: active iff exp(r) pi + b_mag > b_mag - exp(r) b_gate, and > 0."""
        rate = self.r_mag.exp()
        shift = self.b_dec if self.pre_bias else None
        threshold = (self.b_mag - rate * self.b_gate).clamp_min(0.0)
        return self.folded(
            self.W_gate * rate[:, None], self.b_mag, self.W_dec, self.b_dec, shift=shift, threshold=threshold
        )
