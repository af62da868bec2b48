"""`WandbRuns`: a wandb run for each SAE of a sweep, all in one group, so that they lie over each other in one plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from saeforge.errors import ConfigError
from saeforge.training import wandb_log
from saeforge.training.loggers import Value


class WandbRuns(Logger):
    """Several `WandbLogger`s behind one.

    A figure `NAME/train/l0` goes to the run of NAME as `train/l0`; one that belongs to no SAE goes with the others of
    its call, and to all of them where it comes alone.

    Args:
        loggers: by name of the SAE.
    """

    def __init__(self, loggers: Mapping[str, WandbLogger]) -> None:
        super().__init__()
        self.loggers = dict(loggers)

    @classmethod
    def of(
        cls, logger: WandbLogger, names: Sequence[str], folder: str, ids: Mapping[str, str] | None = None
    ) -> WandbRuns:
        """One like `logger` for each of the names.

        Args:
            logger: as configured; it has not started a run.
            names: of the SAEs.
            folder: name of the RUN folder, which names the group if the logger does not.
            ids: of earlier runs to go on in, by name.

        Raises:
            ConfigError: options that make sense for a single run only.
        """
        options = dict(logger._wandb_init)  # Lightning keeps no public record; the pin lightning<2.7 guards it
        if options.pop("id") is not None or logger._experiment is not None:
            raise ConfigError(
                "a sweep makes a wandb run for each SAE: leave out the logger's id, version and experiment"
            )
        if logger._log_model:
            raise ConfigError(
                "the logger's log_model would upload checkpoints, which hold all SAEs of a sweep: leave it out"
            )
        name, group = options.pop("name"), options.pop("group", None)
        # "create_new": a second run beside one that goes on; else wandb hands out the first one again.
        shared = {**options, "group": group or name or folder, "reinit": "create_new"}
        save_dir = shared.pop("dir")
        return cls(
            {
                each: WandbLogger(
                    name=f"{name}-{each}" if name else each,
                    save_dir=save_dir,
                    offline=logger._offline,
                    prefix=logger._prefix,
                    id=(ids or {}).get(each),
                    **shared,
                )
                for each in names
            }
        )

    @property
    def name(self) -> str | None:
        """The project."""
        return next(iter(self.loggers.values())).name

    @property
    def version(self) -> str | None:
        """None: each run has its own."""
        return None

    @property
    def save_dir(self) -> str | None:
        """Folder of the runs."""
        return next(iter(self.loggers.values())).save_dir

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hands each figure to the run that it belongs to."""
        for name, part in self._parts(metrics).items():
            self.loggers[name].log_metrics(part, step=step)

    @rank_zero_only
    def send(self, values: Mapping[str, Value], step: int) -> None:
        """The same for values of all kinds (`saeforge.training.loggers`)."""
        for name, part in self._parts(values).items():
            wandb_log.send(self.loggers[name], part, step)

    def _parts(self, metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What each run gets."""
        parts: dict[str, dict[str, Any]] = {}
        shared: dict[str, Any] = {}
        for key, value in metrics.items():
            name, _, rest = key.partition("/")
            if name in self.loggers:
                parts.setdefault(name, {})[rest] = value
            else:
                shared[key] = value
        return {name: {**parts.get(name, {}), **shared} for name in parts or self.loggers}

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """To all."""
        for logger in self.loggers.values():
            logger.log_hyperparams(params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the runs: wandb itself ends at exit only the one that it takes for the process's own."""
        for logger in self.loggers.values():
            logger.finalize(status)
            logger.experiment.finish(exit_code=0 if status == "success" else 1)
