"""Matryoshka SAEs, after Bussmann, Nabeshima, Karvonen and Nanda 2025."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, final

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops import BatchTopK, TopK, decode_beside, encode_beside
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
)
from saeforge_matryoshka.prefixes import group_ends, random_ends


@final
class Matryoshka(UnitDecoder):
    """Nested dictionaries in one (Bussmann et al. 2025, arXiv 2503.17547; Nabeshima 2024).

    `f = select(ReLU(W_enc (x - b_dec) + b_enc))` over all latents at once, and for the prefix m of the dictionary
    `x_hat_m = f[:m] W_dec[:m] + b_dec`. The loss is the mean over prefixes of their squared errors, over that of
    predicting the mean, and AuxK on the error of the whole. Decoder rows have norm 1.

    One decode gives every group's share of the reconstruction, and prefixes are cumulative sums over groups; their
    gradient is the sum of residuals over suffixes, which autograd makes of it. Implementations disagree on whether the
    prefixes' errors are summed or averaged; averaged, the learning rate and `aux` mean what they mean for BatchTopK.

    Args:
        d_in: width of the input.
        d_out: width of the target.
        d_sae: number of latents.
        k: active latents per token; on average, under "batch_topk".
        groups: widths of the groups, or their shares of d_sae; what remains is a last one. Null: SAEBench's 1/32, 1/16,
            1/8, 1/4, the rest. The paper: 1/16, 1/16, 1/8, 1/4, 1/2.
        group_weights: weight of each prefix's error, one for each group; null is 1 for all.
        random_prefixes: this many prefixes, drawn anew at every step, take the place of `groups`; 0 keeps them fixed.
        prefix_exponent: of the Pareto law of random prefixes; smaller ones favour long prefixes.
        selection: "batch_topk" (the paper) or "topk".
        aux: coefficient of AuxK; 0 turns it off.
        k_aux: dead latents that AuxK uses per token; default: the power of two nearest to d_in / 2 (the paper: 512).
        pre_bias: subtract the decoder's bias before the encoder; false for a transcoder.
        input_scale: "rms", "sqrt_d" or "none".
        decoder_norm: "unit": decoder rows have norm 1. "free": any, and latents are measured along them as if they had
            norm 1 (SAELens's `rescale_acts_by_decoder_norm`); see `UnitDecoder`. It learns more slowly, and better
            features in long runs.
    """

    ends: Tensor
    weights: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        d_sae: int = 4096,
        k: int = 32,
        groups: Sequence[float] | None = None,
        group_weights: Sequence[float] | None = None,
        random_prefixes: int = 0,
        prefix_exponent: float = 0.5,
        selection: Literal["batch_topk", "topk"] = "batch_topk",
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
        if not 1 <= k <= d_sae:
            raise ConfigError(f"k = {k} with d_sae = {d_sae}: expected 1 <= k <= d_sae")
        if selection not in ("batch_topk", "topk"):
            raise ConfigError(f"selection {selection!r}: expected 'batch_topk' or 'topk'")
        if random_prefixes and (groups is not None or group_weights is not None):
            raise ConfigError("random_prefixes take the place of groups and group_weights; give one or the other")
        if not 0 <= random_prefixes <= d_sae or random_prefixes == 1 or prefix_exponent <= 0:
            raise ConfigError(
                f"random_prefixes = {random_prefixes}, prefix_exponent = {prefix_exponent}: expected 0, or 2 to d_sae, "
                "and a positive exponent"
            )
        ends = (d_sae,) * random_prefixes or group_ends(groups, d_sae)
        given = [1.0] * len(ends) if group_weights is None else list(group_weights)
        if len(given) != len(ends) or min(given) < 0 or given[-1] <= 0:
            raise ConfigError(
                f"group_weights = {given}: expected {len(ends)} weights of at least 0, and one above 0 for the whole"
            )
        self.k, self.selection = k, selection
        self.random_prefixes, self.prefix_exponent = random_prefixes, prefix_exponent
        self.threshold = BatchThreshold()
        self._select = BatchTopK(k) if selection == "batch_topk" else TopK(k)
        self.register_buffer("ends", torch.tensor(ends), persistent=False)
        self.register_buffer("weights", torch.tensor(given), persistent=False)

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Unit decoder rows; encoder = decoder, as long as reconstructs best; b_dec the geometric median."""
        self.start_(stats, x, target, generator)
        select = BatchTopK(self.k) if self.selection == "batch_topk" else TopK(self.k)
        self.lengthen_(self.best_length(x, target, select), stats)

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        """None."""
        return {}

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """Terms `mse` (mean over prefixes, over that of predicting the mean) and `aux`."""
        x, target = self.scaled(batch)
        dtype, dead = self.run.compute_dtype, self.auxk.latents(self)
        W_enc, b_enc, W_dec = self.unit_weights()
        if isinstance(self._select, BatchTopK):
            self._select.group = self.run.group
        selected, dead_pre = encode_beside(x, W_enc, b_enc, self._select, dead, shift=self.shift, dtype=dtype)
        code = selected.with_values(selected.values.relu())
        if self.selection == "batch_topk":
            self.threshold.follow(code.values[: code.nnz], self.run.group, self.run.total_steps)
        dead_values = None if dead is None else self.auxk.values(self, dead_pre)
        ends = self._prefixes()
        by_group, dead_rebuilt = decode_beside(code.split(ends), W_dec, dead, dead_values, dtype=dtype)
        rebuilt = by_group.view(len(x), len(ends), self.d_out).cumsum(1)
        errors = (target - self.b_dec)[:, None] - rebuilt
        by_prefix = errors.square().sum(2)
        weights = self.weights.to(by_prefix.dtype)
        terms = {"mse": self.mean_rows(by_prefix @ (weights / weights.sum()), batch.weight) / self.mse_of_mean}
        if self.auxk.coefficient > 0:
            none = by_prefix.new_zeros(())
            terms["aux"] = none if dead is None else self.auxk.term(self, errors[:, -1], dead_rebuilt, batch.weight)
        return self.output(terms, code, by_prefix[:, -1])

    def _prefixes(self) -> Tensor:
        """(n,) int64: where the prefixes of this step end. Random ones are a function of the step, on all ranks."""
        if not self.random_prefixes:
            return self.ends
        generator = torch.Generator().manual_seed(self.observed())
        return random_ends(self.random_prefixes, self.d_sae, self.prefix_exponent, generator).to(self.ends.device)

    def recipe(self, total_steps: int) -> Recipe:
        """Adam(0.9, 0.99), lr 3e-4, constant, gradient norm at most 1; with free norms Adam(0.9, 0.999), as SAELens."""
        return Recipe(lr=3e-4, betas=(0.9, 0.99 if self.decoder_norm == "unit" else 0.999))

    @torch.no_grad()
    def unfold_(self, sae: SAE) -> None:
        """Exact for an SAE as `fold` makes them; its latents keep their order, and with it their prefixes.

        Raises:
            ConfigError: another rule or k, or latents with thresholds of their own.
        """
        weights = self.unfolded(sae)
        if self.selection == "topk" and sae.k != self.k:
            raise ConfigError(
                f"init_from: this run selects the {self.k} largest, the SAE has {sae.rule} of k = {sae.k}; "
                "set variant.selection and variant.k as there"
            )
        if self.selection == "batch_topk" and (
            weights.threshold is None or bool(weights.threshold.max() > 1.001 * weights.threshold.min())
        ):
            raise ConfigError(
                "init_from: Matryoshka under batch_topk starts from SAEs with one threshold for all latents; this one "
                f"has {'top-k: set variant.selection to topk' if weights.threshold is None else 'one for each'}"
            )
        self.take_(weights)
        if weights.threshold is not None:
            self.threshold.value.copy_(weights.threshold.mean())

    @torch.no_grad()
    def fold(self) -> SAE:
        """Rule `threshold`, the same for all latents; `topk` under that selection."""
        weights = (*self.unit_weights(), self.b_dec)
        if self.selection == "topk":
            return self.folded(*weights, shift=self.shift, k=self.k)
        threshold = self.threshold.value.to(self.b_enc.dtype).expand_as(self.b_enc)
        return self.folded(*weights, shift=self.shift, threshold=threshold)
