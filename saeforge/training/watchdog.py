"""A rank that dies, stops or stands still ends the run with a line that names it, and leaves nobody waiting.

Every rank has two threads: one exchanges small texts with the others through the store that the process group was made
with, on a connection of its own; one judges them. Rank 0 watches all, the others watch rank 0 and what it has found, so
that traffic grows with the number of ranks, not its square. What a run left in RUN/checkpoints is whole: checkpoints
are renamed into place.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from saeforge.errors import SaeforgeError
from saeforge.ops import Group
from saeforge.training.module import SAEModule

#: Exit code of a run that another try may finish: EX_TEMPFAIL.
LOST_RANK = 75
#: Seconds without a sign of life after which a process counts as dead, unless `rank_timeout` is less.
SILENT_SECONDS = 60.0
#: Seconds that a rank whose collective failed waits for the reason.
REASON_SECONDS = 10.0


class Watch:
    """The two threads of one rank.

    Args:
        store: of this watch alone; all ranks' see the same keys.
        rank, size: this process's place.
        silent: seconds without a sign of life after which a rank is lost.
        still: seconds without progress of any rank after which the one that is behind ends the run.
        say: called with what was found, by rank 0, or by the others if it is rank 0 that is lost.
        end: called last, on every rank.
        interval: seconds between signs of life.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        silent: float,
        still: float,
        say: Callable[[str], None],
        end: Callable[[], None],
        interval: float = 1.0,
    ) -> None:
        self.rank, self.silent, self.still, self.interval = rank, silent, still, interval
        self._store, self._say, self._end = store, say, end
        self._progress, self._state, self._beats = 0, "", 0
        self._closed, self._ended = threading.Event(), threading.Event()
        #: Seconds that this process ran: one that was suspended must not blame the others for the time.
        self._clock = 0.0
        self._watched = [other for other in range(size) if other != rank and 0 in (rank, other)]
        self._seen = dict.fromkeys(self._watched, "0 0 ")
        self._heard = dict.fromkeys(self._watched, 0.0)
        self._moved: dict[int, tuple[int, float]] = {}
        self._verdict = ""
        self._process: dict[int, dict[str, Any]] = {}
        store.set(f"process/{rank}", json.dumps(_this_process()))
        self._beat()
        if rank == 0:
            store.set("verdict", "")

    def start(self) -> None:
        """Starts watching; every rank's `Watch` has been made."""
        for other in self._watched:
            self._process[other] = json.loads(self._store.get(f"process/{other}"))
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, daemon=True, name=f"saeforge-watch{work.__name__}").start()

    def progress(self) -> None:
        """This rank got further, as with each collective that it enters: who waits is ahead of the other."""
        self._progress += 1

    @property
    def _reached(self) -> int:
        return self._progress + Group.entered

    def close(self) -> None:
        """This rank is done: neither watches nor is watched any more."""
        self._leave("left")

    def failed(self, error: BaseException) -> None:
        """This rank ends with an error of its own: tells the others which."""
        self._leave(f"failed: {(' '.join(str(error).split()) or type(error).__name__)[:500]}")

    def reason(self, seconds: float) -> None:
        """Waits so long for what a failed collective was due to; if it is found the process ends."""
        self.silent = min(self.silent, 5 * self.interval)
        self._ended.wait(seconds)

    def _leave(self, state: str) -> None:
        if self._closed.is_set():
            return
        self._state = state
        # Not here, where a store whose process is stopped could hold up the main thread.
        last = threading.Thread(target=self._say_last, daemon=True)
        last.start()
        last.join(2 * self.interval)
        self._closed.set()

    def _say_last(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store went with rank 0's process, and nobody is left to be told
            self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", f"{self._beats} {self._reached} {self._state}")

    def _exchange(self) -> None:
        keys = ["verdict", *(f"beat/{other}" for other in self._watched)]
        while not self._closed.is_set():
            try:
                self._beat()
                verdict, *beats = (value.decode() for value in self._store.multi_get(keys))
            except (
                RuntimeError
            ):  # a lost connection stays lost: rank 0, whose process holds the store, is gone or stopped
                self.silent = min(self.silent, 5 * self.interval)
                return
            self._verdict = verdict
            for other, beat in zip(self._watched, beats, strict=True):
                if beat != self._seen[other]:
                    self._seen[other], self._heard[other] = beat, self._clock
            self._closed.wait(self.interval)

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self.interval):
            now = time.monotonic()
            self._clock, before = self._clock + min(now - before, 2 * self.interval), now
            told = self.rank != 0 and self._verdict != ""
            found = "" if told else self._find()
            if self._closed.is_set() or not (told or found):
                continue
            if found:
                self._say(found)
            if self.rank == 0:
                self._store.set("verdict", found)
                self._closed.wait(3 * self.interval)  # the others read it before the store goes with this process
            self._ended.set()
            self._end()
            return

    def _find(self) -> str:
        """Who is lost and how it shows; "" if nobody is."""
        for other in self._watched:
            _, progress, state = self._seen[other].split(" ", 2)
            if state == "left":
                self._moved.pop(other, None)
                continue
            place = self._process[other]
            name = f"rank {other} (process {place['pid']} on {place['host']})"
            if state.startswith("failed: "):
                return f"{name} {state}"
            here = process_state(place)
            if here == "gone":
                return f"{name} died"
            if (quiet := self._clock - self._heard[other]) > self.silent:
                return f"{name} has given no sign of life for {quiet:.0f} s{' (stopped)' if here == 'T' else ''}"
            self._note(other, int(progress))
        self._note(self.rank, self._reached)
        idle = self._clock - max(at for _, at in self._moved.values())
        if self.rank != 0 or idle <= self.still:
            return ""
        least = min(reached for reached, _ in self._moved.values())
        behind = [str(other) for other, (reached, _) in sorted(self._moved.items()) if reached == least]
        who = f"rank {', '.join(behind)} stands still"
        if len(behind) == len(self._moved):
            who = "all ranks stand still, none behind another"
        return f"{who}, and so did the run for {idle:.0f} s"

    def _note(self, rank: int, reached: int) -> None:
        if self._moved.get(rank, (-1, 0.0))[0] != reached:
            self._moved[rank] = reached, self._clock

    def kill_lost(self) -> None:
        """Ends what the launcher could not: watched processes of this machine that are stopped, with the run over."""
        for place in self._process.values():
            if process_state(place) == "T":
                os.kill(place["pid"], signal.SIGKILL)


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": os.uname().nodename, "space": _space(), "started": _stat(os.getpid())[1]}


