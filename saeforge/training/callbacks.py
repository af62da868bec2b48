"""What a person sees of a run: figures in the logger, a progress bar, validation on held-out documents."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from saeforge.training.module import SAEModule

#: Edges of the density histogram: log10 of the share of tokens on which a latent fires.
DENSITY_EDGES = torch.arange(-7.0, 0.01, 0.25)


class Telemetry(Callback):
    """Reads the run's figures every `log_every_n_steps` and hands them to the logger in one call.

    Keys: `train/loss`, `train/<term>` for each of the variant's terms, `train/l0`, `train/fvu`, `train/dead`,
    `train/tokens_per_second`, `schedule/<name>`, `schedule/lr`; what reading costs on rank 0, as `data/wait_ms` (a step
    stood still for data), `data/windows_ready` (read ahead), `data/read_gb_per_second` (a reading thread); the density
    histogram goes to wandb as `train/log10_density`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._clock = time.perf_counter()
        self._rows_since_density = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads out, when it is time."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]  # a property
        assert isinstance(pl_module, SAEModule)
        if not pl_module.stepped or (step % every and step != trainer.max_steps):
            return
        variant = pl_module.variant
        values = pl_module.readout.read(variant.run.group)
        if not values:
            return
        now = time.perf_counter()
        rows, elapsed = values["rows"], now - self._clock
        self._clock = now
        self._rows_since_density += rows
        figures = {"train/loss": values["loss"]}
        figures |= {f"train/{name[5:]}": value for name, value in values.items() if name.startswith("term/")}
        figures |= {
            "train/l0": values["active"] / rows,
            "train/fvu": values["counter/squared_error"] / (rows * pl_module.total_variance or math.nan),
            "train/dead": float(variant.dead().sum()),
            "train/tokens_per_second": rows / elapsed,
            "train/tokens": step * pl_module.data.rows_per_step,
            "schedule/lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        figures |= {f"data/{name}": value for name, value in pl_module.data.read_figures().items()}
        scheduled = pl_module.schedule_values(max(0, step - 1))
        figures |= {f"schedule/{name}": value for name, value in scheduled.items() if name != "lr_factor"}
        pl_module.latest.update(
            loss=figures["train/loss"], l0=figures["train/l0"], fvu=figures["train/fvu"], dead=figures["train/dead"]
        )
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.log_metrics({"train/log10_density": self._density(variant.firing_counts)}, step=step)
        variant.firing_counts.zero_()
        self._rows_since_density = 0.0

    def _density(self, counts: Tensor) -> Any:
        import wandb  # imported only where a wandb logger exists already

        return wandb.Histogram(np_histogram=density_histogram(counts, self._rows_since_density))


def density_histogram(counts: Tensor, rows: float) -> tuple[Any, Any]:
    """Counts and edges (numpy) of log10(firing rate); latents that never fired fall into the first bin."""
    density = (counts.double().cpu() / max(rows, 1.0)).clamp_min(1e-7).log10().float()
    counted, edges = torch.histogram(density.clamp(-7, 0), DENSITY_EDGES)
    return counted.numpy(), edges.numpy()


class ValidationTable(Callback):
    """Computes the metrics of a validation and logs them as `val/<name>`; keeps the last ones on the module."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks reduce; rank 0 logs."""
        assert isinstance(pl_module, SAEModule)
        result = pl_module.validation_result()
        pl_module.latest["val_fvu"] = result.fvu
        figures = {f"val/{name}": float(value) for name, value in asdict(result).items()}
        # What EarlyStopping and ModelCheckpoint may monitor; `self.log` would send it to the loggers a second time.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)


class ProgressBar(RichProgressBar):
    """Steps, speed and time left, with loss, L0, FVU and dead latents of the last read-out."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Shown at the right of the bar."""
        assert isinstance(pl_module, SAEModule)
        shown = {name: f"{value:.4g}" for name, value in pl_module.latest.items() if name != "dead"}
        if "dead" in pl_module.latest:
            shown["dead"] = f"{pl_module.latest['dead']:.0f}"
        return shown

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class ProgressLines(Callback):
    """The same figures as a line every tenth of the run, where there is no terminal to draw a bar on."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._clock, self._first = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Prints, when it is time; on rank 0."""
        step, total = trainer.global_step, trainer.max_steps
        assert isinstance(pl_module, SAEModule)
        if not pl_module.stepped or step % max(1, total // 10) or not trainer.is_global_zero:
            return
        pace = (time.perf_counter() - self._clock) / (step - self._first)
        figures = "".join(f"{name} {value:.4g}, " for name, value in pl_module.latest.items())
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (total - step)))
        tokens = pl_module.data.rows_per_step / pace
        print(f"step {step:,} of {total:,}: {figures}{tokens:,.0f} tokens/s, {left} left", flush=True)
