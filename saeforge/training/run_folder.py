"""The RUN folder: checkpoints written atomically, stops that leave a run resumable, and the folded SAE at the end."""

from __future__ import annotations

import io
import os
import shutil
import signal
import threading
import time
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from saeforge.errors import CheckpointError, ConfigError, SaeforgeError
from saeforge.features.store import STORE_FILE, progress_file
from saeforge.ops import Group
from saeforge.training.module import SAEModule
from saeforge.training.parts import PARTS, remove_others

CHECKPOINTS_PER_RUN = 10
CHECKPOINT_SECONDS = 1800.0
#: Steps between two questions of the ranks to each other whether one of them was told to stop.
AGREE_STEPS = 8
#: What finishes the step, saves and stops: Ctrl-C, a scheduler's end, and its warning ahead of that.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
#: A second Ctrl-C after so many seconds leaves at once. Sooner it is the same one, which torchrun repeats.
MEANT_SECONDS = 1.0


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
    if (run / "checkpoints" / "last.ckpt").exists() or (run / "sae").exists() or any(run.glob("*/sae")):
        raise ConfigError(
            f"{run} already holds a run; go on with `--ckpt_path last`, "
            "choose another `--run`, or give `--overwrite true`"
        )


def make_folder(run: Path) -> None:
    """Makes the RUN folder.

    Raises:
        ConfigError: it cannot be made, or not be written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the RUN folder {run} cannot be made ({error.strerror}); choose another --run") from error
    if not os.access(run, os.W_OK | os.X_OK):
        raise ConfigError(f"the RUN folder {run} cannot be written to; mend its permissions or choose another --run")


def drop_if_empty(run: Path) -> None:
    """Removes the folder of a run that was refused before it wrote anything: it holds empty folders at most."""
    folders = [run, *run.rglob("*")]
    if all(path.is_dir() and not path.is_symlink() for path in folders):  # a link is someone's
        shutil.rmtree(run)


def clear(run: Path) -> None:
    """Removes what a former run left, so that nothing of it can be taken for this one's."""
    if (run / "checkpoints").exists():
        shutil.rmtree(run / "checkpoints")
    for folder in [run, *(path.parent for path in run.glob("*/sae"))]:  # one SAE, or several side by side
        if (folder / "sae").exists():
            shutil.rmtree(folder / "sae")
        for path in (folder / "evaluation.json", folder / "concepts.json", folder / STORE_FILE, progress_file(folder)):
            path.unlink(missing_ok=True)
        (folder / "report.html").unlink(missing_ok=True)
    for path in run.glob("*/version_*/metrics.csv"):  # this run's own is not there yet
        path.unlink()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Temporary name, fsync, rename, fsync of the folder: a killed process leaves the previous checkpoint whole.

    What ranks wrote beside it (`parts`) is there before, and what they wrote for the previous one goes after.

    Args:
        mapped: leave what is read on the disk until it is looked at, for ranks that take a few rows of it.
    """

    def __init__(self, *, mapped: bool = False) -> None:
        super().__init__()
        self.mapped = mapped

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
            remove_others(path, checkpoint.get(PARTS))
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
            _check_sums(Path(path))
            checkpoint = torch.load(str(path), map_location=map_location, weights_only=True, mmap=self.mapped)
            if isinstance(checkpoint, dict) and PARTS in checkpoint:
                checkpoint[PARTS] = str(Path(path).parent / checkpoint[PARTS])
            return checkpoint
        except CheckpointError:
            raise
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, io.UnsupportedOperation) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"the checkpoint {path} cannot be read ({reason}); give another one") from error
        except Exception as error:  # pickle raises its own, undocumented set of types
            raise CheckpointError(f"{path} is not a checkpoint of plain tensors ({type(error).__name__})") from error

    def remove_checkpoint(self, path: Any) -> None:
        """Removes one, with what ranks wrote beside it."""
        super().remove_checkpoint(path)
        remove_others(Path(path), None)


def _check_sums(path: Path) -> None:
    """Compares what a checkpoint holds with the checksums that torch wrote, which it does not look at itself.

    Raises:
        CheckpointError: they differ.
    """
    if not zipfile.is_zipfile(path):
        return  # torch says what it is
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(
            f"the checkpoint {path} is damaged: {damaged} in it has another checksum; give another one, or train anew"
        )


class RunFolder(Callback):
    """Keeps RUN in order: checkpoints on the way, a stop at a whole step on a signal, the SAE at the end.

    RUN/checkpoints/last.ckpt is replaced ten times a run, and at least every `CHECKPOINT_SECONDS`.
    """

    def __init__(self, run: Path, *, checkpoints: bool = True) -> None:
        self.run, self.checkpoints = run, checkpoints
        self.stopped_by: str | None = None
        self._previous: dict[int, Any] = {}
        self._stopped_at, self._ended = 0.0, False
        self._saved_step, self._saved_at = -1, time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous[number] = signal.signal(number, self._stop)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals back: Lightning has put its own SIGTERM handler in front, which leaves without saving.

        Its handler of SIGUSR1 under SLURM, which saves elsewhere and requeues the job, gives way to ours by itself.
        """
        for number in self._previous:
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stopped_by is None:
            self._stopped_at = now
            if not self._ended:  # else too late to stop anything, and other ranks may not have heard of it
                self.stopped_by = signal.Signals(number).name
        elif number == signal.SIGINT and now - self._stopped_at > MEANT_SECONDS:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stops or saves, when it is time. The clock is rank 0's, since all ranks must save together."""
        assert isinstance(pl_module, SAEModule)
        if not pl_module.stepped:  # a checkpoint would lose the gradients accumulated so far
            return
        step, group = trainer.global_step, Group.world()
        # A signal reaches the ranks at different steps, or one of them only: they stop at the same step or hang.
        if (group.size == 1 or step % AGREE_STEPS == 0) and self._agree_to_stop(pl_module):
            trainer.should_stop = True
        if not self.checkpoints:
            return
        due = step % max(1, trainer.max_steps // CHECKPOINTS_PER_RUN) == 0
        if not due and step % 16 == 0:
            due = trainer.strategy.broadcast(time.monotonic() - self._saved_at > CHECKPOINT_SECONDS)
        if due:
            self._save(trainer, pl_module)

    def _agree_to_stop(self, pl_module: SAEModule) -> bool:
        group = Group.world()
        if group.size > 1:  # all ranks report the same one, whichever of them it has reached so far
            own = 0 if self.stopped_by is None else signal.Signals[self.stopped_by].value
            number = -int(group.minimum(torch.tensor(-own, device=pl_module.device)))
            if number:
                self.stopped_by = signal.Signals(number).name
        return self.stopped_by is not None

    def _save(self, trainer: Trainer, pl_module: SAEModule) -> None:
        # The loss is read every log_every_n_steps only: a run that broke since must not replace its last good state.
        broken = not all(bool(torch.isfinite(weight).all()) for weight in pl_module.parameters())
        if Group.world().agree(broken, pl_module.device):  # a rank may hold latents that the others do not
            raise SaeforgeError(
                f"the weights are not finite at step {trainer.global_step}; lower model.lr, or check the activations; "
                "the last checkpoint is intact"
            )
        trainer.save_checkpoint(self.run / "checkpoints" / "last.ckpt", weights_only=False)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the state after the last step."""
        assert isinstance(pl_module, SAEModule)
        self._agree_to_stop(pl_module)
        self._ended = True
        if self.checkpoints and self._saved_step != trainer.global_step:
            self._save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the SAE; also when a checkpoint of the last step was resumed, which leaves nothing to train."""
        assert isinstance(pl_module, SAEModule)
        if trainer.global_step >= trainer.max_steps:
            self.stopped_by = None  # a signal at the last step came too late to stop anything
        if self.stopped_by is None and (trainer.is_global_zero or pl_module.shared_out):
            saes = pl_module.folded(kept=trainer.is_global_zero)
            for member, sae in zip(pl_module.members, saes, strict=trainer.is_global_zero):
                (self.run / member.name).mkdir(exist_ok=True)
                sae.save(self.run / member.name / "sae")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
