"""A rank that dies, stops, hangs or fails ends the run, named, with a checkpoint to go on from; nobody waits."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from saeforge.errors import ConfigError, DatasetError
from saeforge.training import watchdog
from saeforge.training.trainer import MEETING_SECONDS, SAETrainer
from saeforge.training.watchdog import LOST_RANK, Watch, _of_a_collective, process_state
from tests.test_fit import CLI, arguments
from tests.toy import toy_dataset

TICK = 0.02


class Ranks:
    """Watches of several ranks over one store, in this process."""

    def __init__(self) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.found: dict[int, str | None] = {}
        self.watches: list[Watch] = []

    def make(self, size: int, *, silent: float = 60.0, still: float = 60.0) -> list[Watch]:
        for rank in range(size):
            store = dist.PrefixStore("w", dist.TCPStore("127.0.0.1", self.server.port, is_master=False))

            said: list[str] = []

            def end(rank: int = rank, said: list[str] = said) -> None:
                self.found[rank] = said[0] if said else None

            self.watches.append(
                Watch(store, rank, size, silent=silent, still=still, say=said.append, end=end, interval=TICK)
            )
        return self.watches

    def wait(self, count: int, seconds: float = 20.0) -> dict[int, str | None]:
        """What so many ranks found."""
        deadline = time.monotonic() + seconds
        while len(self.found) < count and time.monotonic() < deadline:
            time.sleep(TICK)
        return self.found


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    for watch in made.watches:
        watch.close()


def test_ranks_that_work_and_leave_are_not_blamed(ranks: Ranks) -> None:
    zero, one = ranks.make(2, silent=10 * TICK, still=15 * TICK)
    for watch in (zero, one):
        watch.start()
    for _ in range(40):
        zero.progress()
        one.progress()
        time.sleep(TICK)
    one.close()
    for _ in range(40):  # rank 0 has more to do than the others: it saves the SAE
        zero.progress()
        time.sleep(TICK)
    assert ranks.found == {}


def test_a_rank_without_a_sign_of_life_is_named(ranks: Ranks) -> None:
    zero, *_ = ranks.make(3, silent=10 * TICK)
    ranks.watches[2].start()
    zero.start()  # rank 1 never does
    found = ranks.wait(2)
    assert "rank 1 (process" in str(found[0])
    assert "no sign of life" in str(found[0])
    assert found[2] is None  # rank 0 has said it


def test_a_rank_that_is_behind_is_named(ranks: Ranks) -> None:
    for watch in ranks.make(3, still=20 * TICK):
        watch.start()
    ranks.watches[0].progress()
    ranks.watches[2].progress()
    assert str(ranks.wait(3)[0]).startswith("rank 1 stands still")


def test_ranks_that_stand_together_are_not_blamed_one_by_one(ranks: Ranks) -> None:
    for watch in ranks.make(2, still=20 * TICK):
        watch.start()
    assert str(ranks.wait(2)[0]).startswith("all ranks stand still")


def test_a_rank_that_fails_says_why(ranks: Ranks) -> None:
    for watch in ranks.make(3):
        watch.start()
    ranks.watches[2].failed(DatasetError("shard 7, block 3: crc32 differs\nfrom the manifest's"))
    found = ranks.wait(2)
    assert str(found[0]).endswith("failed: shard 7, block 3: crc32 differs from the manifest's")
    assert found[1] is None
    assert 2 not in found


def test_rank_zero_is_watched_by_the_others(ranks: Ranks) -> None:
    _, one, two = ranks.make(3, silent=10 * TICK)
    one.start()
    two.start()
    assert all(str(said).startswith("rank 0") for said in ranks.wait(2).values())


def test_a_store_that_is_gone_is_rank_zero_gone() -> None:
    code = (
        "import torch.distributed as d, time\n"
        "s = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(s.port, flush=True)\ntime.sleep(60)"
    )
    found: list[str] = []
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        store = dist.TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False)
        for key, value in (("process/0", store_place(os.getpid())), ("beat/0", "1 0 "), ("verdict", "")):
            store.set(key, value)
        watch = Watch(store, 1, 2, silent=60, still=60, say=found.append, end=print, interval=TICK)
        watch.start()
        server.kill()
    deadline = time.monotonic() + 20
    while not found and time.monotonic() < deadline:
        time.sleep(TICK)
    watch.close()
    assert str(found).startswith("['rank 0 ")


def store_place(pid: int) -> str:
    """What a rank of that process would have said of itself."""
    place = watchdog._this_process()
    return json.dumps({**place, "pid": pid, "started": watchdog._stat(pid)[1]})


def test_a_dead_process_of_this_machine_is_found_at_once(ranks: Ranks) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    zero, _ = ranks.make(2)
    zero._store.set("process/1", store_place(other.pid))
    zero.start()
    time.sleep(10 * TICK)
    assert ranks.found == {}
    other.kill()  # a zombie until it is waited for
    assert str(ranks.wait(1)[0]).endswith("died")
    place = zero._process[1]
    other.wait()
    assert process_state(place) == "gone"
    assert process_state({**place, "space": "another machine"}) == ""
    assert process_state({**watchdog._this_process(), "started": "1"}) == "gone"  # the number went to another process


def test_a_suspended_process_does_not_blame_the_others(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    zero, one = ranks.make(2, silent=2.0)
    real, jump = time.monotonic, [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: real() + jump[0])
    zero.start()
    one.start()
    time.sleep(5 * TICK)
    jump[0] = 1000.0
    time.sleep(20 * TICK)
    assert ranks.found == {}
    assert zero._clock < 10


def test_what_a_collective_raises_is_told_from_a_rank_s_own_error() -> None:
    assert _of_a_collective(RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]"))
    assert _of_a_collective(dist.DistBackendError("NCCL communicator was aborted on rank 1"))
    assert not _of_a_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not _of_a_collective(DatasetError("the connection to the store of objects was lost"))
    assert not _of_a_collective(torch.OutOfMemoryError("CUDA out of memory"))


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_the_timeout_is_that_of_the_process_group(strategy: str) -> None:
    """Which also bounds how long the processes may take to meet, so it is never a few seconds."""
    for given, bound in ((900.0, 900.0), (7.0, MEETING_SECONDS)):
        trainer = SAETrainer(accelerator="cpu", devices=2, strategy=strategy, rank_timeout=given)
        options: Any = trainer.strategy
        assert options._timeout.total_seconds() == bound
        assert False in options._ddp_kwargs.values()  # buffers are not sent around


def test_a_timeout_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank_timeout"):
        SAETrainer(rank_timeout=0.0)


# Whole runs of two processes ---------------------------------------------------------------------------------------


class Falter(Callback):
    """Makes one rank die, stop, hang or fail after a number of steps."""

    def __init__(self, rank: int, step: int, how: str) -> None:
        self.rank, self.step, self.how = rank, step, how

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """In the middle of the run, where it says nothing to anybody."""
        if trainer.global_rank != self.rank or trainer.global_step != self.step:
            return
        if self.how == "hang":
            time.sleep(1e6)
        if self.how == "fail":
            raise DatasetError("block 3 of shard 7 is damaged")
        os.kill(os.getpid(), signal.Signals[self.how])


def falter(
    tmp_path: Path, rank: int, how: str, timeout: float, launcher: tuple[str, ...] = tuple(CLI)
) -> tuple[int, str, float]:
    """Starts a fit of two ranks, one of which falters at step 30 of 60: exit code, what was printed, and seconds."""
    callback = json.dumps(
        {"class_path": "tests.test_lost_rank.Falter", "init_args": {"rank": rank, "step": 30, "how": how}}
    )
    options = {"data.tokens": 256 * 60, "trainer.strategy": "ddp", "trainer.rank_timeout": timeout}
    args = [*arguments(toy_dataset(tmp_path / "acts"), tmp_path / "run", **options), "--trainer.devices=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (tmp_path / "log").open("w+") as log:
        begin = time.monotonic()
        # A session of its own: what is left of the run is found, and ended, whatever happens.
        process = subprocess.Popen(
            [*launcher, *args, f"--trainer.callbacks={callback}"],
            stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=120)
            while members(process.pid) and time.monotonic() - begin < 120:
                time.sleep(0.1)
            assert members(process.pid) == []
        finally:
            if members(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        return code, log.read(), time.monotonic() - begin


def members(group: int) -> list[str]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(path.parent.name)
    return found


def assert_resumable(tmp_path: Path) -> None:
    """One rank goes on from the checkpoint to the end."""
    run = tmp_path / "run"
    assert_saved(run)
    options = {"data.tokens": 256 * 60}
    again = [*CLI, *arguments(tmp_path / "acts", run, **options), "--ckpt_path=last"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run / "sae").is_dir()


def assert_saved(run: Path) -> None:
    """A whole checkpoint of a multiple of six steps."""
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] in (24, 30)


def test_a_killed_rank_ends_the_run_with_its_name(tmp_path: Path) -> None:
    code, said, _ = falter(tmp_path, 1, "SIGKILL", 60.0)
    assert code == LOST_RANK, said
    assert "rank 1 (process" in said, said
    assert "died; go on with `saeforge fit --config" in said, said
    assert_saved(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "timeout", "reason"),
    [
        (0, "SIGKILL", 60.0, "died"),
        (1, "SIGSTOP", 6.0, "no sign of life"),
        (0, "SIGSTOP", 6.0, "no sign of life"),
        (1, "hang", 6.0, "stands still"),
        (0, "hang", 6.0, "stands still"),
        (1, "fail", 60.0, "failed: block 3 of shard 7 is damaged"),
    ],
)
def test_a_faltering_rank_ends_the_run_with_its_name(
    rank: int, how: str, timeout: float, reason: str, tmp_path: Path
) -> None:
    code, said, seconds = falter(tmp_path, rank, how, timeout)
    assert code == (-signal.SIGKILL if rank == 0 and how.startswith("SIG") else LOST_RANK), said
    assert f"rank {rank}" in said, said
    assert reason in said, said
    assert seconds < 100
    assert_resumable(tmp_path)


@pytest.mark.slow
def test_torchrun_s_processes_watch_each_other_too(tmp_path: Path) -> None:
    """Its agent holds the store; a stopped process it would wait for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m", "--", "saeforge.cli.main"]
    code, said, _ = falter(tmp_path, 1, "SIGSTOP", 6.0, (sys.executable, "-m", *launch))
    assert code == 1, said
    assert "rank 1 (process" in said, said
    assert "(stopped); go on with" in said, said
    assert_saved(tmp_path / "run")
