"""What a person sees of a run on the screen: a progress bar, or lines where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from saeforge.training.module import SAEModule


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
