"""Many short runs of two forked gloo ranks, one after the other, with delays of their own: does any stand still?

python -m tests.short_runs DATASET FOLDER OUT.json N [STRATEGY ...]

The strategies take turns. In every tenth run one rank is killed at some step, in another tenth told to stop. Each run
has SECONDS to end; what is left of one that does not is killed. OUT.json lists for each how its ranks ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from saeforge.data.shard_source import ShardSource
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.trainer import SAETrainer
from saeforge.variants import Gated
from tests.forked import run_rank

RANKS, STEPS, SECONDS = 2, 20, 120.0


class Unsteady(Callback):
    """Delays one rank here and there, and at one step sends its process a signal.

    Args:
        rank: this one.
        run: number of the run, from which all chance comes.
        slow: whether this host is the slower one, by a lot.
        fate: what happens to this rank in the middle: a signal, or none.
    """

    def __init__(self, rank: int, run: int, slow: bool, fate: signal.Signals | None) -> None:
        self.chance, self.slow, self.fate = random.Random(f"{run}/{rank}"), slow, fate
        self.step = self.chance.randrange(1, STEPS - 1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A process may come late."""
        time.sleep(self.chance.uniform(0, 0.3))

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A few latents of each rank are silent, for the resampling."""
        assert isinstance(pl_module, SAEModule)
        pl_module.members[0].variant.get_parameter("b_gate")[:3] = -1e3

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Reading may take a while."""
        self.delay()

    def on_after_backward(self, trainer: Trainer, *args: Any) -> None:
        """And a step."""
        self.delay()
        if self.fate is not None and trainer.global_step == self.step:
            os.kill(os.getpid(), self.fate)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """And a validation."""
        self.delay()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """And saving."""
        self.delay()

    def delay(self) -> None:
        """Mostly nothing, sometimes 50 ms; on the slow host always 10 more."""
        time.sleep(0.05 * self.chance.random() ** 8 + 0.01 * self.slow)


def fate_of(run: int) -> signal.Signals | None:
    """What happens to one of the ranks of a run."""
    return {3: signal.SIGKILL, 7: signal.SIGTERM}.get(run // 2 % 10)


def train(dataset: str, folder: Path, run: int, rank: int, strategy: str) -> None:
    """A rank's part of one run, which validates, resamples, steers to an L0 and saves on the way."""
    chance = random.Random(run)
    slow, chosen = chance.randrange(RANKS), chance.randrange(RANKS)
    data = ActivationData.of(ShardSource(dataset), batch_size=64, validation_rows=512)
    module = SAEModule(
        lambda d_in, d_out: Gated(d_in, d_out, d_sae=64),
        data.d_in,
        data.d_out,
        lr=1e-3,
        target_l0=6.0,
        ema_half_life_steps=5.0,
        resample_steps=[STEPS // 2],
        dead_after_tokens=256,
        seed=0,
    )
    trainer = SAETrainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        max_steps=STEPS,
        val_check_interval=STEPS // 4,
        log_every_n_steps=3,
        enable_progress_bar=False,
        logger=False,
        default_root_dir=str(folder),
        callbacks=[Unsteady(rank, run, rank == slow, fate_of(run) if rank == chosen else None)],
    )
    trainer.fit(module, data)
    dist.barrier()


def rank_of(dataset: str, folder: Path, run: int, rank: int, port: int, strategy: str) -> None:
    """The process of a rank; never returns."""
    run_rank(rank, RANKS, port, lambda: train(dataset, folder, run, rank, strategy))


def one(dataset: str, folder: Path, run: int, strategy: str) -> dict[str, Any]:
    """One run: how its ranks ended (a negative code is a signal), None for one that had to be ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin, pids = time.monotonic(), list[int]()
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            rank_of(dataset, folder, run, rank, port, strategy)
        pids.append(pid)
    codes: dict[int, int | None] = {}
    while len(codes) < RANKS and time.monotonic() - begin < SECONDS:
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for pid in pids:
        if pid not in codes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    weights, last = folder / "sae" / "sae.safetensors", folder / "checkpoints" / "last.ckpt"
    return {
        "run": run,
        "strategy": strategy,
        "codes": [codes.get(pid) for pid in pids],
        "seconds": round(time.monotonic() - begin, 2),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None,
        "saved": torch.load(last, weights_only=True)["global_step"] if last.exists() else None,
    }


def main(dataset: str, folder: str, out: str, n: str, *strategies: str) -> None:
    """All runs; OUT.json is complete after each."""
    torch.set_num_threads(1)
    found = []
    for run in range(int(n)):
        strategy = strategies[run % len(strategies)] if strategies else "ddp"
        found.append(one(dataset, Path(folder) / str(run), run, strategy))
        print(json.dumps(found[-1]), flush=True)
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
