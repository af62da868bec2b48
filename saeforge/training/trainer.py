"""`SAETrainer`: Lightning's Trainer with the house rules, used by the command line and by `train()` alike."""

from __future__ import annotations

import atexit
import functools
import logging
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from saeforge.errors import CheckpointError, ConfigError
from saeforge.ops.native import pool
from saeforge.training.callbacks import ProgressBar, ProgressLines
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.outputs import RunOutputs
from saeforge.training.resampling import Resampling
from saeforge.training.run_folder import AtomicCheckpointIO, RunFolder, drop_if_empty, last_checkpoint, make_folder
from saeforge.training.strategy import DDP_OPTIONS, LatentParallel
from saeforge.training.telemetry import Telemetry
from saeforge.training.validation import Validation
from saeforge.training.wandb_log import remembered, resume_into
from saeforge.training.wandb_runs import WandbRuns
from saeforge.training.watchdog import Watchdog

_STRATEGIES = (None, "auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook", "latent_parallel")

#: Seconds that a run may stand still (Lightning's own default for a collective), and that its processes take to meet.
RANK_TIMEOUT, MEETING_SECONDS = 1800.0, 300.0
#: Validations of a run whose rhythm (`val_check_interval`) was not given.
VALIDATIONS_PER_RUN = 10


