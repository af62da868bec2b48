"""BatchTopK, after Bussmann, Leask and Nanda 2024."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.ops import BatchTopK, decode, decode_beside, encode, encode_beside
from saeforge.variants import (
    SAE,
    AuxK,
    Batch,
    BatchThreshold,
    DataStatistics,
    InputScale,
    Recipe,
    ScheduleValues,
    StepOutput,
    Variant,
    anneal,
    check_pre_bias,
    geometric_median,
    least_squares_factor,
    mean_norm_of_others,
    random_unit_rows,
)


@final
class BatchTopKSAE(Variant):
    """The k * B largest latents of a batch of B rows (Bussmann et al., "BatchTopK", arXiv 2412.06410).

    `f = BatchTopK(ReLU(W_enc (x - b_dec) + b_enc))`, `x_hat = f W_dec + b_dec`, loss
    `mse / mse_of_the_mean + aux * AuxK`: a token that needs more latents may have them. In use there is no batch, and
    one threshold takes its place (`BatchThreshold`), so that the trained SAE is a JumpReLU. Decoder rows have norm 1,
    so competing values are lengths. Differs from the paper in three points: inputs are scaled by one scalar of the
    dataset, the encoder has a bias (it starts at 0), and starts at the length that makes the first reconstruction best.

    Args:
        d_in: width of the input.
        d_out: width of the target.
        d_sae: number of latents.
        k: mean number of active latents per token; may be a fraction.
        k_start: k at the first step, if it falls (or rises) to `k` on the way; null is `k`.
        k_anneal_share: share of the run over which it does.
        aux: coefficient of AuxK; 0 turns it off.
        k_aux: dead latents that AuxK uses per token; default: the power of two nearest to d_in / 2 (the paper: 512).
        pre_bias: subtract the decoder's bias before the encoder; false for a transcoder.
        input_scale: "rms", "sqrt_d" or "none".
    """

    mse_of_mean: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        d_sae: int = 4096,
        k: float = 32,
        k_start: float | None = None,
        k_anneal_share: float = 0.1,
        aux: float = 1 / 32,
        k_aux: int | None = None,
        pre_bias: bool = True,
        input_scale: InputScale = "rms",
    ) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae, input_scale=input_scale)
        for name, value in (("k", k), ("k_start", k if k_start is None else k_start)):
            if not 0 < value <= d_sae:
                raise ConfigError(f"{name} = {value} with d_sae = {d_sae}: expected 0 < {name} <= d_sae")
        if not 0 <= k_anneal_share <= 1:
            raise ConfigError(f"k_anneal_share = {k_anneal_share}: expected a share between 0 and 1")
        self.k, self.k_start, self.k_anneal_share, self.pre_bias = k, k_start, k_anneal_share, pre_bias
        self.auxk = AuxK.of(aux, k_aux, d_in)
        self.threshold = BatchThreshold()
        self._select = BatchTopK(k)
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("mse_of_mean", torch.ones(()))

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Unit decoder rows; encoder = decoder, as long as reconstructs best; b_dec the geometric median."""
        check_pre_bias(self.pre_bias, x, target)
        self.set_scale(stats)
        self.mse_of_mean.fill_(max(sum(stats.target.variance) * self.target_scale.item() ** 2, 1e-30))
        self.W_dec.copy_(random_unit_rows(self.d_sae, self.d_out, generator))
        same = self.d_in == self.d_out
        self.W_enc.copy_(self.W_dec if same else random_unit_rows(self.d_sae, self.d_in, generator))
        self.b_enc.zero_()
        self.b_dec.copy_(geometric_median(target[:32768].to(self.b_dec.dtype) * self.target_scale))
        every = max(1, len(x) // 4096)
        rows = x[::every].to(self.W_enc) * self.scale
        centre = self.b_dec if self.pre_bias else rows.mean(0)
        code = encode(rows - centre, self.W_enc, None, BatchTopK(self.k))
        wanted = target[::every].to(self.W_dec) * self.target_scale - self.b_dec
        self.W_enc.mul_(least_squares_factor(wanted, decode(code.with_values(code.values.relu()), self.W_dec)))
        if not self.pre_bias:
            mean = torch.tensor(stats.input.mean, dtype=self.b_enc.dtype, device=self.b_enc.device)
            self.b_enc.copy_(-self.W_enc @ (mean * self.scale))

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        """`k`, if it changes: linear from `k_start` to `k` over `k_anneal_share` of the run."""
        if self.k_start is None:
            return {}
        start, steps = self.k_start, round(self.k_anneal_share * total_steps)
        return {"k": lambda step: anneal(step, steps, start, self.k)}

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """Terms `mse` (over that of predicting the mean) and `aux`."""
        x, target = self.scaled(batch)
        shift = self.b_dec if self.pre_bias else None
        dtype, dead = self.run.compute_dtype, self.auxk.latents(self)
        self._select.mean = schedule.get("k", self.k)
        self._select.group = self.run.group
        selected, dead_pre = encode_beside(x, self.W_enc, self.b_enc, self._select, dead, shift=shift, dtype=dtype)
        code = selected.with_values(selected.values.relu())
        self.threshold.follow(code.values[: code.nnz], self.run.group, self.run.total_steps)
        dead_values = None if dead is None else self.auxk.values(self, dead_pre)
        rebuilt, dead_rebuilt = decode_beside(code, self.W_dec, dead, dead_values, dtype=dtype)
        error = target - (rebuilt + self.b_dec)
        squared_error = error.square().sum(1)
        terms = {"mse": self.mean_rows(squared_error, batch.weight) / self.mse_of_mean}
        if self.auxk.coefficient > 0:
            none = squared_error.new_zeros(())
            terms["aux"] = none if dead is None else self.auxk.term(self, error, dead_rebuilt, batch.weight)
        return self.output(terms, code, squared_error)

    def param_groups(self) -> list[dict[str, Any]]:
        """Decoder rows of norm 1; the rest free."""
        return [
            {"params": [self.W_dec], "constraint": "unit_norm"},
            {"params": [self.W_enc, self.b_enc, self.b_dec], "constraint": None},
        ]

    def recipe(self, total_steps: int) -> Recipe:
        """Adam(0.9, 0.99), lr 3e-4, constant; gradient norm at most 1 (the paper's 1e5 is none; others clip at 1)."""
        return Recipe(lr=3e-4, betas=(0.9, 0.99))

    @torch.no_grad()
    def reset_latents_(self, latents: Tensor, x: Tensor, target: Tensor) -> list[nn.Parameter]:
        """Decoder rows point at the rows, the encoder at them without the pre-encoder bias, as long as the others'."""
        shifted = x - self.b_dec if self.pre_bias else x
        self.W_dec[latents] = F.normalize(target, dim=1)
        self.W_enc[latents] = F.normalize(shifted, dim=1) * mean_norm_of_others(self.W_enc, latents)
        self.b_enc[latents] = 0.0
        return [self.W_dec, self.W_enc, self.b_enc]

    @torch.no_grad()
    def unfold_(self, sae: SAE) -> None:
        """Exact for a threshold SAE with one threshold for all latents, as `fold` makes them.

        Raises:
            ConfigError: a top-k SAE, or one whose latents have thresholds of their own.
        """
        weights = self.unfolded(sae)
        if weights.threshold is None or bool(weights.threshold.max() > 1.001 * weights.threshold.min()):
            had = "top-k" if weights.threshold is None else "a threshold for each latent"
            raise ConfigError(
                f"init_from: BatchTopKSAE starts from SAEs with one threshold for all latents, this one has {had}; "
                f"train variant {'topk' if weights.threshold is None else 'gated or jumprelu'} instead"
            )
        self.W_enc.copy_(weights.W_enc)
        self.b_enc.copy_(weights.b_enc + weights.W_enc @ weights.b_dec if self.pre_bias else weights.b_enc)
        self.W_dec.copy_(weights.W_dec)
        self.b_dec.copy_(weights.b_dec)
        self.threshold.value.copy_(weights.threshold.mean())

    @torch.no_grad()
    def fold(self) -> SAE:
        """Rule `threshold`, the same for all latents."""
        shift = self.b_dec if self.pre_bias else None
        threshold = self.threshold.value.to(self.b_enc.dtype).expand_as(self.b_enc)
        return self.folded(self.W_enc, self.b_enc, self.W_dec, self.b_dec, shift=shift, threshold=threshold)
