"""`RunOutputs`: what a run leaves in wandb and TensorBoard beside curves: a table of latents, the SAE, its dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from saeforge.errors import ConfigError, SaeforgeError
from saeforge.features.preview import Shown, top_latents
from saeforge.sae import load
from saeforge.training.figures import X_AXIS
from saeforge.training.loggers import Table, Value, log, shows_more
from saeforge.training.member import Member
from saeforge.training.module import SAEModule
from saeforge.training.telemetry import prefix_of
from saeforge.training.wandb_log import log_sae, remember, use_dataset
from saeforge.training.wandb_runs import WandbRuns

CONTEXTS = 3


class RunOutputs(Callback):
    """Hands the finished SAEs to loggers that take more than numbers; on rank 0, after the SAEs were saved.

    Args:
        top_latents: rows of the table `latents/top`; 0 for none.
        artifact: make the SAE an output artifact of its wandb run, and the dataset its input (online only).
    """

    def __init__(self, top_latents: int = 50, artifact: bool = True) -> None:
        if top_latents < 0:
            raise ConfigError(f"logging.top_latents = {top_latents}: expected 0 or more")
        self.top_latents, self.artifact = top_latents, artifact

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers the wandb runs, so that a resumed run goes on in them, and names the dataset as their input."""
        assert isinstance(pl_module, SAEModule)
        if not trainer.is_global_zero:
            return
        for loggers in _wandb(trainer):
            remember(Path(trainer.default_root_dir), loggers)
            for member in pl_module.members if self.artifact else ():
                use_dataset(_of(loggers, member), member.pair.identity)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the table and the artifacts, of a run that came to its end."""
        assert isinstance(pl_module, SAEModule)
        if not trainer.is_global_zero or trainer.global_step < trainer.max_steps:
            return
        step, run = trainer.global_step, Path(trainer.default_root_dir)
        x_axis = float(step * pl_module.data.rows_per_step)
        for member in pl_module.members:
            if self.top_latents and any(shows_more(logger) for logger in trainer.loggers):
                table = self._table(run / member.name / "sae", member)
                if table is not None:
                    values: dict[str, Value] = {X_AXIS: x_axis, f"{prefix_of(member)}latents/top": table}
                    log(trainer, values, step)
            for loggers in _wandb(trainer) if self.artifact else ():
                log_sae(_of(loggers, member), run / member.name / "sae")

    def _table(self, folder: Path, member: Member) -> Table | None:
        try:
            shown = top_latents(load(folder), latents=self.top_latents, contexts=CONTEXTS)
        except SaeforgeError as error:  # no texts, no tokenizer: what the run is for is saved already
            rank_zero_info(f"{member.name or 'the SAE'} has no table of top latents: {error}")
            return None
        return as_table(shown)


def as_table(shown: list[Shown]) -> Table:
    """The table `latents/top`."""
    columns = ["latent", "density", "share", "largest", *(f"context {number + 1}" for number in range(CONTEXTS))]
    rows = []
    for each in shown:
        contexts = [*each.contexts, *[""] * (CONTEXTS - len(each.contexts))]
        rows.append([each.latent, each.density, each.share, each.largest, *contexts])
    return Table(columns, rows)


def _wandb(trainer: Trainer) -> Iterator[dict[str, WandbLogger]]:
    """Of each wandb logger its runs, by name of the SAE; "" where one run has all."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbRuns):
            yield logger.loggers
        elif isinstance(logger, WandbLogger):
            yield {"": logger}


def _of(loggers: dict[str, WandbLogger], member: Member) -> WandbLogger:
    return loggers.get(member.name) or loggers[""]
