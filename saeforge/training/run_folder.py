"""The RUN folder: checkpoints written atomically, stops that leave a run resumable, and the folded SAE at the end."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from saeforge.errors import CheckpointError, ConfigError

CHECKPOINTS_PER_RUN = 10
CHECKPOINT_SECONDS = 1800.0


def last_checkpoint(run: Path) -> Path:
    """The checkpoint that a resumed run goes on from.

    Raises:
        CheckpointError: there is none.
    """
    path = run / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise CheckpointError(
            f"{run} has no checkpoint to resume from ({path} is missing); leave --ckpt_path out to start"
        )
    return path


def check_free(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses to train into a folder that holds a run, unless that is what was asked for.

    Raises:
        ConfigError: the folder holds a run.
    """
    if resume or overwrite or int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return
    if (run / "checkpoints" / "last.ckpt").exists() or (run / "sae").exists():
        raise ConfigError(
            f"{run} already holds a run; go on with `--ckpt_path last`, "
            "choose another `--run`, or give `--overwrite true`"
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Temporary name, fsync, rename, fsync of the folder: a killed process leaves the previous checkpoint whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes one checkpoint.

        Raises:
            CheckpointError: the disk refused; the previous checkpoint is intact.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.part-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise CheckpointError(
                f"could not write the checkpoint {path}: {error}; free space and resume with --ckpt_path last"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: Any = True
    ) -> Any:
        """Reads one checkpoint, plain types and tensors only.

        Raises:
            CheckpointError: damaged, or not a checkpoint.
        """
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, io.UnsupportedOperation) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"the checkpoint {path} cannot be read ({reason}); give another one") from error
        except Exception as error:  # pickle raises its own, undocumented set of types
            raise CheckpointError(f"{path} is not a checkpoint of plain tensors ({type(error).__name__})") from error


class RunFolder(Callback):
    """Keeps RUN in order: checkpoints on the way, a stop at a whole step on Ctrl-C or SIGTERM, the SAE at the end.

    RUN/checkpoints/last.ckpt is replaced ten times a run, and at least every `CHECKPOINT_SECONDS`.
    """

    def __init__(self, run: Path, *, checkpoints: bool = True) -> None:
        self.run, self.checkpoints = run, checkpoints
        self.stopped_by: str | None = None
        self._previous: dict[int, Any] = {}
        self._saved_step, self._saved_at = -1, time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the folder and takes the signals."""
        self.run.mkdir(parents=True, exist_ok=True)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._stop)
        self._trainer = trainer

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:  # the second one is meant
            raise KeyboardInterrupt
        self.stopped_by = signal.Signals(number).name
        self._trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Saves, when it is time. The clock is rank 0's, since all ranks must save together."""
        step = trainer.global_step
        if not self.checkpoints or step == self._saved_step:  # the same step: inside an accumulation of gradients
            return
        due = step % max(1, trainer.max_steps // CHECKPOINTS_PER_RUN) == 0
        if not due and step % 16 == 0:
            due = trainer.strategy.broadcast(time.monotonic() - self._saved_at > CHECKPOINT_SECONDS)
        if due:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.run / "checkpoints" / "last.ckpt", weights_only=False)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the state after the last step, and the SAE."""
        variant: Any = pl_module.variant
        stopped = variant.run.group.agree(self.stopped_by is not None, pl_module.device)
        if self.checkpoints and self._saved_step != trainer.global_step:
            self._save(trainer)
        if trainer.is_global_zero and not stopped:
            sae = variant.fold()
            sae.meta = pl_module.provenance()  # type: ignore[operator]
            sae.save(self.run / "sae")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
