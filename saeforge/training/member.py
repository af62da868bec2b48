"""`Member`: one SAE in training, with its own data, schedules, optimizer settings and figures.

A run trains one, or several from one stream of activations. It knows nothing of any variant's mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from saeforge import __version__
from saeforge.data.batch import Batch
from saeforge.data.moments import Statistics
from saeforge.data.source import Pair, Rows
from saeforge.errors import CheckpointError, ConfigError, DatasetError
from saeforge.metrics import Reconstruction, ReconstructionMetrics
from saeforge.optim import RowAdam
from saeforge.registry import VARIANTS
from saeforge.sae import SAE
from saeforge.schedules import Shape, rewarm, warmup_then_decay
from saeforge.training.ema import WeightAverage
from saeforge.training.graph import GraphedStep
from saeforge.training.init_from import check_offered, described, open_sae, warmup_steps
from saeforge.training.readout import ReadOut
from saeforge.training.skip import Skip
from saeforge.training.target_l0 import TargetL0
from saeforge.training.whitening import DEFAULT_SHRINKAGE, Kind, Whitening
from saeforge.variants import DataStatistics, Resampled, RunSettings, Variant


@dataclass(frozen=True)
class Settings:
    """What a run decides about the training of an SAE; None leaves it to the variant's recipe. See `SAEModule`."""

    optimizer: OptimizerCallable | None = None
    lr: float | None = None
    max_grad_norm: float | None = None
    lr_warmup_steps: int | None = None
    lr_decay_share: float | None = None
    dead_after_tokens: int | None = None
    resample_steps: tuple[int, ...] | None = None
    cuda_graph: bool = False
    skip: bool = False
    seed: int = 0
    lr_warmup_shape: Shape | None = None
    lr_decay_shape: Shape | None = None
    target_l0: float | None = None
    ema_half_life_steps: float | None = None
    init_from: str | SAE | None = None
    whitening: Kind | None = None
    whitening_shrinkage: float | None = None


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
        half_life = settings.ema_half_life_steps
        self.average = None if half_life is None else WeightAverage(variant, half_life)
        self.skip = Skip(variant.d_in, variant.d_out) if settings.skip else None
        self.skip_average = None if half_life is None or self.skip is None else WeightAverage(self.skip, half_life)
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
        self.variant.initialise(statistics, x, target, generator)
        if self.settings.init_from is not None:
            sae = open_sae(self.settings.init_from, self.name, self.pair.name)
            sae = sae if self.whitening is None else self.whitening.unfold(sae)
            sae = sae if self.skip is None else self.skip.unfold_(sae, self.variant)
            self.variant.unfold_(sae)  # type: ignore[operator]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """RowAdam after the variant's recipe, or the optimizer that was asked for."""
        groups = self.variant.param_groups()
        if self.skip is not None:
            groups = [*groups, {"params": [self.skip.W_skip], "constraint": None}]
        if self.settings.optimizer is None:
            self.optimizer = RowAdam(groups, **self.optimizer_settings())
        else:
            self.optimizer = self.settings.optimizer(groups)
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
            self.target_l0.update(values[self.target_l0.schedule], values["lr_factor"])
        if self.average is not None:
            self.average.update(self.variant, step)
        if self.skip is not None and self.skip_average is not None:
            self.skip_average.update(self.skip, step)

    def fold(self) -> SAE:
        """The plain SAE on raw activations as it is now: of the averaged weights, if there are some."""
        sae = (self.variant if self.average is None else self.average.averaged(self.variant)).fold()
        if self.skip is not None:
            skip = self.skip if self.skip_average is None else self.skip_average.averaged(self.skip)
            sae = skip.fold_into(sae, self.variant)
        return sae if self.whitening is None else self.whitening.fold(sae)

    # Validation: the folded SAE on held-out documents, exactly what a user of the SAE will get ---------------------

    def start_validation(self) -> None:
        """Folds the variant."""
        sae = self.fold()
        mean = torch.tensor(self._statistics.target.mean)
        norms = sae.W_dec.norm(dim=1)
        metrics = ReconstructionMetrics(sae.d_out, sae.d_sae, pivot=mean, decoder_norms=norms, device=sae.device)
        self._validation = sae, metrics

    def validate(self, rows: Rows) -> None:
        """Adds rows to the sums."""
        assert self._validation is not None
        sae, metrics = self._validation
        batch = self.pair.batch(rows)
        x = batch.x.float()
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

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it, as plain values."""
        settings = self.optimizer_settings() if self.settings.optimizer is None else {}
        return {
            "name": self.name,
            "sites": _sites(self.pair.identity),
            "variant": VARIANTS.name_of(type(self.variant)).class_path,
            "options": {key: _plain(value) for key, value in self.variant.arguments.items()},
            "optimizer": {
                "class": "RowAdam" if self.settings.optimizer is None else "custom",
                **{key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
            },
            "resample_steps": list(self.resample_steps),
            "skip": self.settings.skip,
            "seed": self.settings.seed,
            "extras": self._extras(),
        }

    def _extras(self) -> dict[str, Any]:
        """The options of `docs/training.md` that are on."""
        given = self.settings
        values = {
            "target_l0": given.target_l0,
            "ema_half_life_steps": given.ema_half_life_steps,
            "init_from": None if given.init_from is None else described(given.init_from),
            "whitening": given.whitening,
            "whitening_shrinkage": None if self.whitening is None else self.whitening.shrinkage,
        }
        return {name: value for name, value in values.items() if value is not None}

    def folded(self, steps: int, tokens: int, precision: str) -> SAE:
        """The plain SAE as it is now, with its origin: data, variant and its distribution, training."""
        record = VARIANTS.name_of(type(self.variant))
        sae = self.fold()
        sae.meta = {
            **self.pair.identity,
            "variant": {
                "name": record.name,
                "class_path": record.class_path,
                "distribution": record.distribution,
                "version": record.version,
                "options": self.identity()["options"],
            },
            "training": {
                "steps": steps,
                "tokens": tokens,
                "precision": precision,
                "saeforge": __version__,
                "torch": torch.__version__,
            },
        }
        return sae


def join_names(site: str, entry: str) -> str:
    """The name of an SAE, and of its folder, among all of a run: of its site, its entry of a sweep, or both."""
    return "-".join(part for part in (site, entry) if part)


def check_identity(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Compares two identities of a member.

    Raises:
        CheckpointError: with every difference as `name: checkpoint -> this run`.
    """
    if saved["variant"] != given["variant"]:
        raise CheckpointError(
            f"the checkpoint holds variant {saved['variant']}, this run asks for {given['variant']}; "
            "resume with the same variant, or start a new --run"
        )
    differences = []
    if "sites" in saved and saved["sites"] != given["sites"]:
        differences.append(f"sites: {saved['sites']} -> {given['sites']}")
    for part in ("options", "optimizer", "extras"):
        then = saved.get(part, {})  # no extras: a checkpoint from before there were any
        for name in sorted(then.keys() | given[part].keys()):
            before, now = then.get(name), given[part].get(name)
            if before != now:
                differences.append(f"{name}: {before} -> {now}")
    for name in ("name", "resample_steps", "skip", "seed"):
        if saved.get(name, False if name == "skip" else None) != given[name]:
            differences.append(f"{name}: {saved.get(name)} -> {given[name]}")
    if differences:
        raise CheckpointError(
            f"the checkpoint was trained with other settings ({'; '.join(differences)}); "
            "resume with the same ones, or start a new --run"
        )


def _sites(identity: dict[str, Any]) -> str:
    """Which sites an SAE reads and writes, in one line; the dataset itself is the loader's to compare."""
    if not identity.get("sources"):
        ends = [(identity.get(part) or {}).get("id") for part in ("site", "target")]
        return " to ".join(end for end in ends if end)
    sides = [identity["sources"], identity.get("targets") or []]
    named = [[f"{(part.get('site') or {}).get('id')}@{part.get('dataset', '')[:8]}" for part in side] for side in sides]
    return " to ".join(" + ".join(side) for side in named if side)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
