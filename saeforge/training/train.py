"""`train()`: an SAE from activations in memory (or a dataset), in one call. The same run as `saeforge fit`."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
from lightning.pytorch import seed_everything
from torch import Tensor

from saeforge.data.shard_source import ShardSource
from saeforge.data.source import BlockSource
from saeforge.data.tensor_source import TensorSource
from saeforge.errors import ConfigError
from saeforge.registry import VARIANTS
from saeforge.sae import SAE
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.run_folder import check_free
from saeforge.training.trainer import SAETrainer
from saeforge.variants import Variant

#: What `training` may hold: SAEModule's options that `train` has no argument of its own for.
_TRAINING = set(inspect.signature(SAEModule).parameters) - {"variant", "d_in", "d_out", "lr", "sweep", "grid"}


# What differs is the result; the arguments are those below.
@overload
def train(x: Any, *, sweep: None = None, grid: None = None, **options: Any) -> SAE: ...
@overload
def train(
    x: Any,
    *,
    sweep: Mapping[str, Mapping[str, Any] | None],
    grid: Mapping[str, list[Any]] | None = None,
    **options: Any,
) -> dict[str, SAE]: ...
@overload
def train(x: Any, *, sweep: None = None, grid: Mapping[str, list[Any]], **options: Any) -> dict[str, SAE]: ...


def train(
    x: Tensor | np.ndarray | Iterable[Tensor] | Sequence[Tensor] | str | Path | BlockSource,
    *,
    variant: str | type[Variant] = "topk",
    target: Tensor | np.ndarray | Sequence[Tensor] | str | list[str] | None = None,
    site: str | list[str] | None = None,
    tokens: int | None = None,
    batch_size: int = 4096,
    lr: float | None = None,
    precision: str = "32-true",
    validation_share: float = 0.1,
    group_rows: int = 1,
    seed: int = 0,
    run: str | Path | None = None,
    progress: bool | None = None,
    trainer: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    sweep: Mapping[str, Mapping[str, Any] | None] | None = None,
    grid: Mapping[str, list[Any]] | None = None,
    **options: Any,
) -> SAE | dict[str, SAE]:
    """Trains an SAE and returns it; or several, from one stream of activations, and returns them by name.

    Args:
        x: (n, d_in) activations: a tensor, an array, an iterator of chunks, or the path of a dataset on disk. A list or
            tuple of tensors or arrays: several sources side by side, row i of each the same token (a crosscoder). Or a
            block source, such as `saeforge.data.synthetic.SyntheticSource`.
        variant: entry-point name or class.
        target: (n, d_out) to reconstruct instead of x (a transcoder), or a list; for a dataset, the name of that site.
        site: of a dataset that has several, the one to read, or a list of sites side by side; "PATH#SITE" is one of
            another dataset of the same tokens.
        tokens: length of the run; default: one pass, at least 2,000 steps.
        batch_size: rows of an optimizer step. Smaller than given if x is small.
        lr: learning rate; default: the variant's recipe.
        precision: "32-true" or "bf16-mixed".
        validation_share: share of x, if it is in memory, held out for the figures shown while training.
        group_rows: so many consecutive rows of x, if it is in memory, stay together, for variants that see neighbours;
            a dataset has its own (`saeforge harvest --group_rows`).
        seed: of weights and order.
        run: RUN folder to write; default: nothing is written.
        progress: show a progress bar; default: on a terminal.
        trainer: further arguments of Lightning's Trainer, e.g. `{"devices": 2, "strategy": "ddp"}`.
        training: further options of the run (docs/training.md), as under `model` in a config, e.g.
            `{"target_l0": 64, "ema_half_life_steps": 700, "init_from": sae, "skip": True}`; its `seed` is that of the
            weights alone.
        sweep: several SAEs, by name, and what each differs in from the others' common options above and below:
            `{"small": {"k": 16}, "gated": {"variant": "gated", "l1": 0.02, "lr": 3e-4}}` (docs/sweeps.md).
        grid: the same from lists of values, all combinations: `{"k": [16, 32], "d_sae": [2048, 4096]}`.
        options: of the variant, e.g. `d_sae=4096, k=32`.

    Returns:
        The folded SAE; `sae.meta` holds its provenance. With `sweep` or `grid` a dict of them.

    Raises:
        ConfigError, DatasetError, PluginError: see their messages.
        KeyboardInterrupt: stopped; with `run`, its state is in RUN/checkpoints.
    """
    if run is not None:
        check_free(Path(run), resume=False, overwrite=False)
    cls = VARIANTS.load(variant) if isinstance(variant, str) else variant
    source: BlockSource
    if isinstance(x, (str, Path)):
        names = [target] if isinstance(target, str) else target
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)):
            raise ConfigError("x is a dataset on disk, so target must be the name of one of its sites")
        if group_rows != 1:
            raise ConfigError("x is a dataset on disk, which has its own group_rows: leave it out")
        source = ShardSource(str(x), input=site, target=cast("str | list[str] | None", target))
        if len(source.pairs) > 1:
            raise ConfigError(
                f"site {site!r} means {len(source.pairs)} SAEs; train() makes one: saeforge.fit makes several"
            )
    elif hasattr(x, "read_block"):
        if target is not None or site is not None or group_rows != 1:
            raise ConfigError(
                "x is a block source, which knows its target and groups: leave out target, site, group_rows"
            )
        source = cast(BlockSource, x)
    else:
        if isinstance(target, str) or site is not None:
            raise ConfigError("x is in memory, so target must be rows too, and site says nothing")
        rows, wanted = (tuple(part) if isinstance(part, list) else part for part in (x, target))
        source = TensorSource(cast(Any, rows), wanted, validation_share=validation_share, unit=group_rows)
        # A small x still holds several batches per pass; 8 lanes divide every power of two from 8 on.
        while batch_size > 64 and batch_size * 4 > source.n_blocks("train") * source.block_rows("train"):
            batch_size = max(64, batch_size // 2 // 8 * 8)
    training = training or {}
    if unknown := sorted(training.keys() - _TRAINING):
        raise ConfigError(f"training: unknown option {unknown[0]!r}; expected {', '.join(sorted(_TRAINING))}")
    seed_everything(seed, verbose=False)
    data = ActivationData.of(source, batch_size=batch_size, tokens=tokens, seed=seed)
    try:
        build = functools.partial(cls, **options)
        module = SAEModule(
            build, data.d_in, data.d_out, lr=lr, sweep=_plain(sweep), grid=_plain(grid), **{"seed": seed, **training}
        )
    except TypeError as error:
        raise ConfigError(f"variant {variant}: {error}") from error
    settings: dict[str, Any] = {
        "accelerator": "auto",
        "devices": 1,
        "enable_progress_bar": sys.stdout.isatty() if progress is None else progress,
        "precision": precision,
        "default_root_dir": None if run is None else str(run),
        **(trainer or {}),
    }
    host = SAETrainer(**settings)
    host.fit(module, data)
    if host.run_folder is not None and host.run_folder.stopped_by is not None:
        raise KeyboardInterrupt  # what is there is not the SAE that was asked for
    saes = module.folded()
    return dict(zip(module.names(source), saes, strict=True)) if module.swept else saes[0]


def _plain(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if given is None else dict(given)
