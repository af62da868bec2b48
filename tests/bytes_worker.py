"""Bytes that each of some forked gloo ranks hands to the collectives of a step, on several layouts.

python -m tests.bytes_worker DATASET OUT.json

OUT.json has, by layout `DATAxLATENTS`, a list of steps for each rank: bytes of gradients as DDP reduces them, of the
data group and of the latent group by kind, and how many of its latents are listed as dead at the end of the step.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from saeforge.data.shard_source import ShardSource
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.strategy import LatentParallel
from saeforge.training.trainer import SAETrainer
from saeforge.variants import TopK
from tests.forked import run_rank

LAYOUTS = ((2, 1), (1, 2), (2, 2))
BATCH, D_SAE, K, STEPS = 256, 512, 4, 6


class Bytes(Callback):
    """Counts from the end of one step to that of the next."""

    def __init__(self) -> None:
        self.gradients, self.before = 0, Counter[str]()
        self.steps: list[dict[str, int]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """DDP, where it is, is asked to tell."""
        model, strategy = trainer.strategy.model, trainer.strategy
        of_rows = strategy._ddp_kwargs["process_group"] if isinstance(strategy, LatentParallel) else None

        def reduce(bucket: Any) -> Any:
            self.gradients += bucket.buffer().nbytes
            return allreduce_hook(of_rows, bucket)  # type: ignore[arg-type]  # None: all processes

        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model.register_comm_hook(None, lambda _, bucket: reduce(bucket))  # a bucket's annotation may be no string
        assert isinstance(pl_module, SAEModule)
        pl_module.members[0].variant.dead_latents()  # as after each step: listing them is not a step's
        self.before = self.count(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Comes before every other callback."""
        assert isinstance(pl_module, SAEModule)
        now = self.count(pl_module)
        dead = len(pl_module.members[0].variant.dead_latents())
        self.steps.append({**{key: now[key] - self.before[key] for key in now}, "dead": dead})
        self.before = self.count(pl_module)

    def count(self, module: LightningModule) -> Counter[str]:
        """Bytes up to now."""
        assert isinstance(module, SAEModule)
        variant = module.members[0].variant
        sent = Counter({"gradients": self.gradients})
        for name, group in (("data", variant.run.group), ("latents", variant.latent_group)):
            sent.update({f"{name} {kind}": bytes_ for kind, bytes_ in group.sent.items()})
        return sent


def fit(dataset: str, data_ranks: int, latents: int) -> list[dict[str, int]]:
    """A run of one rank; no latent is listed as dead before the fourth step has ended."""
    data = ActivationData.of(ShardSource(dataset), batch_size=BATCH)
    module = SAEModule(
        lambda d_in, d_out: TopK(d_in, d_out, d_sae=D_SAE, k=K), data.d_in, data.d_out, dead_after_tokens=4 * BATCH
    )
    counted = Bytes()
    trainer = SAETrainer(
        accelerator="cpu",
        devices=data_ranks * latents,
        strategy="ddp" if latents == 1 else "latent_parallel",
        latents=None if latents == 1 else latents,
        max_steps=STEPS,
        limit_val_batches=0,
        enable_progress_bar=False,
        logger=False,
        callbacks=[counted],
    )
    trainer.fit(module, data)
    return counted.steps


def rank(dataset: str, layout: tuple[int, int], number: int, port: int, out: str) -> None:
    """The process of a rank; never returns."""

    def work() -> None:
        Path(f"{out}.{number}").write_text(json.dumps(fit(dataset, *layout)))
        dist.barrier()

    run_rank(number, layout[0] * layout[1], port, work)


def main(dataset: str, out: str) -> int:
    """All layouts; returns how many ranks failed."""
    torch.set_num_threads(1)
    found = {}
    for layout in LAYOUTS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids, world = [], layout[0] * layout[1]
        for number in range(world):
            pid = os.fork()
            if pid == 0:
                rank(dataset, layout, number, port, out)
            pids.append(pid)
        if failed := sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids):
            return failed
        found[f"{layout[0]}x{layout[1]}"] = [json.loads(Path(f"{out}.{n}").read_text()) for n in range(world)]
    Path(out).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
