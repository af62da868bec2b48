"""`Telemetry`: reads a run's figures every N steps and hands them to the loggers in one call."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from saeforge.training.figures import X_AXIS
from saeforge.training.floor import product_seconds
from saeforge.training.latent_histograms import latent_histograms
from saeforge.training.loggers import Value, log, shows_more
from saeforge.training.member import Member
from saeforge.training.module import SAEModule

HISTOGRAMS_PER_RUN = 10


class Telemetry(Callback):
    """Reads the run's figures every `log_every_n_steps`, and at the last step; `figures` has their names.

    Where several SAEs train, the names of each begin with its own; `WandbRuns` takes it off again.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the floor of a step and starts the clock."""
        assert isinstance(pl_module, SAEModule)
        begin = time.perf_counter()
        self._step = trainer.global_step
        # Both are the same on all ranks, also when a logger fails later on.
        self._logs = bool(trainer.loggers)
        self._histograms = any(shows_more(logger) for logger in trainer.loggers)
        self._drawn = self._part(trainer)
        self._floor = self._floor_of(pl_module) if self._logs and trainer.is_global_zero else math.nan
        for member in pl_module.members:
            member.variant.firing_counts.zero_()
        self._counted_from = self._step
        self._clock = time.perf_counter()
        self._spent = self._clock - begin

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads out, when it is time."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]  # a property
        assert isinstance(pl_module, SAEModule)
        if not pl_module.stepped or (step % every and step != trainer.max_steps):
            return
        begin = time.perf_counter()
        values: dict[str, Value] = {}
        for member in pl_module.members:
            read = member.readout.read(member.variant.run.group, member.variant.latent_group)
            if read:
                values |= _named(member, _figures(member, read, step))
        if not values:
            return
        if self._histograms and self._part(trainer) > self._drawn:
            self._drawn = self._part(trainer)
            tokens = (step - self._counted_from) * pl_module.data.rows_per_step
            for member in pl_module.members:
                values |= _named(member, latent_histograms(member, tokens))
                member.variant.firing_counts.zero_()
            self._counted_from = step
        if self._logs and trainer.is_global_zero:
            log(trainer, {**self._shared(pl_module, step, begin), **values}, step)
        self._step, self._clock = step, begin
        self._spent = time.perf_counter() - begin

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock: speed is that of training."""
        self._stopped = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets it run on."""
        self._clock += time.perf_counter() - self._stopped

    @staticmethod
    def leave_out(trainer: Trainer, seconds: float) -> None:
        """Does not count so many seconds that another callback took for something else than training."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # of Lightning, a list
            if isinstance(callback, Telemetry):
                callback._clock += seconds

    def _part(self, trainer: Trainer) -> int:
        """How many histograms should have been drawn."""
        return trainer.global_step * HISTOGRAMS_PER_RUN // max(1, trainer.max_steps)

    def _floor_of(self, module: SAEModule) -> float:
        """Seconds of the encoder products of a step of this rank."""
        seconds = 0.0
        for member in module.members:
            variant = member.variant
            latents = variant.d_sae if variant.shard is None else len(variant.shard)
            rows = module.data.rows_per_step // variant.run.group.size
            seconds += product_seconds(rows, variant.d_in, latents, variant.run.compute_dtype, module.device)
        return seconds

    def _shared(self, module: SAEModule, step: int, now: float) -> dict[str, Value]:
        """What belongs to no SAE, since the last reading."""
        seconds, steps, tokens = now - self._clock, step - self._step, module.data.rows_per_step
        found: dict[str, Value] = {
            X_AXIS: float(step * tokens),
            "speed/tokens_per_second": steps * tokens / seconds,
            "speed/step_ms": 1e3 * seconds / steps,
            "speed/of_floor": self._floor * steps / seconds,
            "speed/logging_ms": 1e3 * self._spent / steps,
        }
        found |= {f"data/{name}": float(value) for name, value in module.data.read_figures(seconds).items()}
        return {**found, **memory_figures(module.device)}


def _named(member: Member, figures: dict[str, Any]) -> dict[str, Value]:
    return {f"{prefix_of(member)}{name}": value for name, value in figures.items()}


def _figures(member: Member, values: dict[str, float], step: int) -> dict[str, float]:
    """One SAE's figures since the last reading."""
    rows = values["rows"]
    figures = {"train/loss": values["loss"]}
    figures |= {f"train/{name[5:]}": value for name, value in values.items() if name.startswith("term/")}
    assert member.optimizer is not None
    figures |= {
        "train/l0": values["active"] / rows,
        "train/fvu": values["counter/squared_error"] / (rows * member.total_variance or math.nan),
        "train/dead": float(member.variant.latent_group.sum(member.variant.dead().sum())),
        "schedule/lr": member.optimizer.param_groups[0]["lr"],
    }
    scheduled = {name: float(v) for name, v in member.steered(member.schedule_values(max(0, step - 1))).items()}
    figures |= {f"schedule/{name}": value for name, value in scheduled.items() if name != "lr_factor"}
    member.latest.update({name: figures[f"train/{name}"] for name in ("loss", "l0", "fvu", "dead")})
    return figures


def prefix_of(member: Member) -> str:
    """What stands before the names of an SAE's figures: nothing where it trains alone."""
    return f"{member.name}/" if member.name else ""


def memory_figures(device: torch.device) -> dict[str, float]:
    """The most that this process has held so far, on the host and on its GPU."""
    found = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["memory/host_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    if device.type == "cuda":
        found["memory/device_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found
