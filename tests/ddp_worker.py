"""Trains all variants on the toy dataset, and one with every option of a run, and writes their losses.

Alone or under `torchrun --nproc-per-node 2`: python -m tests.ddp_worker DATASET OUT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from saeforge.data.shard_source import ShardSource
from saeforge.registry import VARIANTS
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.trainer import SAETrainer
from saeforge.variants import Gated, L1ReLU, TopK

STEPS = 50
PLUGINS: dict[str, dict[str, Any]] = {
    "batchtopk": {"k": 4},
    "matryoshka": {"k": 4},
    "jumprelu": {"bandwidth": 0.1},
    "panneal": {},
    "crosscoder": {"k": 4},
}


class Losses(Callback):
    """Keeps what the read-out of each step says: means over all ranks."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After Telemetry, which reads out at every step here."""
        assert isinstance(pl_module, SAEModule)
        self.steps.append(dict(pl_module.members[0].latest))


def main(dataset: str, out: str) -> None:
    """Trains each variant with the same global batch of 256 rows."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    result: dict[str, Any] = {}
    everything = {"target_l0": 8.0, "ema_half_life_steps": 5.0, "whitening": "zca"}
    runs: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
        ("TopK", TopK, {"k": 4}, {}),
        ("L1ReLU", L1ReLU, {"l1": 1.0}, {}),
        ("Gated", Gated, {}, {}),
        ("everything", Gated, {}, everything),
        ("MultiTopK", TopK, {"k": 8, "k_start": 12, "multi_k": 2}, {}),
    ]
    installed = {record.name for record in VARIANTS.records()}
    runs += [(name, VARIANTS.load(name), options, {}) for name, options in PLUGINS.items() if name in installed]
    for name, variant, options, settings in runs:
        data = ActivationData.of(ShardSource(dataset), batch_size=256)
        module = SAEModule(
            lambda d_in, d_out, v=variant, o=options: v(d_in, d_out, d_sae=512, **o),  # type: ignore[misc]
            data.d_in,
            data.d_out,
            lr=1e-3,
            dead_after_tokens=512,  # AuxK is at work from the third step on
            **settings,
        )
        losses = Losses()
        trainer = SAETrainer(
            accelerator="cpu",
            devices=world,
            strategy="ddp" if world > 1 else "auto",
            max_steps=STEPS,
            log_every_n_steps=1,
            enable_progress_bar=False,
        )
        trainer.callbacks.append(losses)  # type: ignore[attr-defined]
        trainer.fit(module, data)
        result[name] = losses.steps
        validated = [step["val_fvu"] for step in losses.steps if "val_fvu" in step]
        assert validated
    if int(os.environ.get("RANK", "0")) == 0:
        Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
