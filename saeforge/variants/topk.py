"""TopK with AuxK, after Gao et al. 2024."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.errors import ConfigError
from saeforge.ops import TopK as SelectTopK
from saeforge.ops import decode_beside, encode_beside, residual
from saeforge.sae import SAE
from saeforge.schedules import anneal
from saeforge.variants.contract import DataStatistics, Recipe, ScheduleValues, StepOutput
from saeforge.variants.start import (
    InputScale,
    random_unit_rows,
)
from saeforge.variants.unit_decoder import DecoderNorm, UnitDecoder

log = logging.getLogger("saeforge.variants")

EncoderInit = Literal["least_squares", "unit_probes", "tied"]


@final
class TopK(UnitDecoder):
    """The k largest latents of each token (Gao et al., "Scaling and evaluating sparse autoencoders", arXiv 2406.04093).

    `f = ReLU(TopK(W_enc (x - b_dec) + b_enc))`, `x_hat = f W_dec + b_dec`, loss `mse / mse_of_the_mean + aux * AuxK`:
    the k_aux strongest *dead* latents reconstruct the residual that the live ones leave. Decoder rows have norm 1.
    Differs from the paper in two points: inputs are scaled by one scalar of the dataset, not normalised token by token,
    which could not be folded into weights; and the encoder starts shorter (`encoder_init`).

    Args:
        d_in: width of the input.
        d_out: width of the target.
        d_sae: number of latents.
        k: active latents per token.
        k_start: k at the first step, if it falls (or rises) to `k` on the way; null is `k`.
        k_anneal_share: share of the run over which it does.
        multi_k: Multi-TopK (their section 5.4): the loss of `multi_k * k` latents is added, so that the dictionary
            serves other k too; the paper's is 4. Null: none.
        multi_k_weight: of that loss; the paper's is 1/8.
        aux: coefficient of AuxK; 0 turns it off.
        k_aux: dead latents that AuxK uses per token; default: the power of two nearest to d_in / 2.
        encoder_init: length of the encoder rows at the start, which begin as copies of the decoder's.
            "least_squares": the factor that makes the first reconstruction of data rows best, so that short runs
            get further (MiniLM, 2,048 latents, k 32, 300 steps: FVU 0.16 instead of 0.19). "unit_probes": the
            paper's, reconstructions of 256 random unit vectors keep their norm. "tied": rows equal the decoder's.
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
        k: int = 32,
        k_start: int | None = None,
        k_anneal_share: float = 0.1,
        multi_k: int | None = None,
        multi_k_weight: float = 1 / 8,
        aux: float = 1 / 32,
        k_aux: int | None = None,
        encoder_init: EncoderInit = "least_squares",
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
        if not 1 <= k <= d_sae:
            raise ConfigError(f"k = {k} with d_sae = {d_sae}: expected 1 <= k <= d_sae")
        most = max(k, k_start or k)
        if (k_start is not None and not 1 <= k_start <= d_sae) or not 0 <= k_anneal_share <= 1:
            raise ConfigError(
                f"k_start = {k_start}, k_anneal_share = {k_anneal_share}: expected 1 <= k_start <= d_sae and a share"
            )
        if multi_k is not None and not (2 <= multi_k and multi_k * most <= d_sae and multi_k_weight > 0):
            raise ConfigError(
                f"multi_k = {multi_k}, multi_k_weight = {multi_k_weight}: expected a multiple of at least 2 with "
                f"multi_k * {most} <= d_sae = {d_sae}, and a positive weight"
            )
        if encoder_init not in ("least_squares", "unit_probes", "tied"):
            raise ConfigError(f"encoder_init {encoder_init!r}: expected 'least_squares', 'unit_probes' or 'tied'")
        self.k, self.encoder_init = k, encoder_init
        self.k_start, self.k_anneal_share = k_start, k_anneal_share
        self.multi_k, self.multi_k_weight = multi_k, multi_k_weight

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Unit decoder rows; encoder = decoder, scaled as `encoder_init` says; b_dec the geometric median.

        Without the tied start most latents die (Gao et al., section 2.4).
        """
        self.start_(stats, x, target, generator)
        self.lengthen_(self._encoder_scale(x, target, generator), stats)

    def _encoder_scale(self, x: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """The factor that `encoder_init` asks for, with the weights as they are."""
        if self.encoder_init == "tied":
            return torch.ones_like(self.scale)
        if self.encoder_init == "unit_probes":
            probes = random_unit_rows(256, self.d_in, generator, latents=False).to(self.W_enc)
            norms: Tensor = self.first_reconstruction(probes, SelectTopK(self.k)).norm(dim=1)
            return norms.mean().reciprocal()
        return self.best_length(x, target, SelectTopK(self.k))

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        """`k`, if it changes: linear from `k_start` to `k` over `k_anneal_share` of the run, rounded."""
        if self.k_start is None:
            return {}
        start, steps = self.k_start, round(self.k_anneal_share * total_steps)
        return {"k": lambda step: round(anneal(step, steps, start, self.k))}

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """Terms `mse` (over that of predicting the mean), `multi_mse` (the same with `multi_k * k`) and `aux`."""
        x, target = self.scaled(batch)
        dtype, dead = self.run.compute_dtype, self.auxk.latents(self)
        W_enc, b_enc, W_dec = self.unit_weights()
        k = int(schedule.get("k", self.k))
        select = SelectTopK(k * (self.multi_k or 1))
        selected, dead_pre = encode_beside(x, W_enc, b_enc, select, dead, shift=self.shift, dtype=dtype)
        code = selected.with_values(selected.values.relu())
        dead_values = None if dead is None else self.auxk.values(self, dead_pre)
        terms = {}
        if self.multi_k is None:
            rebuilt, dead_rebuilt = decode_beside(code, W_dec, dead, dead_values, dtype=dtype)
        else:  # one selection and one decode for both: the k largest, and what the others add
            code, halves = code.largest(k)
            parts, dead_rebuilt = decode_beside(halves, W_dec, dead, dead_values, dtype=dtype)
            rebuilt, others = parts.view(len(x), 2, self.d_out).unbind(1)
            _, wide_error = residual(target, rebuilt + others, self.b_dec)
            multi_mse = self.mean_rows(wide_error, batch.weight) / self.mse_of_mean
            terms["multi_mse"] = self.multi_k_weight * multi_mse
        error, squared_error = residual(target, rebuilt, self.b_dec)
        terms["mse"] = self.mean_rows(squared_error, batch.weight) / self.mse_of_mean
        if self.auxk.coefficient > 0:
            none = squared_error.new_zeros(())
            terms["aux"] = none if dead is None else self.auxk.term(self, error, dead_rebuilt, batch.weight)
        return self.output(terms, code, squared_error)

    def recipe(self, total_steps: int) -> Recipe:
        """Adam(0.9, 0.999, eps 6.25e-10), lr 2e-4 / sqrt(d_sae / 2^14), constant, gradient norm at most 1."""
        return Recipe(lr=2e-4 / (self.d_sae / 2**14) ** 0.5, eps=6.25e-10)

    @torch.no_grad()
    def unfold_(self, sae: SAE) -> None:
        """Exact for a top-k SAE of the same k with decoder rows of one norm; others give their weights; it is logged.

        Raises:
            ConfigError: other widths, or a skip connection.
        """
        weights = self.unfolded(sae)
        if sae.k != self.k:
            had = "thresholds" if sae.k is None else f"k = {sae.k}"
            log.warning(
                "init_from: the SAE has %s, this run k = %d: the weights are the same, other latents are active",
                had,
                self.k,
            )
        self.take_(weights)

    @torch.no_grad()
    def fold(self) -> SAE:
        """Rule `topk`."""
        return self.folded(*self.unit_weights(), self.b_dec, shift=self.shift, k=self.k)
