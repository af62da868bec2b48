"""`Validation`: what an SAE in training makes of held-out documents, and, when asked, does to its language model."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from saeforge.data.shard_source import ShardSource
from saeforge.errors import ConfigError
from saeforge.evaluation.over_time import EffectOverTime
from saeforge.training.figures import X_AXIS
from saeforge.training.loggers import Value, log
from saeforge.training.module import SAEModule
from saeforge.training.telemetry import Telemetry, prefix_of


class Validation(Callback):
    """Logs the metrics of stored held-out activations, and of the language model every so many steps.

    The first as `val/<name>` at every validation (`trainer.val_check_interval`; ten times a run by default); the second
    as `model/<name>`, with the SAE's reconstruction in the place of the activations on held-out contexts.

    Args:
        model_every: optimizer steps between two looks at the language model, which is then loaded beside the SAE; also
            at the last step. null: never.
        model_tokens: predictions scored at each look (whole contexts, always the same).
        model: where the language model is now, if it moved; null is where the dataset says.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(
        self,
        model_every: int | None = None,
        model_tokens: int = 10_000,
        model: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        for name, value in {"model_every": model_every, "model_tokens": model_tokens}.items():
            if value is not None and value < 1:
                raise ConfigError(f"validation.{name} = {value}: expected a positive number")
        self.model_every, self.model_tokens = model_every, model_tokens
        self.model, self.trust_remote_code = model, trust_remote_code
        self._effects: list[EffectOverTime] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the language model, so that what is missing is known before the first step. On rank 0.

        Raises:
            ConfigError: no model, no texts, an SAE of several sites, or latents shared out over devices.
        """
        if self.model_every is None:
            return
        assert isinstance(pl_module, SAEModule)
        source = pl_module.data.source
        source = getattr(source, "held_out", source)  # of a live source
        if not isinstance(source, ShardSource):
            raise ConfigError(
                "validation.model_every needs a dataset that `saeforge harvest` made, with its texts and its model; "
                "leave it out for activations of unknown origin"
            )
        if any(member.variant.shard is not None for member in pl_module.members):
            raise ConfigError("validation.model_every: not while latents are shared out; run `saeforge evaluate` after")
        if not trainer.is_global_zero:
            return
        random = torch.random.get_rng_state()
        try:
            self._effects = EffectOverTime.open(
                [member.pair for member in pl_module.members],
                source,
                tokens=self.model_tokens,
                device=str(pl_module.device),
                model=self.model,
                trust_remote_code=self.trust_remote_code,
            )
        except ConfigError as error:
            raise ConfigError(f"validation.model_every: {error}") from error
        finally:
            torch.random.set_rng_state(random)  # loading a model draws weights that it then replaces

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks reduce; rank 0 logs."""
        assert isinstance(pl_module, SAEModule)
        figures: dict[str, float] = {}
        for member, result in zip(pl_module.members, pl_module.validation_results(), strict=True):
            member.latest["val_fvu"] = result.fvu
            figures |= {f"{prefix_of(member)}val/{name}": float(value) for name, value in asdict(result).items()}
        self._log(trainer, pl_module, figures)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Runs the model, when it is time. On rank 0, the others wait."""
        assert isinstance(pl_module, SAEModule)
        step = trainer.global_step
        if self.model_every is None or not pl_module.stepped:
            return
        if not self._effects or (step % self.model_every and step != trainer.max_steps):
            return
        begin = time.perf_counter()
        figures: dict[str, float] = {}
        with torch.no_grad():
            for member, effect in zip(pl_module.members, self._effects, strict=True):
                found = effect.measure(member.fold())
                member.latest["delta_ce"] = found["delta_ce"]
                figures |= {f"{prefix_of(member)}model/{name}": value for name, value in found.items()}
        self._log(trainer, pl_module, figures)
        seconds = time.perf_counter() - begin
        Telemetry.leave_out(trainer, seconds)
        rank_zero_info(f"step {step:,}: {seconds:.1f} s with the language model")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the model go."""
        self._effects = []

    def _log(self, trainer: Trainer, module: SAEModule, figures: dict[str, float]) -> None:
        # What EarlyStopping and ModelCheckpoint may monitor; `self.log` would send it to the loggers once more.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        step = trainer.global_step
        values: dict[str, Value] = {X_AXIS: float(step * module.data.rows_per_step), **figures}
        log(trainer, values, step)
