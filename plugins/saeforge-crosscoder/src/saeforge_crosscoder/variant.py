"""The crosscoder: several sites or models side by side share their latents, each has a decoder of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.ops import Above, decode, decode_beside, encode, encode_beside, pick
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
    ramp,
    random_unit_rows,
)
from saeforge_crosscoder.norms import WeightedBatchTopK, norms_by_source

Sparsity = Literal["batch_topk", "l1"]
SelectionWeight = Literal["sum", "joint", "none"]
SourceLoss = Literal["variance", "scale"]


@final
class Crosscoder(Variant):
    """One dictionary over several sources (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features").

    `f = act(sum_s W_enc^s x^s + b_enc)`, `x_hat^s = f W_dec^s + b_dec^s`; the sources' parts stand side by side in all
    weights, and each source has an input scale of its own. `sparsity`:

    * "batch_topk" (Minder et al. 2025, arXiv 2504.02922): of a batch of B rows the k * B latents with the largest
      `f_i sum_s |w_dec_i^s|` are active, with AuxK for dead ones; in use, a threshold on that quantity takes its place.
      L1 pushes the smaller of two decoders to zero, and splits shared latents in two, so that latents look as if they
      were one model's own; this does not.
    * "l1" (Lindsey et al.): ReLU, and the penalty `l1 sum_i f_i sum_s |w_dec_i^s|`, a norm of norms.

    Args:
        d_in: widths of all sources together.
        d_out: widths of all targets together.
        d_sae: number of latents.
        sparsity: see above.
        k: mean number of active latents per token, of batch_topk.
        aux: coefficient of AuxK, of batch_topk; 0 turns it off.
        k_aux: dead latents that AuxK uses per token; default: the power of two nearest to d_in / 2.
        selection_weight: what a latent's value is multiplied by where it competes, of batch_topk: "sum" of the decoder
            norms over sources (Minder et al.), the "joint" norm of all its decoders, or "none". Under "none" the scale
            of encoder against decoder rows decides who is chosen.
        l1: coefficient of the penalty.
        l1_warmup_share: share of the run over which it rises linearly from 0.
        source_loss: "variance" divides each source's squared error by its variance, so that all count the same; "scale"
            leaves what `input_scale` gives them (Lindsey et al.), where a source with more variance around a smaller
            mean counts more. Either way the sum over sources starts at the same size.
        decoder_init_norm: norm of a latent's joined decoder rows at the start; the encoder starts as their copy.
        input_scale: "sqrt_d" (the paper's: mean norm sqrt(d) in each source), "rms" or "none".
    """

    source_weight: Tensor
    variance: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        d_sae: int = 4096,
        sparsity: Sparsity = "batch_topk",
        k: int = 100,
        aux: float = 1 / 32,
        k_aux: int | None = None,
        selection_weight: SelectionWeight = "sum",
        l1: float = 2.0,
        l1_warmup_share: float = 0.05,
        source_loss: SourceLoss = "variance",
        decoder_init_norm: float = 1.0,
        input_scale: InputScale = "sqrt_d",
    ) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae, input_scale=input_scale, per_source=True)
        for name, value, allowed in (
            ("sparsity", sparsity, ("batch_topk", "l1")),
            ("selection_weight", selection_weight, ("sum", "joint", "none")),
            ("source_loss", source_loss, ("variance", "scale")),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} {value!r}: expected {' or '.join(map(repr, allowed))}")
        if not 1 <= k <= d_sae and sparsity == "batch_topk":
            raise ConfigError(f"k = {k} with d_sae = {d_sae}: expected 1 <= k <= d_sae")
        if l1 < 0 or not 0 <= l1_warmup_share <= 1 or decoder_init_norm <= 0:
            raise ConfigError(
                f"l1 = {l1}, l1_warmup_share = {l1_warmup_share}, decoder_init_norm = {decoder_init_norm}: "
                "expected l1 >= 0, a share between 0 and 1, and a positive norm"
            )
        self.sparsity_schedule = "l1" if sparsity == "l1" else None
        self.sparsity, self.k, self.selection_weight = sparsity, k, selection_weight
        self.l1, self.l1_warmup_share = l1, l1_warmup_share
        self.source_loss, self.decoder_init_norm = source_loss, decoder_init_norm
        self.threshold = BatchThreshold()
        self.auxk = AuxK.of(aux if sparsity == "batch_topk" else 0.0, k_aux, d_in)
        self._select = WeightedBatchTopK(k)
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("source_weight", torch.ones(d_out))
        self.register_buffer("variance", torch.ones(()))

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the targets; one source where the run names none."""
        return self.run.target_sources or (self.d_out,)

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Random decoder directions over all sources together, the encoder their copy, biases at the mean.

        Under batch_topk the encoder's length is the factor that makes the first reconstruction of data rows best.
        """
        self.set_scale(stats)
        dtype = self.W_dec.dtype
        variances = torch.tensor(stats.target.variance, dtype=torch.float64).to(self.W_dec.device)
        scaled = variances * self.target_scale.double().square()
        by_source = torch.stack([part.sum() for part in scaled.split(self.widths)]).clamp_min(1e-30)
        self.variance.fill_(float(by_source.sum()))
        if self.source_loss == "variance":
            weights = by_source.mean() / by_source
            self.source_weight.copy_(torch.cat([w.expand(n) for w, n in zip(weights, self.widths, strict=True)]))
        self.W_dec.copy_(random_unit_rows(self.d_sae, self.d_out, generator) * self.decoder_init_norm)
        if self.d_in == self.d_out:
            self.W_enc.copy_(self.W_dec)
        else:
            self.W_enc.copy_(random_unit_rows(self.d_sae, self.d_in, generator) * self.decoder_init_norm)
        means = [torch.tensor(part.mean, dtype=dtype).to(self.W_dec.device) for part in (stats.input, stats.target)]
        self.b_dec.copy_(means[1] * self.target_scale)
        self.b_enc.zero_()
        if self.sparsity == "batch_topk":
            every = max(1, len(x) // 4096)
            rows = x[::every].to(self.W_enc) * self.scale - means[0] * self.scale
            wanted = target[::every].to(self.W_dec) * self.target_scale - self.b_dec
            code = encode(rows, self.W_enc, None, WeightedBatchTopK(self.k).weigh_by(self._weights()))
            rebuilt = decode(code.with_values(code.values.relu()), self.W_dec)
            factor = (wanted * rebuilt).sum() / rebuilt.square().sum()
            if factor > 0.01:  # else encoder and decoder know nothing of each other yet (other targets than inputs)
                self.W_enc.mul_(factor)
        self.b_enc.copy_(-self.W_enc @ (means[0] * self.scale))

    def _weights(self) -> Tensor:
        """(d_sae,) what values are multiplied by where they compete; without a gradient."""
        with torch.no_grad():
            if self.selection_weight == "none":
                return torch.ones_like(self.b_enc)
            if self.selection_weight == "joint":
                return self.W_dec.norm(dim=1).clamp_min(1e-12)
            return norms_by_source(self.W_dec, self.widths).sum(1).clamp_min(1e-12)

    def _selection(self) -> WeightedBatchTopK:
        return self._select.weigh_by(self._weights())

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        """`l1`, of the sparsity of that name: linear from 0 to the coefficient over the first share of the run."""
        if self.sparsity != "l1":
            return {}
        warmup = round(self.l1_warmup_share * total_steps)
        return {"l1": lambda step: self.l1 * ramp(step, warmup)}

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """Terms `mse_0`, `mse_1`, ... by source, and `aux` or `l1`.

        Under batch_topk the errors are over the variance of all sources, so that with `source_loss` "variance" each
        term is that source's FVU over the number of sources; under l1 they are sums over dimensions.
        """
        return self._batch_topk_step(batch) if self.sparsity == "batch_topk" else self._l1_step(batch, schedule["l1"])

    def _batch_topk_step(self, batch: Batch) -> StepOutput:
        x, target = self.scaled(batch)
        dtype, dead = self.run.compute_dtype, self.auxk.latents(self)
        select = self._selection()
        select.group = self.run.group
        selected, dead_pre = encode_beside(x, self.W_enc, self.b_enc, select, dead, dtype=dtype)
        code = selected.with_values(selected.values.relu())
        competing = code.values[: code.nnz] * select.weights[code.indices[: code.nnz]]
        self.threshold.follow(competing, self.run.group, self.run.total_steps)
        dead_values = None if dead is None else self.auxk.values(self, dead_pre)
        rebuilt, dead_rebuilt = decode_beside(code, self.W_dec, dead, dead_values, dtype=dtype)
        error = target - (rebuilt + self.b_dec)
        terms = self._errors(error, batch.weight, 1 / self.variance)
        if self.auxk.coefficient > 0:
            root = self.source_weight.sqrt()
            none = error.new_zeros(())
            terms["aux"] = (
                none if dead is None else self.auxk.term(self, error * root, dead_rebuilt * root, batch.weight)
            )
        return self.output(terms, code, error.square())

    def _l1_step(self, batch: Batch, l1: float | Tensor) -> StepOutput:
        x, target = self.scaled(batch)
        dtype = self.run.compute_dtype
        code = encode(x, self.W_enc, self.b_enc, Above(0.0), dtype=dtype)
        error = target - decode(code, self.W_dec, self.b_dec, dtype=dtype)
        penalty = code.values * pick(norms_by_source(self.W_dec, self.widths).sum(1), code)
        terms = self._errors(error, batch.weight, torch.ones_like(self.variance))
        terms["l1"] = l1 * self.mean_entries(penalty, code, batch.weight)
        return self.output(terms, code, error.square())

    def _errors(self, error: Tensor, weight: Tensor | None, factor: Tensor) -> dict[str, Tensor]:
        """Squared errors by source, weighted as `source_loss` says, times a factor."""
        parts = (error.square() * self.source_weight).split(self.widths, dim=1)
        return {f"mse_{number}": self.mean_rows(part.sum(1), weight) * factor for number, part in enumerate(parts)}

    def param_groups(self) -> list[dict[str, Any]]:
        """One group without constraints: nothing is gained from the length of rows."""
        return [{"params": [self.W_enc, self.b_enc, self.W_dec, self.b_dec], "constraint": None}]

    def recipe(self, total_steps: int) -> Recipe:
        """Adam(0.9, 0.999), lr 1e-4 (Minder et al.) or 5e-5 (l1), to 0 over the last 20%, gradient norm at most 1."""
        return Recipe(lr=1e-4 if self.sparsity == "batch_topk" else 5e-5, decay_steps=total_steps // 5)

    @torch.no_grad()
    def unfold_(self, sae: SAE) -> None:
        """Exact for an SAE that this variant folded with the same `sparsity` and `selection_weight`.

        From another threshold SAE, batch_topk takes the median threshold until its own steps tell a better one.

        Raises:
            ConfigError: for l1, thresholds other than 0.
        """
        weights = self.unfolded(sae)
        if self.sparsity == "l1" and (weights.threshold is None or bool((weights.threshold != 0).any())):
            raise ConfigError(
                "init_from: sparsity l1 starts from SAEs with thresholds of 0; set sparsity to batch_topk"
            )
        self.W_enc.copy_(weights.W_enc)
        self.b_enc.copy_(weights.b_enc)
        self.W_dec.copy_(weights.W_dec)
        self.b_dec.copy_(weights.b_dec)
        if self.sparsity == "batch_topk" and weights.threshold is not None:
            self.threshold.value.copy_((weights.threshold * self._weights()).median())

    @torch.no_grad()
    def fold(self) -> SAE:
        """Rule `threshold`: 0 for l1; else `f_i > threshold / weight_i`, what stood for the batch's least value."""
        threshold = torch.zeros_like(self.b_enc)
        if self.sparsity == "batch_topk":
            threshold = self.threshold.value / self._weights()
        return self.folded(self.W_enc, self.b_enc, self.W_dec, self.b_dec, threshold=threshold)
