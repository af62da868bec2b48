"""`UnitDecoder`: what variants share that have one encoder, a decoder of unit rows, and select by size (topk's kin)."""

from __future__ import annotations

from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.ops import Selection, decode, encode
from saeforge.variants.auxk import AuxK
from saeforge.variants.base import Variant
from saeforge.variants.contract import DataStatistics, Unfolded
from saeforge.variants.start import (
    InputScale,
    check_pre_bias,
    geometric_median,
    least_squares_factor,
    mean_norm_of_others,
    random_unit_rows,
)

DecoderNorm = Literal["unit", "free"]
#: Norm of free rows at the start, as Conerly et al. 2024.
FREE_START = 0.1


class UnitDecoder(Variant):
    """Weights, their start and their constraint; the selection, the loss and the fold are the variant's.

    Latents are measured along unit decoder rows in either case. With `decoder_norm` "unit" the rows of W_dec are these.
    With "free" they have any length, and `unit_weights` are `|w_dec| w_enc, |w_dec| b_enc, w_dec / |w_dec|`: the
    gradient is then at right angles to the rows, which grow under Adam and turn ever more slowly.

    Args:
        d_in: width of the input. d_out: width of the target. d_sae: number of latents.
        aux: coefficient of AuxK. k_aux: its latents per token, or None; see `AuxK.of`.
        pre_bias: subtract the decoder's bias before the encoder.
        input_scale: see `Variant`. decoder_norm: "unit" or "free".

    Attributes:
        mse_of_mean: squared error of predicting the mean, in scaled units.
    """

    mse_of_mean: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        d_sae: int,
        aux: float,
        k_aux: int | None,
        pre_bias: bool,
        input_scale: InputScale,
        decoder_norm: DecoderNorm = "unit",
    ) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae, input_scale=input_scale)
        if decoder_norm not in ("unit", "free"):
            raise ConfigError(f"decoder_norm {decoder_norm!r}: expected 'unit' or 'free'")
        self.decoder_norm = decoder_norm
        self.pre_bias, self.auxk = pre_bias, AuxK.of(aux, k_aux, d_in)
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("mse_of_mean", torch.ones(()))

    @property
    def shift(self) -> Tensor | None:
        """(d_in,) what the encoder subtracts from the input, or None."""
        return self.b_dec if self.pre_bias else None

    @final
    def unit_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """(d_sae, d_in), (d_sae,), (d_sae, d_out): encoder, its bias, and the decoder of unit rows; differentiable."""
        if self.decoder_norm == "unit":
            return self.W_enc, self.b_enc, self.W_dec
        norm = self.W_dec.norm(dim=1).clamp_min(1e-12)
        return self.W_enc * norm[:, None], self.b_enc * norm, self.W_dec / norm[:, None]

    @final
    @torch.no_grad()
    def start_(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Scales, unit decoder rows, the encoder equal to them, b_dec at the geometric median; see `initialise`.

        Without the tied start most latents die (Gao et al. 2024, section 2.4).
        """
        check_pre_bias(self.pre_bias, x, target)
        self.set_scale(stats)
        self.mse_of_mean.fill_(max(sum(stats.target.variance) * self.target_scale.item() ** 2, 1e-30))
        self.W_dec.copy_(random_unit_rows(self.d_sae, self.d_out, generator))
        same = self.d_in == self.d_out
        self.W_enc.copy_(self.W_dec if same else random_unit_rows(self.d_sae, self.d_in, generator))
        self.b_enc.zero_()
        self.b_dec.copy_(geometric_median(target[:32768].to(self.b_dec.dtype) * self.target_scale))

    @final
    @torch.no_grad()
    def lengthen_(self, factor: Tensor, stats: DataStatistics) -> None:
        """Scales the encoder; without a pre-encoder bias, its bias then takes the mean of the input away.

        Free rows start as SAELens's: short, the encoder with them, and b_dec at 0.
        """
        if self.decoder_norm == "free":
            self.W_dec.mul_(FREE_START)
            factor = torch.full_like(factor, FREE_START)
            self.b_dec.zero_()
        self.W_enc.mul_(factor)
        if not self.pre_bias:
            mean = torch.tensor(stats.input.mean, dtype=self.b_enc.dtype, device=self.b_enc.device)
            self.b_enc.copy_(-self.W_enc @ (mean * self.scale))

    @final
    @torch.no_grad()
    def best_length(self, x: Tensor, target: Tensor, select: Selection) -> Tensor:
        """The factor of the encoder that makes the first reconstruction of about 4,096 rows best, a scalar."""
        every = max(1, len(x) // 4096)
        rows = x[::every].to(self.W_enc) * self.scale
        center = self.b_dec if self.pre_bias else rows.mean(0)
        wanted = target[::every].to(self.W_dec) * self.target_scale - self.b_dec
        return least_squares_factor(wanted, self.first_reconstruction(rows - center, select))

    @final
    def first_reconstruction(self, shifted: Tensor, select: Selection) -> Tensor:
        """(n, d_out) of rows (n, d_in) in scaled units from which the centre is taken away, without any bias."""
        code = encode(shifted, self.W_enc, None, select)
        return decode(code.with_values(code.values.relu()), self.W_dec)

    @final
    def param_groups(self) -> list[dict[str, Any]]:
        """Decoder rows of norm 1, unless their norm is free; the rest free."""
        return [
            {"params": [self.W_dec], "constraint": "unit_norm" if self.decoder_norm == "unit" else None},
            {"params": [self.W_enc, self.b_enc, self.b_dec], "constraint": None},
        ]

    @final
    @torch.no_grad()
    def reset_latents_(self, latents: Tensor, x: Tensor, target: Tensor) -> list[nn.Parameter]:
        """Decoder rows point at the rows, the encoder at them without the pre-encoder bias, as long as the others'.

        Not at 0.2 of that, as a ReLU's: a latent that is never among the k largest gets no gradient.
        """
        shifted = x - self.b_dec if self.pre_bias else x
        length = 1.0 if self.decoder_norm == "unit" else mean_norm_of_others(self.W_dec, latents)
        self.W_dec[latents] = F.normalize(target, dim=1) * length
        self.W_enc[latents] = F.normalize(shifted, dim=1) * mean_norm_of_others(self.W_enc, latents)
        self.b_enc[latents] = 0.0
        return [self.W_dec, self.W_enc, self.b_enc]

    @final
    @torch.no_grad()
    def take_(self, weights: Unfolded) -> None:
        """Sets the weights to those of an unfolded SAE, for `unfold_`."""
        self.W_enc.copy_(weights.W_enc)
        self.b_enc.copy_(weights.b_enc + weights.W_enc @ weights.b_dec if self.pre_bias else weights.b_enc)
        self.W_dec.copy_(weights.W_dec)
        self.b_dec.copy_(weights.b_dec)