def _space() -> str:
    """Names the machine since its start and the container: inside of it, a process number means one process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str]:
    """State and start of a process by /proc; both "" if it has none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def process_state(place: dict[str, Any]) -> str:
    """`gone`, `T` (stopped), another letter of /proc, or "" for a process of another machine."""
    if not place["space"] or place["space"] != _space():
        return ""
    state, started = _stat(place["pid"])
    return "gone" if state in ("", "Z", "X") or started != place["started"] else state


class Watchdog(Callback):
    """Watches the ranks of a run, from its set-up to its last step; nothing on a single device.

    Args:
        run: RUN folder, for the message; None where nothing is written.
        timeout: seconds after which a run that stands still ends.
    """

    def __init__(self, run: Path | None, timeout: float) -> None:
        self.run, self.timeout = run, timeout
        self.watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts watching; the process group stands."""
        group = Group.world()
        if group.size == 1 or stage != "fit":
            return
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=min(self.timeout, SILENT_SECONDS))
        store = dist.PrefixStore("saeforge/watch", dist.TCPStore(address, port, is_master=False, timeout=wait))
        self.watch = Watch(
            store,
            group.rank,
            group.size,
            silent=min(self.timeout, SILENT_SECONDS),
            still=self.timeout,
            say=self.say,
            end=self.end,
            interval=max(1.0, group.size / 64),
        )
        group.barrier()
        self.watch.start()
        # Lightning's own observer of child processes kills rank 0 within five seconds, and with it the message.
        for thread in threading.enumerate():
            if thread.name == "child-process-observer" and hasattr(thread, "_child_processes"):
                thread._child_processes = []

    def say(self, found: str) -> None:
        """Prints what was found."""
        print(f"saeforge: error: {found}; {self.advice()}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends the process, whose main thread may wait for a dead rank forever."""
        assert self.watch is not None
        self.watch.kill_lost()
        os._exit(LOST_RANK)

    def advice(self) -> str:
        """How to go on."""
        if self.run is None:
            return "the run is lost: nothing is written without a RUN folder"
        if (self.run / "checkpoints" / "last.ckpt").is_file():
            return f"go on with `saeforge fit --config {self.run}/config.yaml --ckpt_path last`"
        return "no checkpoint was written yet: start the run again"

    def explain(self, error: Exception) -> None:
        """An exception that may be another rank's death: waits until that is known, which ends the process."""
        watch, self.watch = self.watch, None
        if watch is None:
            return
        if _of_a_collective(error):
            self.watch = watch
            watch.reason(REASON_SECONDS + 3 * watch.interval)
        watch.failed(error)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tells the others why this rank ends, unless the reason is theirs."""
        if self.watch is not None and not _of_a_collective(exception):
            self.watch.failed(exception)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Progress."""
        self._progress()

    def on_after_backward(self, trainer: Trainer, *args: Any) -> None:
        """Progress."""
        self._progress()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Progress."""
        self._progress()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Progress."""
        self._progress()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last collective is over (RunFolder's callback has saved): ranks may leave when they like."""
        assert isinstance(pl_module, SAEModule)
        if self.watch is not None and not pl_module.shared_out:
            self.watch.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where ranks that share out latents had to put the SAE together; or nothing was left to train."""
        if self.watch is not None:
            self.watch.close()

    def _progress(self) -> None:
        if self.watch is not None:
            self.watch.progress()


def _of_a_collective(error: BaseException) -> bool:
    """Whether an exception is how a collective fails when another rank is gone."""
    if isinstance(error, SaeforgeError):
        return False
    words = ("gloo", "nccl", "connection", "peer", "timed out", "store")
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(word in str(error).lower() for word in words)
    )
