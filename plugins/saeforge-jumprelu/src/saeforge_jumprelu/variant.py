"""JumpReLU, after Rajamanoharan et al. 2024, Gemma Scope 2 and Anthropic's January 2025 update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.ops import Above, SparseCode, decode_beside, encode_beside, pick, row_norms
from saeforge.variants import (
    SAE,
    AuxK,
    Batch,
    DataStatistics,
    InputScale,
    Recipe,
    ScheduleValues,
    StepOutput,
    Variant,
    check_pre_bias,
    mean_norm_of_others,
    ramp,
    random_rows,
    random_unit_rows,
)
from saeforge_jumprelu.jump import REACH, Jump, Kernel
from saeforge_jumprelu.papers import PAPERS, Loss

#: Rows that the biases of the tanh recipe are set from, and latents that are set at a time.
_BIAS_ROWS, _BIAS_LATENTS = 4096, 1024


@final
class JumpReLU(Variant):
    """A learned threshold for each latent: `f = z 1[z > theta]` with `z = W_enc (x - b_dec) + b_enc`.

    The loss is `|x - x_hat|^2` and, by `loss`, lambda times
    "step": `sum_i 1[z_i > theta_i]`, L0 itself (Rajamanoharan et al. 2024, arXiv 2407.14435);
    "quadratic": `2 / T (L0 - T)^2` with T = `l0_target` (Gemma Scope 2);
    "tanh": `sum_i tanh(c f_i |w_dec_i|)`, and beside it `preact sum_i ReLU(theta_i - z_i) |w_dec_i|`, which pulls
    silent latents back (Anthropic, Circuits Updates, January 2025).
    Thresholds learn through pseudo-gradients. An option that is null has the value of the loss's paper.

    Args:
        d_in: width of the input.
        d_out: width of the target.
        d_sae: number of latents.
        loss: "step", "quadratic" or "tanh".
        sparsity: lambda; null: 1e-3, 2.5e-4, 10.
        sparsity_warmup_share: share of the run over which lambda rises linearly from 0; null: 10,000 steps, 50,000
            steps (both at most a tenth of the run), all of the run.
        l0_target: of "quadratic", the mean number of active latents per token.
        l0_over: "row": (L0 - T)^2 of each token, the papers'; "batch": of the mean over the batch, which lets tokens
            differ (dictionary_learning).
        frequency_scale: w of a further term `lambda sum_i p_i^2 / w` over the share p_i of tokens that fire latent i;
            0.1 keeps latents from firing on more than about a tenth of all tokens. null: none.
        bandwidth: width of the kernel in units of scaled pre-activations; null: 0.001, 0.001, 2.
        kernel: "rectangle" (all papers') or "triangle".
        window: "full": the density at a threshold counts what is within reach of it, the estimate of the papers;
            "positive": of these only positive pre-activations, which leaves the code sparser while the bandwidth is
            larger than the thresholds (OpenMOSS).
        input_gradient: whether pseudo-gradients also reach the pre-activations; null: false, false, true.
        threshold_init: thresholds at the start, in scaled units; null: 0.001, 0.001, 0.1.
        threshold_parameter: what is trained. "log": log theta, always positive (the papers'). "linear": theta, cut at
            0, which short runs need: Adam changes log theta by about the learning rate a step. "log_direct": log theta
            with the gradient by theta, without the chain rule's factor theta.
        preact: coefficient of the pre-activation term of "tanh".
        preact_over: "all" latents, as the paper says, or "dead" ones alone (SAELens).
        tanh_scale: c of "tanh".
        init_l0: of "tanh", the mean L0 that biases are set to at the start; at most half of d_sae.
        aux: coefficient of AuxK; the papers have none.
        k_aux: dead latents that AuxK uses per token; default: the power of two nearest to d_in / 2.
        b_dec_init: "zero", the papers', or "mean" of the target, which short runs need.
        pre_bias: subtract the decoder's bias before the encoder; null: true, true, false. False for a transcoder.
        input_scale: "rms", "sqrt_d" or "none"; null: "rms", "rms", "sqrt_d".
    """

    sparsity_schedule: str | None = "sparsity"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        d_sae: int = 4096,
        loss: Loss = "step",
        sparsity: float | None = None,
        sparsity_warmup_share: float | None = None,
        l0_target: float | None = None,
        l0_over: Literal["row", "batch"] = "row",
        frequency_scale: float | None = None,
        bandwidth: float | None = None,
        kernel: Kernel = "rectangle",
        window: Literal["full", "positive"] = "full",
        input_gradient: bool | None = None,
        threshold_init: float | None = None,
        threshold_parameter: Literal["log", "linear", "log_direct"] = "log",
        preact: float = 3e-6,
        preact_over: Literal["all", "dead"] = "all",
        tanh_scale: float = 4.0,
        init_l0: float = 10_000.0,
        aux: float = 0.0,
        k_aux: int | None = None,
        b_dec_init: Literal["zero", "mean"] = "zero",
        pre_bias: bool | None = None,
        input_scale: InputScale | None = None,
    ) -> None:
        for name, chosen, choices in (
            ("loss", loss, tuple(PAPERS)),
            ("kernel", kernel, tuple(REACH)),
            ("window", window, ("full", "positive")),
            ("l0_over", l0_over, ("row", "batch")),
            ("threshold_parameter", threshold_parameter, ("log", "linear", "log_direct")),
            ("preact_over", preact_over, ("all", "dead")),
            ("b_dec_init", b_dec_init, ("zero", "mean")),
        ):
            if chosen not in choices:
                raise ConfigError(f"{name} {chosen!r}: expected one of {', '.join(choices)}")
        paper = PAPERS[loss]
        super().__init__(d_in, d_out, d_sae=d_sae, input_scale=input_scale or paper.input_scale)
        if (loss == "quadratic") != (l0_target is not None) or not 0 < (1 if l0_target is None else l0_target) <= d_sae:
            raise ConfigError(
                f"loss {loss} with l0_target = {l0_target}: expected one between 0 and d_sae = {d_sae} with loss "
                "quadratic, and none with the others (model.target_l0 steers those)"
            )
        self.paper, self.loss, self.l0_target, self.l0_over = paper, loss, l0_target, l0_over
        self.sparsity = paper.sparsity if sparsity is None else sparsity
        self.sparsity_warmup_share = sparsity_warmup_share
        self.bandwidth = paper.bandwidth if bandwidth is None else bandwidth
        self.threshold_init = paper.threshold if threshold_init is None else threshold_init
        self.input_gradient = paper.input_gradient if input_gradient is None else input_gradient
        self.pre_bias = paper.pre_bias if pre_bias is None else pre_bias
        self.kernel, self.window = kernel, window
        self.threshold_parameter, self.b_dec_init = threshold_parameter, b_dec_init
        self.frequency_scale, self.preact, self.preact_over = frequency_scale, preact, preact_over
        self.tanh_scale, self.init_l0 = tanh_scale, init_l0
        for name, value in {
            "bandwidth": self.bandwidth,
            "threshold_init": self.threshold_init,
            "tanh_scale": tanh_scale,
            "init_l0": init_l0,
            "frequency_scale": 1.0 if frequency_scale is None else frequency_scale,
        }.items():
            if not value > 0:
                raise ConfigError(f"{name} = {value}: expected a positive number")
        share = sparsity_warmup_share
        if self.sparsity < 0 or preact < 0 or not 0 <= (0.0 if share is None else share) <= 1:
            raise ConfigError(
                f"sparsity = {sparsity}, preact = {preact}, sparsity_warmup_share = {share}: expected coefficients of "
                "at least 0, and a share between 0 and 1"
            )
        if loss == "quadratic":
            self.sparsity_schedule = None  # its L0 is the target
        self.auxk = AuxK.of(aux, k_aux, d_in)
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.threshold = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Random decoder directions, the encoder equal to them, biases 0.

        With loss "tanh" entries of the decoder are uniform in +-1 / sqrt(d), the encoder is that times d / d_sae, and
        each latent's bias lets it fire on a share `init_l0 / d_sae` of the rows.
        """
        check_pre_bias(self.pre_bias, x, target)
        self.set_scale(stats)
        self.set_thresholds_(torch.full_like(self.b_enc, self.threshold_init))
        rows = [self._rows(self.d_out, generator)]
        rows.append(rows[0] if self.d_in == self.d_out else self._rows(self.d_in, generator))
        self.W_dec.copy_(rows[0])
        self.W_enc.copy_(rows[1])
        self.b_enc.zero_()
        self.b_dec.zero_()
        if self.b_dec_init == "mean":
            mean = torch.tensor(stats.target.mean, dtype=self.b_dec.dtype, device=self.b_dec.device)
            self.b_dec.copy_(mean * self.target_scale)
        if self.loss == "tanh":
            self.W_enc.mul_(self.d_in / self.d_sae)
            sample = x[:: max(1, len(x) // _BIAS_ROWS)].to(self.W_enc) * self.scale
            self._set_rates_(sample - self.b_dec if self.pre_bias else sample)

    def _rows(self, d: int, generator: torch.Generator) -> Tensor:
        if self.paper.unit_norm:
            return random_unit_rows(self.d_sae, d, generator)
        return (2 * random_rows(self.d_sae, d, generator, torch.rand) - 1) / math.sqrt(d)

    def _set_rates_(self, x: Tensor) -> None:
        """Biases such that each latent fires on the same share of rows (n, d_in), as near as they allow."""
        rank = max(1, round(min(self.init_l0 / self.d_sae, 0.5) * len(x)))
        for weight, bias, theta in zip(
            *(part.split(_BIAS_LATENTS) for part in (self.W_enc, self.b_enc, self.thresholds())), strict=True
        ):
            bias.copy_(theta - (weight @ x.T).topk(min(rank + 1, len(x)), dim=1).values[:, -1])

    def thresholds(self) -> Tensor:
        """(d_sae,) in scaled units, differentiable."""
        return self.threshold.clamp_min(0) if self.threshold_parameter == "linear" else self.threshold.exp()

    @torch.no_grad()
    def set_thresholds_(self, theta: Tensor) -> None:
        """Sets them to (d_sae,) positive numbers."""
        self.threshold.copy_(theta if self.threshold_parameter == "linear" else theta.log())

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        """`sparsity`: linear from 0 to the coefficient, then constant."""
        share = self.sparsity_warmup_share
        warmup = self.paper.warmup(total_steps) if share is None else round(share * total_steps)
        return {"sparsity": lambda step: self.sparsity * ramp(step, warmup)}

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """Terms `mse` (summed over dimensions), `sparsity`, and by options `frequency`, `preact`, `aux`."""
        x, target = self.scaled(batch)
        shift = self.b_dec if self.pre_bias else None
        dtype, theta, dead = self.run.compute_dtype, self.thresholds(), self._beside()
        lowest = theta.detach() - REACH[self.kernel] * self.bandwidth
        select = Above(lowest if self.window == "full" else lowest.clamp_min(0))
        near, dead_pre = encode_beside(x, self.W_enc, self.b_enc, select, dead, shift=shift, dtype=dtype)
        jump = Jump.of(
            near.values,
            theta.detach()[near.indices],
            # Not theta where its own gradient ends: a threshold that went below 0 must find its way back.
            pick(theta if self.threshold_parameter == "log" else self.threshold, near),
            kernel=self.kernel,
            bandwidth=self.bandwidth,
            through_input=self.input_gradient,
        )
        code = near.with_values(jump.values())
        with_aux = dead is not None and self.auxk.coefficient > 0
        dead_values = self.auxk.values(self, dead_pre) if with_aux else None
        rebuilt, dead_rebuilt = decode_beside(code, self.W_dec, dead if with_aux else None, dead_values, dtype=dtype)
        error = target - (rebuilt + self.b_dec)
        squared_error = error.square().sum(1)
        terms = {"mse": self.mean_rows(squared_error, batch.weight)}
        steps = jump.steps()
        terms["sparsity"] = schedule["sparsity"] * self._penalty(code, steps, batch.weight)
        if self.frequency_scale is not None:
            shares = self._shares(code, steps, batch.weight)
            terms["frequency"] = schedule["sparsity"] * self.sum_latents(shares.square().sum()) / self.frequency_scale
        if self.loss == "tanh" and self.preact > 0:
            pulled = self._pull_dead(dead, dead_pre, theta, batch) if self.preact_over == "dead" else None
            terms["preact"] = self.preact * (self._pull_all(x, code, jump, theta, batch) if pulled is None else pulled)
        if self.auxk.coefficient > 0:
            none = squared_error.new_zeros(())
            terms["aux"] = self.auxk.term(self, error, dead_rebuilt, batch.weight) if with_aux else none
        return self.output(terms, code, squared_error)

    def _beside(self) -> Tensor | None:
        """(n,) the dead latents whose pre-activations are wanted, or None."""
        if self.auxk.coefficient > 0 or (self.loss == "tanh" and self.preact > 0 and self.preact_over == "dead"):
            return self.dead_latents() if sum(self.dead_by_rank()) else None
        return None

    def _penalty(self, code: SparseCode, steps: Tensor, weight: Tensor | None) -> Tensor:
        """The sparsity term without its coefficient. steps: (nnz,) 1 where active."""
        if self.loss == "tanh":
            lengths = code.values * pick(row_norms(self.W_dec), code)
            return self.mean_entries(torch.tanh(self.tanh_scale * lengths), code, weight)
        if self.l0_target is None:
            return self.mean_entries(steps, code, weight)
        if self.l0_over == "batch":
            l0 = self._over_ranks(self.mean_entries(steps, code, weight))
            return 2 / self.l0_target * (l0 - self.l0_target).square()
        l0 = self.sum_latents(steps.new_zeros(code.n_rows).index_add(0, code.rows(), steps))
        return 2 / self.l0_target * self.mean_rows((l0 - self.l0_target).square(), weight)

    def _shares(self, code: SparseCode, steps: Tensor, weight: Tensor | None) -> Tensor:
        """(d_sae,) the share of rows, over all ranks, in which each latent is active."""
        if weight is None:
            parts = steps / code.n_rows
        else:
            parts = steps * weight[code.rows()] / self.run.group.mean(weight.sum())
        return self._over_ranks(parts.new_zeros(len(self.W_dec)).index_add(0, code.indices, parts))

    def _over_ranks(self, own: Tensor) -> Tensor:
        """The mean over ranks, with the gradient of this rank's share: the ranks' gradients are averaged later."""
        return own + (self.run.group.mean(own) - own.detach())

    def _pull_all(self, x: Tensor, code: SparseCode, jump: Jump, theta: Tensor, batch: Batch) -> Tensor:
        """Mean over rows of `sum_i ReLU(theta_i - z_i) |w_dec_i|`, without any (B, d_sae) tensor.

        ReLU(-a) = a 1[a > 0] - a, and the sum over rows of a = z - theta is linear: it needs the mean row alone.
        """
        norms = row_norms(self.W_dec)
        shifted = x - self.b_dec if self.pre_bias else x
        if batch.weight is None:
            mean, rows = shifted.mean(0), shifted.new_ones(())
        else:
            whole = self.run.group.mean(batch.weight.sum())
            mean, rows = batch.weight.to(shifted.dtype) @ shifted / whole, batch.weight.sum() / whole
        everywhere = self.sum_latents(norms @ ((theta - self.b_enc) * rows - self.W_enc @ self.for_latents(mean)))
        above = jump.active * (jump.z - pick(theta, code)) * pick(norms, code)
        return everywhere + self.mean_entries(above, code, batch.weight)

    def _pull_dead(self, dead: Tensor | None, pre: Tensor, theta: Tensor, batch: Batch) -> Tensor:
        """The same of the dead latents (n,) alone, from their pre-activations (B, n)."""
        if dead is None:
            return pre.new_zeros(())
        return self.sum_latents(self.mean_rows((theta[dead] - pre).relu() @ row_norms(self.W_dec)[dead], batch.weight))

    def param_groups(self) -> list[dict[str, Any]]:
        """Decoder rows of norm 1, unless the loss is "tanh"; the rest free."""
        return [
            {"params": [self.W_dec], "constraint": "unit_norm" if self.paper.unit_norm else None},
            {"params": [self.W_enc, self.b_enc, self.threshold, self.b_dec], "constraint": None},
        ]

    def recipe(self, total_steps: int) -> Recipe:
        """Adam(0, 0.999), lr 7e-5 after a cosine warm-up of 1,000 steps, gradient norm at most 1.

        With loss "tanh" Adam(0.9, 0.999), lr 2e-4, decayed to 0 over the last fifth, gradient norm at most 1.
        """
        return self.paper.recipe(total_steps)

    @torch.no_grad()
    def reset_latents_(self, latents: Tensor, x: Tensor, target: Tensor) -> list[nn.Parameter]:
        """Decoder rows point at the rows, the encoder too at 0.2 of the others' norm; thresholds as at the start."""
        shifted = x - self.b_dec if self.pre_bias else x
        self.W_dec[latents] = F.normalize(target, dim=1) * mean_norm_of_others(self.W_dec, latents)
        self.W_enc[latents] = F.normalize(shifted, dim=1) * (0.2 * mean_norm_of_others(self.W_enc, latents))
        self.b_enc[latents] = 0.0
        log = self.threshold_parameter != "linear"
        self.threshold[latents] = math.log(self.threshold_init) if log else self.threshold_init
        return [self.W_dec, self.W_enc, self.b_enc, self.threshold]

    @torch.no_grad()
    def unfold_(self, sae: SAE) -> None:
        """Exact for any SAE with thresholds; those of 0 need `threshold_parameter: linear`.

        Raises:
            ConfigError: a top-k SAE, or a threshold whose logarithm is not finite.
        """
        weights = self.unfolded(sae)
        if weights.threshold is None:
            raise ConfigError(
                "init_from: JumpReLU starts from SAEs with thresholds, this one has top-k; train variant topk"
            )
        if self.threshold_parameter != "linear" and bool((weights.threshold <= 0).any()):
            raise ConfigError(
                "init_from: some thresholds of this SAE are 0 and have no logarithm; set threshold_parameter to linear"
            )
        self.W_enc.copy_(weights.W_enc)
        self.b_enc.copy_(weights.b_enc + weights.W_enc @ weights.b_dec if self.pre_bias else weights.b_enc)
        self.set_thresholds_(weights.threshold)
        self.W_dec.copy_(weights.W_dec)
        self.b_dec.copy_(weights.b_dec)

    @torch.no_grad()
    def fold(self) -> SAE:
        """Rule `threshold`."""
        shift = self.b_dec if self.pre_bias else None
        return self.folded(self.W_enc, self.b_enc, self.W_dec, self.b_dec, shift=shift, threshold=self.thresholds())
