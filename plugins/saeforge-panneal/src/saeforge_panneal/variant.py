"""P-annealing, after Karvonen et al. 2024."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.ops import Above, decode, encode
from saeforge.variants import (
    SAE,
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
    random_unit_rows,
)
from saeforge_panneal.annealing import Strength, level, p_at


@final
class PAnneal(Variant):
    """ReLU latents under an L_p penalty whose p falls from 1 (Karvonen et al. 2024, arXiv 2408.00113).

    `f = ReLU(W_enc (x - b_dec) + b_enc)`, `x_hat = f W_dec + b_dec`, loss `|x - x_hat|^2 + lambda s sum_i f_i^p`. At
    p = 1 that is L1; the smaller p, the nearer to L0, and the less strong latents are shrunk. s makes up for the change
    of the sum when p changes, from the last batches. Decoder rows have norm 1.

    Args:
        d_in: width of the input.
        d_out: width of the target.
        d_sae: number of latents.
        sparsity: lambda, for inputs with a mean squared norm of 1.
        sparsity_warmup_share: share of the run over which lambda rises linearly from 0; null: 5,000 steps, or a
            tenth of the run if that is shorter (dictionary_learning).
        p_start: p at the start.
        p_end: p at the end.
        anneal_start_share: share of the run after which p begins to fall; null: 10,000 steps, or a fifth of the run.
        updates: steps in which p falls; at most as many as the run has steps after the start.
        queue: batches whose mean decides s.
        eps: `f^p` is `(f + eps)^p - eps^p`, whose slope at 0 is finite: 50 at p = 0.2 with 1e-3, where 0 would give a
            latent that is hardly active all of the gradient.
        b_dec_init_mean: whether the decoder's bias starts at the mean of the target instead of 0 (theirs).
        pre_bias: subtract the decoder's bias before the encoder; false for a transcoder.
        input_scale: "rms", "sqrt_d" or "none".
    """

    sparsity_schedule = "sparsity"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        d_sae: int = 4096,
        sparsity: float = 0.02,
        sparsity_warmup_share: float | None = None,
        p_start: float = 1.0,
        p_end: float = 0.2,
        anneal_start_share: float | None = None,
        updates: int = 10,
        queue: int = 10,
        eps: float = 1e-3,
        b_dec_init_mean: bool = False,
        pre_bias: bool = True,
        input_scale: InputScale = "rms",
    ) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae, input_scale=input_scale)
        if not 0 < p_end <= p_start:
            raise ConfigError(f"p_start = {p_start}, p_end = {p_end}: expected 0 < p_end <= p_start")
        if updates < 1 or queue < 1 or eps <= 0 or sparsity < 0:
            raise ConfigError(
                f"updates = {updates}, queue = {queue}, eps = {eps}, sparsity = {sparsity}: expected at least one "
                "update and one batch, a positive eps, and a coefficient of at least 0"
            )
        for name, share in (
            ("sparsity_warmup_share", sparsity_warmup_share),
            ("anneal_start_share", anneal_start_share),
        ):
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(f"{name} = {share}: expected a share between 0 and 1, or null")
        self.sparsity, self.sparsity_warmup_share = sparsity, sparsity_warmup_share
        self.p_start, self.p_end, self.updates, self.eps = p_start, p_end, updates, eps
        self.anneal_start_share, self.b_dec_init_mean, self.pre_bias = anneal_start_share, b_dec_init_mean, pre_bias
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.strength = Strength(queue)

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Random unit decoder rows, the encoder equal to them, biases 0."""
        check_pre_bias(self.pre_bias, x, target)
        self.set_scale(stats)
        self.W_dec.copy_(random_unit_rows(self.d_sae, self.d_out, generator))
        same = self.d_in == self.d_out
        self.W_enc.copy_(self.W_dec if same else random_unit_rows(self.d_sae, self.d_in, generator))
        self.b_enc.zero_()
        self.b_dec.zero_()
        if self.b_dec_init_mean:
            mean = torch.tensor(stats.target.mean, dtype=self.b_dec.dtype, device=self.b_dec.device)
            self.b_dec.copy_(mean * self.target_scale)

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        """`sparsity`: linear from 0, then constant (s not included); `p`, and `next_p` that follows it."""
        share, start_share = self.sparsity_warmup_share, self.anneal_start_share
        warmup = min(5000, total_steps // 10) if share is None else round(share * total_steps)
        start = min(10_000, total_steps // 5) if start_share is None else round(start_share * total_steps)

        updates = max(1, min(self.updates, total_steps - start))  # one a step, so that `next_p` is what comes next

        def p(step: int, further: int) -> float:
            at = min(updates, level(step, total_steps, start=start, updates=updates) + further)
            return p_at(at, p_start=self.p_start, p_end=self.p_end, updates=updates)

        return {
            "sparsity": lambda step: self.sparsity * ramp(step, warmup),
            "p": lambda step: p(step, 0),
            "next_p": lambda step: p(step, 1),
        }

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """Terms `mse` (summed over dimensions) and `lp`."""
        x, target = self.scaled(batch)
        shift = self.b_dec if self.pre_bias else None
        dtype = self.run.compute_dtype
        code = encode(x, self.W_enc, self.b_enc, Above(0.0), shift=shift, dtype=dtype)
        rebuilt = decode(code, self.W_dec, self.b_dec, dtype=dtype)
        squared_error = (target - rebuilt).square().sum(1)
        factor = self.strength.renew(schedule["p"]).to(squared_error.dtype)
        penalty = self.mean_entries(self.powers(code.values, schedule["p"]), code, batch.weight)
        with torch.no_grad():
            later = self.mean_entries(self.powers(code.values, schedule["next_p"]), code, batch.weight)
        now_and_later = self.run.group.mean(torch.stack([penalty, later]))
        self.strength.remember(*now_and_later, schedule["next_p"])
        terms = {
            "mse": self.mean_rows(squared_error, batch.weight),
            "lp": schedule["sparsity"] * factor * penalty,
        }
        return self.output(terms, code, squared_error)

    def powers(self, f: Tensor, p: float) -> Tensor:
        """(nnz,) the penalty of each entry."""
        return f if p == 1.0 else (f + self.eps).pow(p) - self.eps**p

    def param_groups(self) -> list[dict[str, Any]]:
        """Decoder rows of norm 1; the rest free."""
        return [
            {"params": [self.W_dec], "constraint": "unit_norm"},
            {"params": [self.W_enc, self.b_enc, self.b_dec], "constraint": None},
        ]

    def recipe(self, total_steps: int) -> Recipe:
        """Adam, lr 3e-4 after a warm-up of 1,000 steps (a tenth of a shorter run), gradient norm at most 1.

        The bound is SAEBench's. dictionary_learning's error is not squared, so that its gradient is bounded by itself;
        ours is large at first, and Adam would remember that for 1,000 steps.
        """
        return Recipe(lr=3e-4, warmup_steps=min(1000, total_steps // 10))

    @torch.no_grad()
    def reset_latents_(self, latents: Tensor, x: Tensor, target: Tensor) -> list[nn.Parameter]:
        """Decoder rows point at the rows, the encoder too at 0.2 of the others' norm (Bricken et al. 2023)."""
        shifted = x - self.b_dec if self.pre_bias else x
        self.W_dec[latents] = F.normalize(target, dim=1)
        self.W_enc[latents] = F.normalize(shifted, dim=1) * (0.2 * mean_norm_of_others(self.W_enc, latents))
        self.b_enc[latents] = 0.0
        return [self.W_dec, self.W_enc, self.b_enc]

    @torch.no_grad()
    def unfold_(self, sae: SAE) -> None:
        """Exact for an SAE whose thresholds are 0; others are refused.

        Raises:
            ConfigError: other rules.
        """
        weights = self.unfolded(sae)
        if weights.threshold is None or bool((weights.threshold != 0).any()):
            rule = "top-k" if weights.threshold is None else "thresholds above 0"
            raise ConfigError(
                f"init_from: PAnneal starts from SAEs with thresholds of 0, this one has {rule}; "
                f"train variant {'topk' if weights.threshold is None else 'gated or jumprelu'} instead"
            )
        self.W_enc.copy_(weights.W_enc)
        self.b_enc.copy_(weights.b_enc + weights.W_enc @ weights.b_dec if self.pre_bias else weights.b_enc)
        self.W_dec.copy_(weights.W_dec)
        self.b_dec.copy_(weights.b_dec)

    @torch.no_grad()
    def fold(self) -> SAE:
        """Threshold 0."""
        shift, zero = self.b_dec if self.pre_bias else None, torch.zeros_like(self.b_enc)
        return self.folded(self.W_enc, self.b_enc, self.W_dec, self.b_dec, shift=shift, threshold=zero)