class SAETrainer(Trainer):
    """Lightning's Trainer; `default_root_dir` is the RUN folder (None: nothing is written).

    What differs: one epoch is the whole run (passes over the data repeat inside it); figures are read out every
    `log_every_n_steps`; checkpoints are written atomically to RUN/checkpoints/last.ckpt; Ctrl-C, SIGTERM and SIGUSR1
    finish the step, save and stop; a rank that dies or hangs ends the run (see `watchdog`); buffers are not broadcast
    under DDP, since every rank computes the same ones.

    Args:
        rank_timeout: seconds that a run of several ranks may stand still before it ends with a line that names the one
            behind; one that is dead or stopped is found within a minute, or this time if it is less.
        latents: with strategy latent_parallel, how many devices share out the latents of an SAE, a divisor of all of
            them; what is left of the devices shares rows, as ddp does. Null: all of them share out latents.
        kwargs: Lightning's. `strategy` is auto, ddp or latent_parallel (docs/scaling.md).

    Raises:
        ConfigError: `latents` without that strategy, `gradient_clip_val` (the optimizer clips: `model.max_grad_norm`),
            or another precision than 32-true and bf16-mixed.
    """

    def __init__(self, rank_timeout: float = RANK_TIMEOUT, latents: int | None = None, **kwargs: Any) -> None:
        quieten()
        if rank_timeout <= 0:
            raise ConfigError(f"trainer.rank_timeout = {rank_timeout}: expected a positive number of seconds")
        if kwargs.get("gradient_clip_val") is not None:
            raise ConfigError(
                f"trainer.gradient_clip_val = {kwargs['gradient_clip_val']} would clip twice: the optimizer clips "
                "already; set model.max_grad_norm instead"
            )
        precision = kwargs.get("precision") or "32-true"
        if str(precision) not in ("32-true", "32", "bf16-mixed"):
            raise ConfigError(
                f"trainer.precision = {precision}: expected 32-true or bf16-mixed (16-mixed needs a loss scale that "
                "the optimizer does not keep yet; bf16-true loses small updates)"
            )
        kwargs["precision"] = "32-true" if str(precision) == "32" else precision
        if kwargs.get("max_epochs") not in (None, -1):
            raise ConfigError(
                "trainer.max_epochs is not used: set the run's length with data.tokens or trainer.max_steps"
            )
        root = kwargs.get("default_root_dir")
        run = None if root is None else Path(root)
        kwargs["max_epochs"] = -1
        kwargs["num_sanity_val_steps"] = 0
        kwargs["use_distributed_sampler"] = False
        kwargs["enable_model_summary"] = kwargs.get("enable_model_summary") or False
        kwargs["check_val_every_n_epoch"] = None
        self._default_rhythm = kwargs.get("val_check_interval") is None
        kwargs["val_check_interval"] = kwargs.get("val_check_interval") or 1 << 40
        strategy, patience = kwargs.get("strategy"), timedelta(seconds=max(rank_timeout, MEETING_SECONDS))
        if not (strategy in _STRATEGIES or isinstance(strategy, DDPStrategy | SingleDeviceStrategy)):
            raise ConfigError(
                f"trainer.strategy = {strategy}: expected auto, ddp or latent_parallel (parameters sharded otherwise "
                "would break the norm constraint of decoder rows)"
            )
        if latents is not None and strategy != "latent_parallel":
            raise ConfigError(
                f"trainer.latents = {latents} is for trainer.strategy = latent_parallel, not for {strategy or 'auto'}"
            )
        if strategy == "ddp":
            kwargs["strategy"] = DDPStrategy(timeout=patience, **DDP_OPTIONS)
        if strategy == "latent_parallel":
            kwargs["strategy"] = LatentParallel(latents, timeout=patience)
        if kwargs.get("logger") in (None, True):
            kwargs["logger"] = False if run is None else CSVLogger(run, name="csv", flush_logs_every_n_steps=1)
        elif kwargs["logger"] is not False and run is not None:
            kwargs["logger"] = _with_csv(_as_list(kwargs["logger"]), run)
        callbacks = _as_list(kwargs.get("callbacks"))
        validation = _taken(callbacks, Validation) or Validation()
        outputs = _taken(callbacks, RunOutputs) or RunOutputs()
        own: list[Callback] = [Resampling(), Telemetry(), validation]  # RunFolder saves after all of them
        checkpoints = kwargs.get("enable_checkpointing") is not False
        self.run_folder = None if run is None else RunFolder(run, checkpoints=checkpoints)
        if self.run_folder is not None:
            own += [self.run_folder, outputs]  # what was saved is handed on
        self.watchdog = Watchdog(run, rank_timeout)
        own.append(self.watchdog)  # after RunFolder, whose last checkpoint is the ranks' last meeting
        # A bar needs a terminal; without one, lines. `enable_progress_bar: false` asks for neither.
        terminal = sys.stdout.isatty()
        if kwargs.get("enable_progress_bar") is not False:
            own.append(ProgressBar() if terminal else ProgressLines())
            kwargs["enable_progress_bar"] = terminal
        # RUN/checkpoints/last.ckpt is RunFolder's; Lightning's own callback is for those who ask for more.
        kwargs["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        kwargs["callbacks"] = callbacks + own
        kwargs["plugins"] = [
            *_as_list(kwargs.get("plugins")),
            AtomicCheckpointIO(mapped=isinstance(kwargs.get("strategy"), LatentParallel)),
        ]
        super().__init__(**kwargs)
        if strategy in (None, "auto") and isinstance(self.strategy, DDPStrategy):  # several devices
            self.strategy._ddp_kwargs |= DDP_OPTIONS
            self.strategy._timeout = patience

    def fit(self, model: SAEModule, datamodule: ActivationData, ckpt_path: str | None = None) -> None:  # type: ignore[override]
        """Trains to the end of the budget.

        Args:
            model: the host module.
            datamodule: the data; it knows the length of the run.
            ckpt_path: a checkpoint to resume from, or "last" for the one in the RUN folder.
        """
        if self.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning outside its constructor
            steps = self.max_steps
        else:
            steps = datamodule.total_steps(self.max_steps, self.accumulate_grad_batches)
        self.fit_loop.epoch_loop.max_steps = steps
        if self._default_rhythm:
            self.val_check_interval = max(1, steps // VALIDATIONS_PER_RUN) * self.accumulate_grad_batches
        if str(ckpt_path) == "last":
            ckpt_path = str(last_checkpoint(Path(self.default_root_dir)))
        if ckpt_path is not None and not Path(ckpt_path).is_file():
            raise CheckpointError(f"no checkpoint at {ckpt_path}; expected a file such as RUN/checkpoints/last.ckpt")
        model.check(datamodule.source)
        if isinstance(self.strategy, LatentParallel):
            model.check_shared_out(self.strategy.sizes(self.world_size)[1])
        if self.run_folder is not None:
            make_folder(self.run_folder.run)
        self._prepare_wandb(model, datamodule, resumed=ckpt_path is not None)
        try:
            super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        except Exception as error:
            self.watchdog.explain(error)
            if type(error).__module__.startswith("wandb."):
                reason = " ".join(str(error).split())
                raise ConfigError(f"wandb: {reason}; `wandb login`, or set the logger's `offline: true`") from error
            raise
        finally:
            pool.release()
            if self.run_folder is not None and self.is_global_zero:
                drop_if_empty(self.run_folder.run)
        if dist.is_initialized():
            _leave_at_exit()

    def _prepare_wandb(self, model: SAEModule, data: ActivationData, *, resumed: bool) -> None:
        """Gives each SAE of a sweep a wandb run of its own, and a resumed run its earlier ones."""
        if not any(isinstance(logger, WandbLogger) for logger in self.loggers):
            return
        run = Path(self.default_root_dir)
        ids = remembered(run) if resumed and self.run_folder is not None else {}
        loggers: list[Logger] = []
        for logger in self.loggers:
            if isinstance(logger, WandbLogger) and model.swept:
                logger = WandbRuns.of(logger, model.names(data.source), run.name, ids)
            elif isinstance(logger, WandbLogger) and "" in ids:
                resume_into(logger, ids[""])
            loggers.append(logger)
        self.loggers = loggers


@functools.cache
def _leave_at_exit() -> None:
    """Ends the process group before the interpreter: gloo's threads otherwise abort a rank at exit, now and then."""
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def _with_csv(loggers: list[Any], run: Path) -> list[Any]:
    """The loggers and a CSV log in RUN, so that its curves are there for `saeforge report` whoever else has them."""
    there = any(isinstance(logger, CSVLogger) for logger in loggers)
    return loggers if there else [*loggers, CSVLogger(run, name="csv", flush_logs_every_n_steps=1)]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) else [value]


Kind = TypeVar("Kind", bound=Callback)


def _taken(callbacks: list[Any], kind: type[Kind]) -> Kind | None:
    """Takes the callback of a kind out of a list, if there is one.

    Raises:
        ConfigError: there are several.
    """
    found = [callback for callback in callbacks if isinstance(callback, kind)]
    if len(found) > 1:
        raise ConfigError(f"trainer.callbacks has {len(found)} of {kind.__name__}; give one of them")
    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, kind)]
    return found[0] if found else None


def quieten() -> None:
    """Drops Lightning's advertisements and its hints that do not apply; warnings stay."""

    class NoTips(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            text = record.getMessage()
            return "Tip:" not in text and "available:" not in text

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).addFilter(NoTips())
    # Lightning 2.6 asks a question that torch 2.13 has renamed; users can do nothing about it.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
