"""Fits on meshes of gloo ranks, for tests that compare layouts: ranks are forked, so that imports are paid once.

python -m tests.mesh_worker DATASET OUT.json STAGES

STAGES is JSON, {name: stage}, run one after the other; a stage is {"ranks": n, "strategy": ..., "latents": ...,
"float64": ..., "fits": {name: fit}}. A fit has "variant" and maybe "options" of it, "settings" of the module, "steps",
"stop_after", "run" (a folder), "resume", "bf16", "accumulate", "transcoder" (other data). OUT.json holds the figures of
every step, by stage and fit.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from saeforge.data.shard_source import ShardSource
from saeforge.data.tensor_source import TensorSource
from saeforge.registry import VARIANTS
from saeforge.training.data import ActivationData
from saeforge.training.module import _COMPUTE_DTYPE, SAEModule
from saeforge.training.trainer import SAETrainer
from tests.forked import run_rank
from tests.toy import D_IN, toy_rows

BATCH, D_SAE, STEPS = 256, 256, 12


class Steps(Callback):
    """Keeps what the read-out of each step says, and stops after so many."""

    def __init__(self, stop_after: int | None) -> None:
        self.stop_after = stop_after
        self.figures: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After Telemetry, which reads out at every step here."""
        assert isinstance(pl_module, SAEModule)
        figures: dict[str, float] = {}
        for member in pl_module.members:
            prefix = f"{member.name}/" if member.name else ""
            figures |= {prefix + name: value for name, value in member.latest.items()}
        self.figures.append({"step": trainer.global_step, **figures})
        if trainer.global_step == self.stop_after:
            trainer.should_stop = True


def transcoder_rows() -> TensorSource:
    """Rows, and a target of another width that a linear path explains a part of."""
    x = toy_rows(8192)
    mixed = torch.randn(D_IN, 24, generator=torch.Generator().manual_seed(5))
    return TensorSource(x, (x @ mixed).relu() + 0.3 * x[:, :24])


def fit(dataset: str, stage: dict[str, Any], given: dict[str, Any]) -> list[dict[str, float]]:
    """One run of one rank."""
    variant, options = VARIANTS.load(given["variant"]), {"d_sae": D_SAE, **given.get("options", {})}
    settings = {"lr": 1e-3, "dead_after_tokens": 2 * BATCH, **given.get("settings", {})}
    source = transcoder_rows() if given.get("transcoder") else ShardSource(dataset)
    data = ActivationData.of(source, batch_size=BATCH)
    module = SAEModule(lambda d_in, d_out: variant(d_in, d_out, **options), data.d_in, data.d_out, **settings)
    trainer = SAETrainer(
        accelerator="cpu",
        devices=stage["ranks"],
        strategy=stage.get("strategy", "ddp" if stage["ranks"] > 1 else "auto"),
        latents=stage.get("latents"),
        precision="bf16-mixed" if given.get("bf16") else "32-true",
        max_steps=given.get("steps", STEPS),
        log_every_n_steps=1,
        enable_progress_bar=False,
        logger=False,
        default_root_dir=given.get("run"),
        accumulate_grad_batches=given.get("accumulate", 1),
    )
    steps = Steps(given.get("stop_after"))
    trainer.callbacks.append(steps)  # type: ignore[attr-defined]
    trainer.fit(module, data, ckpt_path="last" if given.get("resume") else None)
    return steps.figures


def compute_in_float64() -> None:
    """From now on this process trains in float64, which no option of saeforge does: rows, weights, products, sums."""
    setup = SAEModule.setup

    def wide_setup(self: SAEModule, stage: str) -> None:
        self.double()
        setup(self, stage)
        self.double()

    SAEModule.setup = wide_setup  # type: ignore[method-assign]
    _COMPUTE_DTYPE["32-true"] = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]


def rank(dataset: str, stage: dict[str, Any], number: int, port: int, out: str) -> None:
    """A rank's process; never returns."""

    def work() -> None:
        if stage.get("float64"):
            compute_in_float64()
        figures = {name: fit(dataset, stage, given) for name, given in stage["fits"].items()}
        if number == 0:
            Path(out).write_text(json.dumps(figures))
        if dist.is_initialized():
            dist.barrier()

    run_rank(number, stage["ranks"], port, work)


def main(dataset: str, out: str, stages: str) -> int:
    """Runs the stages, and returns how many ranks failed."""
    torch.set_num_threads(1)
    result = {}
    for name, stage in json.loads(stages).items():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        part = f"{out}.{name}"
        pids = []
        for number in range(stage["ranks"]):
            pid = os.fork()
            if pid == 0:
                rank(dataset, stage, number, port, part)
            pids.append(pid)
        if failed := sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids):
            print(f"{failed} ranks of {name} failed", file=sys.stderr)
            return failed
        result[name] = json.loads(Path(part).read_text())
    Path(out).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
