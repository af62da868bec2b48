"""`Settings`: what a run decides about the training of an SAE."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch.cli import OptimizerCallable

from saeforge.sae import SAE
from saeforge.schedules import Shape
from saeforge.training.whitening import Kind


@dataclass(frozen=True)
class Settings:
    """What a run decides about the training of an SAE; None leaves it to the variant's recipe. See `SAEModule`."""

    optimizer: OptimizerCallable | None = None
    lr: float | None = None
    max_grad_norm: float | None = None
    lr_warmup_steps: int | None = None
    lr_decay_share: float | None = None
    dead_after_tokens: int | None = None
    resample_steps: tuple[int, ...] | None = None
    cuda_graph: bool = False
    skip: bool = False
    seed: int = 0
    lr_warmup_shape: Shape | None = None
    lr_decay_shape: Shape | None = None
    target_l0: float | None = None
    ema_half_life_steps: float | None = None
    init_from: str | SAE | None = None
    whitening: Kind | None = None
    whitening_shrinkage: float | None = None
