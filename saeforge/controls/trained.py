"""Controls that are trained: topk with all its weights, or with its decoder frozen at random directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

from saeforge.data.source import BlockSource
from saeforge.optim import RowAdam
from saeforge.sae import SAE
from saeforge.training.train import train
from saeforge.variants import TopK, Variant


def train_topk(
    source: BlockSource,
    *,
    d_sae: int,
    k: int,
    tokens: int,
    batch_size: int,
    frozen: bool,
    lr: float | None = None,
    seed: int = 0,
    training: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> SAE:
    """Trains topk as `saeforge.train` does; or leaves its decoder at the random directions that it begins with.

    Frozen, everything else is learned: the encoder, which begins as the decoder's transpose, and both biases ("frozen
    decoder" in Korznikov et al. 2026, arXiv 2602.14111).

    Args:
        source: activations.
        d_sae: latents. k: active ones of a token.
        tokens: length of the run. batch_size: rows of a step.
        frozen: leave the decoder.
        lr: learning rate; None: the variant's recipe.
        seed: of weights and order.
        training: further options of the run, as `saeforge.train` takes them.
        trainer: of Lightning's Trainer.

    Raises:
        ConfigError, DatasetError: as `saeforge.train`.
        KeyboardInterrupt: stopped.
    """

    def build(d_in: int, d_out: int, **options: Any) -> Variant:
        variant = TopK(d_in, d_out, **options)
        variant.W_dec.requires_grad_(not frozen)
        return variant

    more: dict[str, Any] = dict(training or {})
    if frozen:
        width = source.pairs[0].widths(source)
        recipe = TopK(*width, d_sae=d_sae, k=k).recipe(1)
        more["optimizer"] = partial(
            moving_adam, lr=lr or recipe.lr, betas=recipe.betas, eps=recipe.eps, max_grad_norm=recipe.max_grad_norm
        )
        lr = None
    return train(
        source,
        variant=cast(Any, build),
        d_sae=d_sae,
        k=k,
        tokens=tokens,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        training=more,
        trainer={"limit_val_batches": 0, "logger": False, **(trainer or {})},
    )


def moving_adam(groups: Iterable[dict[str, Any]], **options: Any) -> RowAdam:
    """RowAdam over the parameters that may move."""
    moving = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    return RowAdam([group for group in moving if group["params"]], **options)
