"""BatchTopK, after Bussmann, Leask and Nanda 2024."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops import BatchTopK, decode_beside, encode_beside, residual
from saeforge.variants import (
    SAE,
    Batch,
    BatchThreshold,
    DataStatistics,
    DecoderNorm,
    InputScale,
    Recipe,
    ScheduleValues,
    StepOutput,
    UnitDecoder,
    anneal,
)


@final
class BatchTopKSAE(UnitDecoder):
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
        decoder_norm: "unit": decoder rows have norm 1. "free": any, and latents are measured along them as if they had
            norm 1 (SAELens's `rescale_acts_by_decoder_norm`); see `UnitDecoder`. It learns more slowly, and better
            features in long runs.
    """

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
        decoder_norm: DecoderNorm = "unit",
    ) -> None:
        super().__init__(
            d_in,
            d_out,
            d_sae=d_sae,
            aux=aux,
            k_aux=k_aux,
            pre_bias=pre_bias,
            input_scale=input_scale,
            decoder_norm=decoder_norm,
        )
        for name, value in (("k", k), ("k_start", k if k_start is None else k_start)):
            if not 0 < value <= d_sae:
                raise ConfigError(f"{name} = {value} with d_sae = {d_sae}: expected 0 < {name} <= d_sae")
        if not 0 <= k_anneal_share <= 1:
            raise ConfigError(f"k_anneal_share = {k_anneal_share}: expected a share between 0 and 1")
        self.k, self.k_start, self.k_anneal_share = k, k_start, k_anneal_share
        self.threshold = BatchThreshold()
        self._select = BatchTopK(k)

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Unit decoder rows; encoder = decoder, as long as reconstructs best; b_dec the geometric median."""
        self.start_(stats, x, target, generator)
        self.lengthen_(self.best_length(x, target, BatchTopK(self.k)), stats)

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        """`k`, if it changes: linear from `k_start` to `k` over `k_anneal_share` of the run."""
        if self.k_start is None:
            return {}
        start, steps = self.k_start, round(self.k_anneal_share * total_steps)
        return {"k": lambda step: anneal(step, steps, start, self.k)}

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """Terms `mse` (over that of predicting the mean) and `aux`."""
        x, target = self.scaled(batch)
        dtype, dead = self.run.compute_dtype, self.auxk.latents(self)
        W_enc, b_enc, W_dec = self.unit_weights()
        self._select.mean = schedule.get("k", self.k)
        self._select.group = self.run.group
        selected, dead_pre = encode_beside(x, W_enc, b_enc, self._select, dead, shift=self.shift, dtype=dtype)
        code = selected.with_values(selected.values.relu())
        self.threshold.follow(code.values[: code.nnz], self.run.group, self.run.total_steps)
        dead_values = None if dead is None else self.auxk.values(self, dead_pre)
        rebuilt, dead_rebuilt = decode_beside(code, W_dec, dead, dead_values, dtype=dtype)
        error, squared_error = residual(target, rebuilt, self.b_dec)
        terms = {"mse": self.mean_rows(squared_error, batch.weight) / self.mse_of_mean}
        if self.auxk.coefficient > 0:
            none = squared_error.new_zeros(())
            terms["aux"] = none if dead is None else self.auxk.term(self, error, dead_rebuilt, batch.weight)
        return self.output(terms, code, squared_error)

    def recipe(self, total_steps: int) -> Recipe:
        """Adam(0.9, 0.99), lr 3e-4, constant; gradient norm at most 1 (the paper's 1e5 is none; others clip at 1).

        With free norms Adam(0.9, 0.999), as SAELens.
        """
        return Recipe(lr=3e-4, betas=(0.9, 0.99 if self.decoder_norm == "unit" else 0.999))

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
        self.take_(weights)
        self.threshold.value.copy_(weights.threshold.mean())

    @torch.no_grad()
    def fold(self) -> SAE:
        """Rule `threshold`, the same for all latents."""
        threshold = self.threshold.value.to(self.b_enc.dtype).expand_as(self.b_enc)
        return self.folded(*self.unit_weights(), self.b_dec, shift=self.shift, threshold=threshold)
