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

from saeforge.ops import Group
from saeforge.training.member import Member
from saeforge.training.module import SAEModule
from saeforge.training.wandb_runs import WandbRuns

#: Edges of the density histogram: log10 of the share of tokens on which a latent fires.
DENSITY_EDGES = torch.arange(-7.0, 0.01, 0.25)


class Telemetry(Callback):
    """Reads the run's figures every `log_every_n_steps` and hands them to the logger in one call.

    Keys: `train/loss`, `train/<term>` for each of the variant's terms, `train/l0`, `train/fvu`, `train/dead`,
    `train/tokens_per_second`, `schedule/<name>`, `schedule/lr`; what reading costs on rank 0, as `data/wait_ms` (a step
    stood still for data), `data/windows_ready` (read ahead), `data/read_gb_per_second` (a reading thread); the density
    histogram goes to wandb as `train/log10_density`. Where several SAEs train, the names of each begin with its own;
    `WandbRuns` takes it off again.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._clock = time.perf_counter()
        self._rows_since_density: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads out, when it is time."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]  # a property
        assert isinstance(pl_module, SAEModule)
        if not pl_module.stepped or (step % every and step != trainer.max_steps):
            return
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        shared = {"train/tokens": float(step * pl_module.data.rows_per_step)}
        shared |= {f"data/{name}": value for name, value in pl_module.data.read_figures().items()}
        for member in pl_module.members:
            prefix = prefix_of(member)
            latents = member.variant.latent_group
            values = member.readout.read(member.variant.run.group, latents)
            if not values:
                continue
            self._rows_since_density[prefix] = self._rows_since_density.get(prefix, 0.0) + values["rows"]
            shared["train/tokens_per_second"] = values["rows"] / elapsed
            figures = self._figures(member, values, step)
            for logger in trainer.loggers:
                logger.log_metrics({**{f"{prefix}{name}": v for name, v in figures.items()}, **shared}, step=step)
                if isinstance(logger, WandbLogger | WandbRuns):
                    # On all ranks, since each counts its own latents where they are shared out.
                    counts, rows = member.variant.firing_counts, self._rows_since_density[prefix]
                    histogram = density_histogram(counts, rows, latents)
                    if trainer.is_global_zero:
                        logger.log_metrics({f"{prefix}train/log10_density": self._density(histogram)}, step=step)
            member.variant.firing_counts.zero_()
            self._rows_since_density[prefix] = 0.0

    def _figures(self, member: Member, values: dict[str, float], step: int) -> dict[str, float]:
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

    def _density(self, histogram: tuple[Any, Any]) -> Any:
        import wandb  # imported only where a wandb logger exists already

        return wandb.Histogram(np_histogram=histogram)


def prefix_of(member: Member) -> str:
    """What stands before the names of an SAE's figures: nothing where it trains alone."""
    return f"{member.name}/" if member.name else ""


def density_histogram(counts: Tensor, rows: float, latents: Group | None = None) -> tuple[Any, Any]:
    """Counts and edges (numpy) of log10(firing rate); latents that never fired fall into the first bin.

    Args:
        counts: (d_sae,) rows in which each latent fired, of so many `rows`.
        rows: see `counts`.
        latents: the ranks that share out the latents, if some do; the histogram is that of all of them.
    """
    density = (counts.double().cpu() / max(rows, 1.0)).clamp_min(1e-7).log10().float()
    counted, edges = torch.histogram(density.clamp(-7, 0), DENSITY_EDGES)
    if latents is not None and latents.size > 1:
        counted = latents.sum(counted.to(counts.device)).cpu()  # where the group's collectives work
    return counted.numpy(), edges.numpy()


class ValidationTable(Callback):
    """Computes the metrics of a validation and logs them as `val/<name>`; keeps the last ones on the module."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks reduce; rank 0 logs."""
        assert isinstance(pl_module, SAEModule)
        for member, result in zip(pl_module.members, pl_module.validation_results(), strict=True):
            member.latest["val_fvu"] = result.fvu
            figures = {f"{prefix_of(member)}val/{name}": float(value) for name, value in asdict(result).items()}
            # What EarlyStopping and ModelCheckpoint may monitor; `self.log` would send it to the loggers once more.
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)


def latest_of(module: SAEModule) -> dict[str, float]:
    """The last figures for a line on the screen: of several SAEs their means, dead latents summed."""
    members = module.members
    names = members[0].latest
    figures = {name: sum(member.latest[name] for member in members) for name in names}
    return {name: value if name == "dead" else value / len(members) for name, value in figures.items()}


class ProgressBar(RichProgressBar):
    """Steps, speed and time left, with loss, L0, FVU and dead latents of the last read-out."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Shown at the right of the bar."""
        assert isinstance(pl_module, SAEModule)
        latest = latest_of(pl_module)
        shown = {name: f"{value:.4g}" for name, value in latest.items() if name != "dead"}
        if "dead" in latest:
            shown["dead"] = f"{latest['dead']:.0f}"
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
        figures = "".join(f"{name} {value:.4g}, " for name, value in latest_of(pl_module).items())
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (total - step)))
        tokens = pl_module.data.rows_per_step / pace
        print(f"step {step:,} of {total:,}: {figures}{tokens:,.0f} tokens/s, {left} left", flush=True)
