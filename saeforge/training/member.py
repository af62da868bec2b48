"""`Member`: one SAE in training, with its own data, schedules, optimizer settings and figures.

A run trains one, or several from one stream of activations. It knows nothing of any variant's mathematics.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saeforge.data.batch import Batch
from saeforge.data.moments import Statistics
from saeforge.data.source import Pair, Rows
from saeforge.errors import ConfigError, DatasetError
from saeforge.metrics import Reconstruction, ReconstructionMetrics
from saeforge.ops import latents_over
from saeforge.optim import RowAdam
from saeforge.sae import SAE
from saeforge.schedules import rewarm, warmup_then_decay
from saeforge.training.ema import WeightAverage, check_half_life
from saeforge.training.graph import GraphedStep
from saeforge.training.identity import origin_of
from saeforge.training.init_from import check_offered, open_sae, warmup_steps
from saeforge.training.readout import ReadOut
from saeforge.training.settings import Settings
from saeforge.training.skip import Skip
from saeforge.training.target_l0 import TargetL0
from saeforge.training.whitening import DEFAULT_SHRINKAGE, Whitening
from saeforge.training.whole import whole
from saeforge.variants import DataStatistics, Resampled, RunSettings, Variant


class Member(nn.Module):
    """One SAE and what its training needs.

    Args:
        variant: the SAE.
        settings: of its training.
        entry: its name among those that a sweep makes for one site; "" where there is one.

    Attributes:
        pair: its tensors in the data and where they come from; set by `prepare`.
        total_variance: of the target, raw units, summed over dimensions.
        readout: running sums of its figures.
        latest: the last ones read, for the progress bar.

    Raises:
        ConfigError: settings that contradict each other or the variant.
    """

    pair: Pair

    def __init__(self, variant: Variant, settings: Settings, entry: str = "") -> None:
        super().__init__()
        if settings.optimizer is not None and (settings.lr is not None or settings.max_grad_norm is not None):
            raise ConfigError("model.lr and model.max_grad_norm belong to RowAdam; set optimizer.init_args.lr instead")
        share = settings.lr_decay_share
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"model.lr_decay_share = {share}: expected a share between 0 and 1")
        if settings.resample_steps and not isinstance(variant, Resampled):
            raise ConfigError(
                f"model.resample_steps = {list(settings.resample_steps)}: {type(variant).__name__} has no "
                "reset_latents_; leave it out, or add that method to the variant"
            )
        if settings.init_from is not None:
            check_offered(variant)
        if settings.whitening_shrinkage is not None and settings.whitening is None:
            raise ConfigError("model.whitening_shrinkage says nothing without model.whitening: set it to zca or pca")
        self.variant, self.settings, self.entry = variant, settings, entry
        self.target_l0 = None if settings.target_l0 is None else TargetL0(variant, settings.target_l0)
        if settings.ema_half_life_steps is not None:
            check_half_life(settings.ema_half_life_steps)
        self.average: WeightAverage | None = None  # made by `prepare`, of the latents that this rank has
        self.skip = Skip(variant.d_in, variant.d_out) if settings.skip else None
        self.skip_average: WeightAverage | None = None
        shrinkage = DEFAULT_SHRINKAGE if settings.whitening_shrinkage is None else settings.whitening_shrinkage
        self.whitening = None if settings.whitening is None else Whitening(variant, settings.whitening, shrinkage)
        self._graphed = GraphedStep(variant) if settings.cuda_graph else None
        self.readout = ReadOut()
        self.total_variance = float("nan")
        self.latest: dict[str, float] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self._base_lrs: list[float] = []
        self._validation: tuple[SAE, ReconstructionMetrics] | None = None

    @property
    def name(self) -> str:
        """Of the SAE among all of the run, and of its folder; "" where there is one."""
        return join_names(self.pair.name, self.entry)

    # Set-up ------------------------------------------------------------------------------------------------------

    def check(self, pair: Pair) -> None:
        """Whether it can learn this pair.

        Raises:
            ConfigError: a skip path for an SAE that reconstructs its input.
        """
        if self.skip is not None and pair.targets == pair.inputs:
            raise ConfigError(
                "model.skip = true, but the target is the input, which the skip path would copy; give data.target "
                "(a transcoder), or leave skip out"
            )

    def latents(self) -> AbstractContextManager[None]:
        """Where the variant works: among the ranks that share out its latents, if there are some."""
        return latents_over(self.variant.shard)

    def prepare(self, pair: Pair, statistics: tuple[Statistics, ...], run: RunSettings) -> None:
        """Binds the SAE to its data and to the run.

        Args:
            pair: which tensors of the data it learns.
            statistics: of all tensors of the data.
            run: settings of the run.

        Raises:
            ConfigError: see `check`.
        """
        self.check(pair)
        of_input, of_target = (tuple(statistics[number] for number in part) for part in (pair.inputs, pair.targets))
        if len(of_input) > 1:
            run = replace(run, sources=tuple(len(part.mean) for part in of_input))
        if len(of_target) > 1:
            run = replace(run, target_sources=tuple(len(part.mean) for part in of_target))
        self.pair, self._run = pair, run
        self._statistics = DataStatistics(
            Statistics.beside(of_input), Statistics.beside(of_target), of_input, of_target
        )
        self.total_variance = sum(self._statistics.target.variance)
        half_life = self.settings.ema_half_life_steps
        if half_life is not None and self.average is None:
            self.average = WeightAverage(self.variant, half_life)
            self.skip_average = None if self.skip is None else WeightAverage(self.skip, half_life)
        self.variant.bind(run)
        self._schedules = self.variant.schedules(run.total_steps)
        if self.target_l0 is not None:
            self.target_l0.bind(self._schedules, run.total_steps)

    def initialise(self, rows: Rows) -> None:
        """Sets the weights from a sample of the data, or to those of the SAE to start from.

        Raises:
            DatasetError: NaN or infinite rows.
            CheckpointError, ConfigError: no SAE to start from, or one that does not fit.
        """
        batch = self.pair.batch(rows)
        x = batch.x.float()
        target = x if batch.target is batch.x else batch.target.float()
        if not bool(torch.isfinite(x.sum() + target.sum())):
            raise DatasetError("the training rows hold NaN or infinite activations; `saeforge harvest` them again")
        generator = torch.Generator().manual_seed(self.settings.seed)
        statistics = self._statistics
        if self.whitening is not None:
            statistics, (x, target, *_) = self.whitening.fit(statistics, x, target)
            self.total_variance = sum(statistics.target.variance)
        if self.skip is not None:
            self.skip.center(statistics.input)
        if self.variant.shard is not None:  # what its ranks exchange on the way lies on their device
            same, x = target is x, x.to(self.variant.scale.device)
            target = x if same else target.to(x.device)
        with self.latents():
            self.variant.initialise(statistics, x, target, generator)
            if self.settings.init_from is not None:
                sae = open_sae(self.settings.init_from, self.name, self.pair.name)
                sae = sae if self.whitening is None else self.whitening.unfold(sae)
                sae = sae if self.skip is None else self.skip.unfold_(sae, self.variant)
                self.variant.unfold_(sae)  # type: ignore[operator]

    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the variant, and the skip path's."""
        groups = self.variant.param_groups()
        return groups if self.skip is None else [*groups, {"params": [self.skip.W_skip], "constraint": None}]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """RowAdam after the variant's recipe, or the optimizer that was asked for."""
        if self.settings.optimizer is None:
            self.optimizer = RowAdam(self.param_groups(), **self.optimizer_settings())
            cut = [tensor for name, tensor in self.variant.named_parameters() if name in self.variant.latent_names]
            self.optimizer.share_out(cut, self.variant.latent_group)
        else:
            self.optimizer = self.settings.optimizer(self.param_groups())
        self._base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        return self.optimizer

    # Training ----------------------------------------------------------------------------------------------------

    @property
    def resample_steps(self) -> tuple[int, ...]:
        """Steps after which dead latents are resampled."""
        if self.settings.resample_steps is not None:
            return self.settings.resample_steps
        return self.variant.recipe(self._run.total_steps).resample_steps

    def rate_shape(self) -> dict[str, Any]:
        """Warm-up and decay of the learning rate: the variant's recipe, overridden by the run's."""
        total, given = self._run.total_steps, self.settings
        recipe = self.variant.recipe(total)
        warmup = recipe.warmup_steps if given.lr_warmup_steps is None else given.lr_warmup_steps
        if given.init_from is not None and given.lr_warmup_steps is None:
            warmup = max(warmup, warmup_steps(total))
        return {
            "warmup_steps": warmup,
            "decay_steps": recipe.decay_steps if given.lr_decay_share is None else round(given.lr_decay_share * total),
            "warmup_shape": given.lr_warmup_shape or recipe.warmup_shape,
            "decay_shape": given.lr_decay_shape or recipe.decay_shape,
        }

    def schedule_values(self, step: int) -> dict[str, float]:
        """All scheduled values of a step, before `target_l0`: the variant's own, and `lr_factor`."""
        values = {name: schedule(step) for name, schedule in self._schedules.items()}
        values["lr_factor"] = warmup_then_decay(step, self._run.total_steps, **self.rate_shape())
        values["lr_factor"] *= rewarm(step, self.resample_steps)
        return values

    def step(self, rows: Rows, step: int) -> Tensor:
        """Loss of one batch, the sum of the variant's terms; sets the learning rate. Autocast is off around it."""
        assert self.optimizer is not None
        values = self.schedule_values(step)
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * values["lr_factor"]
        batch = self.batch(rows)
        with self.latents():
            out = (self._graphed or self.variant.step)(batch, self.steered(values))
            loss = torch.stack([term.float() for term in out.terms.values()]).sum()
            counts = self.variant.observe(out.code)
            if self.target_l0 is not None:
                self.target_l0.observe(counts, out.code.n_rows * self._run.group.size)
            self.readout.add(loss, out)
        return loss

    def batch(self, rows: Rows) -> Batch:
        """What the variant sees of the data's tensors."""
        return self.seen(self.pair.batch(rows))

    def seen(self, batch: Batch) -> Batch:
        """What the variant sees of a batch: whitened, and behind a skip path what that leaves of the target."""
        if self.whitening is not None:
            batch = self.whitening(batch)
        return batch if self.skip is None else self.skip.rest(batch, self.variant)

    def steered(self, values: dict[str, float]) -> dict[str, Any]:
        """The scheduled values with the sparsity coefficient as `target_l0` scales it, a scalar tensor."""
        if self.target_l0 is None:
            return values
        name = self.target_l0.schedule
        return {**values, name: self.target_l0.scaled(values[name])}

    def after_step(self, step: int) -> None:
        """What follows the optimizer's step (from 0 on): constraints that it does not know, controller, average."""
        if self.settings.optimizer is not None:
            self.variant.constrain_()
        if self.target_l0 is not None:
            values = self.schedule_values(step)
            self.target_l0.update(values[self.target_l0.schedule], values["lr_factor"], self.variant.latent_group)
        if self.average is not None:
            self.average.update(self.variant, step)
        if self.skip is not None and self.skip_average is not None:
            self.skip_average.update(self.skip, step)

    def fold(self) -> SAE:
        """The plain SAE on raw activations as it is now: of the averaged weights, if there are some.

        Of a rank that holds some of the latents it is their part, which works inside `latents()`.
        """
        with self.latents():
            sae = (self.variant if self.average is None else self.average.averaged(self.variant)).fold()
            if self.skip is not None:
                skip = self.skip if self.skip_average is None else self.skip_average.averaged(self.skip)
                sae = skip.fold_into(sae, self.variant)
            return sae if self.whitening is None else self.whitening.fold(sae)

    # Validation: the folded SAE on held-out documents, exactly what a user of the SAE will get ---------------------

    def start_validation(self) -> None:
        """Folds the variant, or the latents of it that this rank has."""
        sae, shard = self.fold(), self.variant.shard
        mean = torch.tensor(self._statistics.target.mean)
        norms = sae.W_dec.norm(dim=1)
        metrics = ReconstructionMetrics(
            sae.d_out, self.variant.d_sae, pivot=mean, decoder_norms=norms, device=sae.device, shard=shard
        )
        self._validation = sae, metrics

    def validate(self, rows: Rows) -> None:
        """Adds rows to the sums."""
        assert self._validation is not None
        sae, metrics = self._validation
        batch = self.pair.batch(rows)
        x = batch.x.float()
        with self.latents():
            code = sae.encode(x)
            metrics.update(batch.target.float(), sae.decode(code, x), code)

    def validation_result(self) -> Reconstruction:
        """Metrics over all ranks; every rank must call it."""
        assert self._validation is not None
        metrics = self._validation[1]
        metrics.reduce(self._run.group)
        self._validation = None
        return metrics.compute()

    # What is remembered ------------------------------------------------------------------------------------------

    def optimizer_settings(self) -> dict[str, Any]:
        """RowAdam's settings: the variant's recipe, overridden by the run's."""
        recipe, given = self.variant.recipe(self._run.total_steps), self.settings
        return {
            "lr": recipe.lr if given.lr is None else given.lr,
            "betas": recipe.betas,
            "eps": recipe.eps,
            "max_grad_norm": recipe.max_grad_norm if given.max_grad_norm is None else given.max_grad_norm,
        }

    def folded(self, steps: int, tokens: int, precision: str, device: torch.device, *, kept: bool = True) -> SAE | None:
        """The plain SAE as it is now, with its origin: data, variant and its distribution, training.

        Args:
            steps: trained. tokens: trained on. precision: of the run.
            device: of the run.
            kept: where ranks share out the latents all must call it, and put the SAE together for those that keep it.
        """
        sae: SAE | None = self.fold()
        if sae is not None and self.variant.shard is not None:
            sae = whole(sae, self.variant.shard, device, kept=kept)
        if sae is None:
            return None
        sae.meta = origin_of(self, steps, tokens, precision)
        return sae


def join_names(site: str, entry: str) -> str:
    """The name of an SAE, and of its folder, among all of a run: of its site, its entry of a sweep, or both."""
    return "-".join(part for part in (site, entry) if part)
