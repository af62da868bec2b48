"""Hands a run's figures to its loggers, each in its own way; one that fails is named and left out of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from saeforge.errors import ConfigError


class Histogram(NamedTuple):
    """Counts (n,) int64 of bins with edges (n + 1,)."""

    counts: np.ndarray
    edges: np.ndarray


class Table(NamedTuple):
    """Rows of plain values under named columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


#: What is logged under a name.
Value = float | Histogram | Table


def shows_more(logger: Logger) -> bool:
    """Whether a logger shows histograms and tables; the others get scalars."""
    from saeforge.training.wandb_runs import WandbRuns  # which imports this module

    return isinstance(logger, TensorBoardLogger | WandbLogger | WandbRuns)


def describe(logger: Logger, facts: Mapping[str, Any]) -> None:
    """Hands a logger what is known before the first step, nested plain values.

    Raises:
        ConfigError: it cannot write.
    """
    try:
        logger.log_hyperparams(dict(facts))
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{type(logger).__name__} cannot start ({reason}); free space, or choose another trainer.logger"
        ) from error


def log(trainer: Trainer, values: Mapping[str, Value], step: int) -> None:
    """Hands values to all loggers, in one call each. On rank 0; elsewhere nothing happens.

    What fails in the middle of a run (a full disk, a service that died) must not end it: the logger is named in a
    warning and gets nothing more. Whoever calls this may not let a collective depend on which loggers are left.
    """
    if not trainer.is_global_zero:
        return
    for logger in list(trainer.loggers):
        try:
            _send(logger, values, step)
        except Exception as error:  # loggers are other people's code, and raise what they like
            trainer.loggers = [other for other in trainer.loggers if other is not logger]
            reason = " ".join(str(error).split())[:300]
            rank_zero_warn(
                f"{type(logger).__name__} failed at step {step:,} ({type(error).__name__}: {reason}); training goes on "
                "without it"
            )


def _send(logger: Logger, values: Mapping[str, Value], step: int) -> None:
    from saeforge.training.wandb_log import send  # both import this module
    from saeforge.training.wandb_runs import WandbRuns

    if isinstance(logger, WandbRuns):
        logger.send(values, step)
        return
    if isinstance(logger, WandbLogger):
        send(logger, values, step)
        return
    scalars = {name: value for name, value in values.items() if isinstance(value, int | float)}
    if scalars:
        logger.log_metrics(scalars, step=step)
    if isinstance(logger, TensorBoardLogger):
        _send_to_tensorboard(logger, values, step)
    if isinstance(logger, CSVLogger):  # which by itself writes where (step + 1) % 100 == 0: never, at steps 50, 100 ...
        logger.save()


def _send_to_tensorboard(logger: TensorBoardLogger, values: Mapping[str, Value], step: int) -> None:
    for name, value in values.items():
        if isinstance(value, Table):
            logger.experiment.add_text(name, as_markdown(value), step)
        elif isinstance(value, Histogram):
            counts, middles = value.counts, (value.edges[1:] + value.edges[:-1]) / 2
            logger.experiment.add_histogram_raw(
                name,
                min=float(value.edges[0]),
                max=float(value.edges[-1]),
                num=int(counts.sum()),
                sum=float(counts @ middles),
                sum_squares=float(counts @ middles**2),
                bucket_limits=value.edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )


def as_markdown(table: Table) -> str:
    """A table in Markdown: a line a row, whatever its cells hold."""

    def line(cells: Sequence[Any]) -> str:
        shown = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in shown) + " |"

    return "\n".join([line(table.columns), "|" + "---|" * len(table.columns), *map(line, table.rows)])
