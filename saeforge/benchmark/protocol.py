"""The protocol: what all runs of a synthetic benchmark share, and one run of ours."""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from saeforge.benchmark.search import Knob
from saeforge.data.loader import reading_threads
from saeforge.data.synthetic import SyntheticFiles, SyntheticSource
from saeforge.errors import ConfigError
from saeforge.evaluation.ground_truth import measure_ground_truth
from saeforge.registry import VARIANTS
from saeforge.sae import SAE
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.trainer import SAETrainer


@dataclass(frozen=True)
class Protocol:
    """What all runs share.

    Attributes:
        d_sae: latents. samples: rows of a run. batch_size: rows of a step.
        lr: learning rate, constant, for every variant; None leaves rate and decay to the variant's recipe.
        precision: "32-true" or "bf16-mixed".
    """

    d_sae: int = 512
    samples: int = 20_000_000
    batch_size: int = 1024
    lr: float | None = 3e-4
    precision: str = "32-true"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


#: The small protocol goes with `SMALL`, the large one is the published one of SynthSAEBench-16k.
PROTOCOLS = {
    "small": Protocol(),
    "16k": Protocol(d_sae=4096, samples=200_000_000, precision="bf16-mixed"),
}
#: Wanted L0 beside them: about three quarters of the features that fire, as published.
L0 = {"small": (8.0, 6.0), "16k": (25.0, 20.0)}


def knob_of(variant: str, given: Mapping[str, str], options: Mapping[str, Any], target: float) -> Knob:
    """What sets a variant's sparsity: as given, or the coefficient that it names, or its k, or its target.

    Args:
        variant: entry-point name.
        given: by variant, as `Knob.parse` reads it.
        options: of the variant.
        target: the wanted L0, where a target starts.

    Raises:
        ConfigError: none of them, or a wrong option.
    """
    if variant in given:
        return Knob.parse(given[variant])
    cls = VARIANTS.load(variant)
    try:
        built = cls(8, 8, d_sae=4096, **options)
    except TypeError as error:
        raise ConfigError(f"variant {variant}: {error}") from error
    names = inspect.signature(cls).parameters
    if built.sparsity_schedule in names:
        return Knob(built.sparsity_schedule, start=built.schedules(1000)[built.sparsity_schedule](999))
    if "k" in names:
        return Knob("k", exact=True, rising=True)
    for name in ("target_l0", "target"):
        if name in names:
            return Knob(name, start=target, rising=True)
    raise ConfigError(f"what sets the sparsity of {variant!r}? give --knob {variant}=OPTION:START")


def train_one(
    source: SyntheticFiles | SyntheticSource,
    protocol: Protocol,
    variant: str,
    options: Mapping[str, Any],
    seed: int,
    *,
    training: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> tuple[SAE, float]:
    """Trains one SAE as `saeforge fit` would.

    Args:
        source: the rows.
        protocol: what all runs share.
        variant: entry-point name.
        options: of the variant, the one that sets its sparsity included.
        seed: of weights and order.
        training: options of `SAEModule` beside rate and seed.
        progress: show a progress bar.

    Returns:
        The folded SAE, and seconds from the first look at the data to the last step.

    Raises:
        ConfigError: a wrong option.
    """
    build = functools.partial(VARIANTS.load(variant), d_sae=protocol.d_sae, **options)
    data = ActivationData.of(
        source, batch_size=protocol.batch_size, tokens=protocol.samples, seed=seed, window_blocks=1
    )
    if isinstance(source, SyntheticSource):  # rows are computed; half of the cores are left to the step
        data.threads = max(reading_threads(), (os.cpu_count() or 1) // 2)
    try:
        decay = None if protocol.lr is None else 0.0
        settings = {"lr": protocol.lr, "lr_decay_share": decay, "seed": seed, **(training or {})}
        module = SAEModule(build, data.d_in, data.d_out, **settings)
    except TypeError as error:
        raise ConfigError(f"variant {variant}: {error}") from error
    trainer = SAETrainer(
        accelerator="auto",
        devices=1,
        precision=protocol.precision,
        enable_progress_bar=progress,
        limit_val_batches=0,
        default_root_dir=None,
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    return module.folded()[0], seconds


def judge(sae: SAE, source: SyntheticFiles | SyntheticSource) -> dict[str, Any]:
    """All measures of a saved SAE, by name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return asdict(measure_ground_truth(sae.to(device), source))
