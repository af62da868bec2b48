"""`SAEModule`: the LightningModule that hosts a variant. It knows nothing of any variant's mathematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from saeforge import __version__
from saeforge.data.batch import Batch
from saeforge.errors import CheckpointError, ConfigError, DatasetError
from saeforge.metrics import Reconstruction, ReconstructionMetrics
from saeforge.ops import Group
from saeforge.optim import RowAdam
from saeforge.registry import VARIANTS
from saeforge.sae import SAE
from saeforge.schedules import rewarm, warmup_then_decay
from saeforge.training.data import ActivationData, run_seed
from saeforge.training.readout import ReadOut
from saeforge.variants import DataStatistics, Resampled, RunSettings, Variant

#: Rows that a variant may look at before the first step (Gao et al. 2024 take the geometric median of 32,768).
INITIAL_ROWS = 32_768
_COMPUTE_DTYPE = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


class SAEModule(LightningModule):
    """Trains one SAE variant. What is left at null comes from the variant's paper.

    Args:
        variant: the SAE variant, by entry-point name (`topk`), class path, or a mapping with its options.
        d_in: width of the input; linked to the dataset.
        d_out: width of the target; linked to the dataset.
        optimizer: any torch optimizer class with its options; null is saeforge's RowAdam as the variant's paper sets
            it. With another optimizer the decoder's norm constraint is restored after its step, and nothing is clipped.
        lr: learning rate of RowAdam.
        max_grad_norm: bound of the global gradient norm in RowAdam; .inf for none.
        lr_warmup_steps: optimizer steps of linear warm-up.
        lr_decay_share: share of the run, at its end, over which the rate falls linearly to 0.
        dead_after_tokens: a latent silent for so many tokens counts as dead; null is the smaller of 10 million and 5%
            of the run.
        resample_steps: optimizer steps after which dead latents are resampled and the rate warms up again; for
            variants that offer it (gated).
        seed: of the initial weights; null is seed_everything.
    """

    def __init__(
        self,
        variant: Callable[[int, int], Variant],
        d_in: int,
        d_out: int,
        optimizer: OptimizerCallable | None = None,
        lr: float | None = None,
        max_grad_norm: float | None = None,
        lr_warmup_steps: int | None = None,
        lr_decay_share: float | None = None,
        dead_after_tokens: int | None = None,
        resample_steps: list[int] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if optimizer is not None and (lr is not None or max_grad_norm is not None):
            raise ConfigError("model.lr and model.max_grad_norm belong to RowAdam; set optimizer.init_args.lr instead")
        if lr_decay_share is not None and not 0 <= lr_decay_share <= 1:
            raise ConfigError(f"model.lr_decay_share = {lr_decay_share}: expected a share between 0 and 1")
        self.variant = variant(d_in, d_out)
        if resample_steps and not isinstance(self.variant, Resampled):
            raise ConfigError(
                f"model.resample_steps = {resample_steps}: {type(self.variant).__name__} has no reset_latents_; "
                "leave it out, or add that method to the variant"
            )
        self._resample_steps = resample_steps
        self._step_before = -1
        self.readout = ReadOut()
        self._optimizer = optimizer
        self._lr, self._max_grad_norm = lr, max_grad_norm
        self._warmup, self._decay_share = lr_warmup_steps, lr_decay_share
        self._dead_after, self._seed = dead_after_tokens, run_seed(seed)
        self._base_lrs: list[float] = []
        self._validation: tuple[SAE, ReconstructionMetrics] | None = None
        self.total_variance = float("nan")  # of the target, raw units, summed over dimensions
        self.latest: dict[str, float] = {}  # last read-out, for the progress bar

    @property
    def data(self) -> ActivationData:
        """The run's data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ActivationData):
            raise ConfigError("SAEModule trains on an ActivationData data module: trainer.fit(module, datamodule=data)")
        return data

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.trainer.max_steps

    @property
    def stepped(self) -> bool:
        """Whether the last batch completed an optimizer step; False inside an accumulation of gradients."""
        return self.global_step != self._step_before

    @property
    def resample_steps(self) -> tuple[int, ...]:
        """Steps after which dead latents are resampled."""
        if self._resample_steps is not None:
            return tuple(self._resample_steps)
        return self.variant.recipe(self.total_steps).resample_steps

    # Set-up ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Binds the run's settings and initialises the weights from data (a checkpoint overwrites them later)."""
        precision = str(self.trainer.precision)
        if precision not in _COMPUTE_DTYPE:
            raise ConfigError(f"trainer.precision = {precision}: expected 32-true or bf16-mixed")
        data = self.data
        statistics = DataStatistics(*data.source.statistics)
        self.total_variance = sum(statistics.target.variance)
        dead_after = self._dead_after
        if dead_after is None:
            dead_after = min(10_000_000, self.total_steps * data.rows_per_step // 20)
        settings = RunSettings(self.total_steps, dead_after, _COMPUTE_DTYPE[precision], Group.world())
        self.variant.bind(settings)
        if stage == "fit":
            rows = data.source.sample(INITIAL_ROWS)
            x = rows.x.float()
            target = x if rows.target is rows.x else rows.target.float()
            if not bool(torch.isfinite(x.sum() + target.sum())):
                raise DatasetError("the training rows hold NaN or infinite activations; `saeforge harvest` them again")
            self.variant.initialise(statistics, x, target, torch.Generator().manual_seed(self._seed))
            self._schedules = self.variant.schedules(self.total_steps)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """RowAdam after the variant's recipe, or the optimizer that was asked for."""
        groups = self.variant.param_groups()
        if self._optimizer is None:
            optimizer: torch.optim.Optimizer = RowAdam(groups, **self.optimizer_settings())
        else:
            optimizer = self._optimizer(groups)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    # Training ----------------------------------------------------------------------------------------------------

    def schedule_values(self, step: int) -> dict[str, float]:
        """All scheduled values of a step: the variant's own, and `lr_factor`."""
        recipe, total = self.variant.recipe(self.total_steps), self.total_steps
        warmup = recipe.warmup_steps if self._warmup is None else self._warmup
        decay = recipe.decay_steps if self._decay_share is None else round(self._decay_share * total)
        values = {name: schedule(step) for name, schedule in self._schedules.items()}
        values["lr_factor"] = warmup_then_decay(step, total, warmup_steps=warmup, decay_steps=decay)
        values["lr_factor"] *= rewarm(step, self.resample_steps)
        return values

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum of the variant's terms. Numerics are the variant's own: autocast is off."""
        self._step_before = self.global_step
        values = self.schedule_values(self.global_step)
        for group, base in zip(self.optimizers().param_groups, self._base_lrs, strict=True):  # type: ignore[union-attr]
            group["lr"] = base * values["lr_factor"]
        with torch.autocast(self.device.type, enabled=False):
            out = self.variant.step(batch, values)
            loss = torch.stack([term.float() for term in out.terms.values()]).sum()
        self.variant.observe(out.code)
        self.readout.add(loss, out)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Restores constraints where the optimizer does not know them."""
        if self._optimizer is not None:
            self.variant.constrain_()

    # Validation: the folded SAE on held-out documents, exactly what a user of the SAE will get ---------------------

    def on_validation_epoch_start(self) -> None:
        """Folds the variant."""
        sae = self.variant.fold()
        mean = torch.tensor(self.data.source.statistics[1].mean)
        self._validation = sae, ReconstructionMetrics(sae.d_out, sae.d_sae, pivot=mean, device=sae.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds rows to the sums."""
        assert self._validation is not None
        sae, metrics = self._validation
        with torch.autocast(self.device.type, enabled=False):
            x = batch.x.float()
            code = sae.encode(x)
            metrics.update(batch.target.float(), sae.decode(code, x), code)

    def validation_result(self) -> Reconstruction:
        """Metrics over all ranks; every rank must call it."""
        assert self._validation is not None
        metrics = self._validation[1]
        metrics.reduce(self.variant.run.group)
        self._validation = None
        return metrics.compute()

    # Checkpoints -------------------------------------------------------------------------------------------------

    def optimizer_settings(self) -> dict[str, Any]:
        """RowAdam's settings: the variant's recipe, overridden by the configuration."""
        recipe = self.variant.recipe(self.total_steps)
        return {
            "lr": recipe.lr if self._lr is None else self._lr,
            "betas": recipe.betas,
            "eps": recipe.eps,
            "max_grad_norm": recipe.max_grad_norm if self._max_grad_norm is None else self._max_grad_norm,
        }

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it, as plain values."""
        settings = self.optimizer_settings() if self._optimizer is None else {}
        return {
            "variant": VARIANTS.name_of(type(self.variant)).class_path,
            "options": {key: _plain(value) for key, value in self.variant.arguments.items()},
            "optimizer": {
                "class": "RowAdam" if self._optimizer is None else "custom",
                **{key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
            },
            "resample_steps": list(self.resample_steps),
            "seed": self._seed,
            # Positions in the data are counted in batches: with another number of them a step, nothing would fit.
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
        }

    def provenance(self) -> dict[str, Any]:
        """What a saved SAE tells of its origin: data, variant and its distribution, training."""
        record = VARIANTS.name_of(type(self.variant))
        return {
            **self.data.source.identity,
            "variant": {
                "name": record.name,
                "class_path": record.class_path,
                "distribution": record.distribution,
                "version": record.version,
                "options": self.identity()["options"],
            },
            "training": {
                "steps": self.global_step,
                "tokens": self.global_step * self.data.rows_per_step,
                "precision": str(self.trainer.precision),
                "saeforge": __version__,
                "torch": torch.__version__,
            },
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the identity."""
        checkpoint["saeforge"] = self.identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another variant or configuration: neither side silently wins.

        Raises:
            CheckpointError: naming each difference.
        """
        saved = checkpoint.get("saeforge")
        if not isinstance(saved, dict):
            raise CheckpointError("this checkpoint was not written by saeforge; give one from RUN/checkpoints")
        check_identity(saved, self.identity())


def check_identity(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Compares two identities.

    Raises:
        CheckpointError: with every difference as `name: checkpoint -> this run`.
    """
    if saved["variant"] != given["variant"]:
        raise CheckpointError(
            f"the checkpoint holds variant {saved['variant']}, this run asks for {given['variant']}; "
            "resume with the same variant, or start a new --run"
        )
    differences = []
    for part in ("options", "optimizer"):
        for name in sorted(saved[part].keys() | given[part].keys()):
            before, now = saved[part].get(name), given[part].get(name)
            if before != now:
                differences.append(f"{name}: {before} -> {now}")
    for name in ("resample_steps", "seed", "accumulate_grad_batches"):
        if saved.get(name) != given[name]:
            differences.append(f"{name}: {saved.get(name)} -> {given[name]}")
    if differences:
        raise CheckpointError(
            f"the checkpoint was trained with other settings ({'; '.join(differences)}); "
            "resume with the same ones, or start a new --run"
        )


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
